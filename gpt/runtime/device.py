"""The device a run computes on: what the rest of the code may ask about it, so that nothing else needs to know one kind from another.

Each kind has a file of its own (`cpu`, `cuda`, `mps`, `neuron`, `neuron_sim`); what several equal ways of computing cost on them, the model
says itself (`gpt.model.kernels`).
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from gpt.config import DeviceConfig
from gpt.errors import UserError

if TYPE_CHECKING:
    from gpt.runtime.neuron_sim_record import Record

_WITHOUT_FLOAT64 = ("mps", "neuron")


@dataclass(frozen=True)
class Device:
    """Where to compute and in what precision; this class is an accelerator that torch knows, each kind says in what it differs.

    Attributes:
        description: for people.
        dtype: of the matrix products.
        peak_flops: dense floating-point operations a second in `dtype`, or None if not known.
        type: torch's device type.
        is_host: it computes in the host's memory, at once: there is nothing to wait for.
        pins_memory: copies to it are faster from pinned memory, and may go on while it computes.
        times_itself: its queue of work takes events that tell the time.
        says_when_full: too large a batch is an error at once, so that the largest one can be found by trying.
        fused_adamw: torch's fused AdamW runs on it, and heeds `grad_scale` and `found_inf`.
        compiles_ahead: what is compiled in the background is found again when the model asks for it.
        fixed_graphs: compiling takes so long that a run must not compile anything once it is under way.
        decodes: it can make text token by token, with another length at each step.
        process_group: torch's name of what processes talk through.
        patience: seconds that processes wait for each other, where the config does not say.
        assumed_flops: of a machine that is neither slow nor fast, without torch.compile.
    """

    description: str
    dtype: torch.dtype
    peak_flops: float | None = None

    type: ClassVar[str]
    is_host: ClassVar[bool] = False
    pins_memory: ClassVar[bool] = False
    times_itself: ClassVar[bool] = True
    says_when_full: ClassVar[bool] = True
    fused_adamw: ClassVar[bool] = True
    compiles_ahead: ClassVar[bool] = True
    fixed_graphs: ClassVar[bool] = False
    decodes: ClassVar[bool] = True
    process_group: ClassVar[str] = "gloo"
    patience: ClassVar[int] = 600
    assumed_flops: ClassVar[float] = 1e13

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in `dtype` within the block."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.type, self.dtype)

    def prepare_training(self, dropout: float = 0.0) -> list[str]:
        """Set what only a training process needs; returns what people should know of a run with this dropout, a sentence each."""
        return []

    def claim(self, local_rank: int) -> None:
        """Make the device of this process's number its own, before processes meet."""
        torch.accelerator.set_device_index(local_rank)

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.accelerator.synchronize()

    def memory_bytes(self) -> int | None:
        """Peak memory: of the process on a CPU, of the allocator on an accelerator; None where it is not known."""
        return None

    def memory_limit(self) -> int | None:
        """Bytes of memory of one device; None where it is not known, or not the run's alone."""
        return None

    def measured_peak(self) -> float | None:
        """`peak_flops`, or where no data sheet states it and it can be measured, the rate of a large matrix product."""
        return self.peak_flops

    def compile_obstacle(self) -> str | None:
        """Why torch.compile cannot work here, or None."""
        return None

    def compile_options(self) -> dict[str, Any]:
        """For torch.compile; every shape is fixed."""
        return {"dynamic": False}

    def rehearsal(self) -> Record | None:
        """What the device has done so far, if it only plays another; None: it is a real one."""
        return None

    def chip_peak_flops(self) -> float | None:
        """Dense bf16 operations a second of one device, or of the chip that is rehearsed; None where it is not known."""
        return self.peak_flops

    def compile_cache(self) -> str | None:
        """The folder in which torch.compile finds what it has made before; None: it keeps nothing."""
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        return cache_dir()

    def explain(self, error: RuntimeError) -> str | None:
        """What an error of the device means and what helps, in a sentence; None: it says nothing that people could act on."""
        return None

    def after_first_step(self) -> str | None:
        """Called when a step has been done: what is wrong with how it went, or None.

        Raises:
            UserError: so wrong that the run should not go on.
        """
        return None


def find_device(config: DeviceConfig, precision: Literal["auto", "bf16", "fp32"] = "auto", processes: int = 1) -> Device:
    """The device that a config asks for.

    Args:
        config: the section `device`.
        precision: of the matrix products; auto: bf16 where the chip multiplies it.
        processes: of the run on this machine, which share its cores.

    Raises:
        UserError: it is not there; the message says what is.
    """
    from gpt.runtime.cpu import set_threads

    if config.name == "neuron_sim":
        from gpt.runtime.neuron import find_simulated_neuron

        set_threads(config.threads, processes)
        return find_simulated_neuron(config, precision)
    found = _accelerator()
    if config.name not in ("auto", "cpu", found):
        raise UserError(f"device={config.name}: there is none here{_why_not(config.name)}; found: {found}. device=auto takes what there is")
    kind = found if config.name == "auto" else config.name
    set_threads(config.threads, processes)
    if kind == "cuda":
        from gpt.runtime.cuda import find_cuda

        return find_cuda(precision)
    if kind == "neuron":
        from gpt.runtime.neuron import find_neuron

        return find_neuron(config, precision)
    if kind == "mps":
        from gpt.runtime.mps import find_mps

        return find_mps(precision)
    if kind != "cpu":
        raise UserError(f"device={config.name}: torch offers {kind}, for which there is no code here; use device=cpu")
    from gpt.runtime.cpu import find_cpu

    return find_cpu(precision)


def find_decoding_device(config: DeviceConfig, precision: Literal["auto", "bf16", "fp32"] = "auto") -> Device:
    """As `find_device`, for making text: auto takes the CPU where the accelerator cannot.

    Raises:
        UserError: the device that is asked for cannot.
    """
    device = find_device(config, precision)
    if device.decodes:
        return device
    if config.name == "auto":
        return find_device(replace(config, name="cpu"), precision)
    raise UserError(
        f"device={config.name}: text gets longer at each step, and this device compiles for each length; take device=cpu, or serve an "
        "export (gpt export) with vLLM there"
    )


def count_devices(config: DeviceConfig) -> int | None:
    """How many devices of the kind that a config asks for this machine has; None: processes share one, however many they are."""
    found = _accelerator()
    if found == "cpu" or config.name not in ("auto", found):
        return None
    if found == "neuron":
        from gpt.runtime.neuron import count_cores

        return count_cores()
    return torch.accelerator.device_count()


def unused_settings(config: DeviceConfig) -> list[str]:
    """Settings that are given and mean nothing for the device that is asked for, a sentence each."""
    if config.name == "neuron_sim":
        return []
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.name in ("unsupported", "chip", "ranks", "mfu")}
    usual = DeviceConfig()
    return [
        f"device.{name}={value} is of device=neuron_sim, and is not used" for name, value in given.items() if value != getattr(usual, name)
    ]


def widest_float(device: torch.device) -> torch.dtype:
    """The dtype for sums that should be as exact as the device can."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


def product_dtype(precision: Literal["auto", "bf16", "fp32"], chip_has_bf16: bool) -> torch.dtype:
    """The dtype of matrix products: what was asked for, or bf16 if the chip multiplies it."""
    if precision == "auto":
        return torch.bfloat16 if chip_has_bf16 else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _accelerator() -> str:
    """The type of the accelerator that torch finds, else cpu."""
    registered = torch.accelerator.current_accelerator()
    if registered is not None and registered.type == "neuron":  # a core that is looked at may be taken from the run's processes
        from gpt.runtime.neuron import is_here

        return "neuron" if is_here() else "cpu"
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None else "cpu"


def _why_not(name: str) -> str:
    if name == "cuda" and not torch.backends.cuda.is_built():
        return " (this torch was built without CUDA)"
    if name == "neuron":
        from gpt.runtime.neuron import why_there_is_none

        return f" ({why_there_is_none()})"
    return ""
