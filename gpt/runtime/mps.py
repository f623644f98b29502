"""An Apple GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from gpt.runtime.device import Device, product_dtype


@dataclass(frozen=True)
class Mps(Device):
    """An Apple GPU, in fp32 unless asked."""

    type: ClassVar[str] = "mps"
    times_itself: ClassVar[bool] = False
    fused_adamw: ClassVar[bool] = False  # its kernel takes a scale and a flag to leave a step out, and heeds neither

    def compile_obstacle(self) -> str | None:
        """It is not used here."""
        return "torch.compile on mps is not used"


def find_mps(precision: Literal["auto", "bf16", "fp32"]) -> Mps:
    """The GPU that torch has found."""
    return Mps("MPS", product_dtype(precision, chip_has_bf16=False))
