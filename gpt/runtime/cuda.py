"""An NVIDIA GPU: its products, its attention kernels, its memory. Written for CUDA and, where tests say so, not yet run on it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from gpt.runtime.device import Device, product_dtype

# Dense bf16 TFLOP/s from the maker's data sheets. A chip that is not here has no MFU: better none than a guess.
PEAK_TFLOPS = {
    "A100": 312, "A10G": 70, "A30": 165, "A40": 149.7, "B200": 2250, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835,
    "H100": 989, "H200": 989, "H200 NVL": 835, "L4": 121, "L40S": 362, "RTX 3090": 71, "RTX 4090": 165.2, "RTX 5090": 209.5,
}  # fmt: skip
_ANOTHER_CHIP = r"(?! (?:D|NVL|SUPER|Ti)\b)(?!.* (?:Laptop|MIG)\b)"  # what, after a chip's name, makes it another one, or a slice of it


@dataclass(frozen=True)
class Cuda(Device):
    """An NVIDIA GPU; one per process."""

    type: ClassVar[str] = "cuda"
    pins_memory: ClassVar[bool] = True
    process_group: ClassVar[str] = "nccl"
    assumed_flops: ClassVar[float] = 2e14

    def memory_bytes(self) -> int:
        """Peak of what the allocator gave out."""
        return torch.accelerator.max_memory_allocated()

    def memory_limit(self) -> int:
        """The GPU's memory."""
        return torch.cuda.get_device_properties().total_memory

    def compile_obstacle(self) -> str | None:
        """Triton makes the kernels."""
        from importlib.util import find_spec

        return None if find_spec("triton") is not None else "Triton, which makes the kernels of a GPU, is not installed"


def find_cuda(precision: Literal["auto", "bf16", "fp32"]) -> Cuda:
    """The GPU that torch has found. What is left of fp32 products runs in TF32 where bf16 ones run too; precision=fp32 means fp32.

    torch itself takes flash attention where it can, cuDNN's or the memory-efficient kernel elsewhere; all scores are kept if none fits.
    """
    dtype = product_dtype(precision, torch.cuda.is_bf16_supported(including_emulation=False))
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    title = torch.cuda.get_device_name()
    longest_first = sorted(PEAK_TFLOPS.items(), key=lambda i: -len(i[0]))
    peak = next((tflops for chip, tflops in longest_first if re.search(rf"\b{chip}\b{_ANOTHER_CHIP}", title)), None)
    return Cuda(title, dtype, peak * 1e12 if peak and dtype == torch.bfloat16 else None)
