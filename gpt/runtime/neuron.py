"""AWS Trainium by TorchNeuron, torch's native `neuron` device (torch-neuronx from 2.13 on; trn2 and trn3), and its rehearsal on a CPU.

What is said here of the hardware comes from AWS's documentation (PyTorch Native on Neuron) and from code that ran there; this code has
run on the stand-in of `gpt.runtime.neuron_sim` only. Both kinds share every line but for the finding.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from gpt.config import DeviceConfig
from gpt.errors import UserError
from gpt.runtime.device import Device, product_dtype
from gpt.runtime.environment import CACHE_VARIABLE, STRICT_VARIABLE, instance_type, neuron_obstacle, neuron_version

if TYPE_CHECKING:
    from gpt.runtime.neuron_sim_record import Record


@dataclass(frozen=True)
class Chip:
    """What AWS states of a chip, for one rank: a logical core of two physical ones.

    Attributes:
        peak_flops: dense bf16 operations a second.
        memory: bytes of HBM.
    """

    peak_flops: float
    memory: int


_COUNTING_SECONDS = 300  # to import torch and start the driver's runtime
CHIPS = {"trn2": Chip(166.75e12, 24 << 30), "trn3": Chip(167.75e12, 36 << 30)}
_DEVICES = Path("/dev")  # where the driver puts neuron0, neuron1 ...

# Of the compiler's errors: what people met there, and what helped them.
_COMPILER = {
    r"NCC_EMOD025": "a graph has a shape that is not fixed, which the compiler refuses",
    r"F137|exit code -9|returned -9|forcibly killed": "the compiler was ended for want of memory on the host; try a smaller "
    "train.micro_batch, or take an instance with more memory",
    r"CPU fallback disabled": "an operation failed on the device, and device.strict=true does not let it run on the CPU",
    r"NCC_\w+|neuronx-cc": "the device's compiler refused a graph; compile=false runs it operation by operation, far slower",
}


@dataclass(frozen=True)
class Neuron(Device):
    """A logical core of a Trainium chip; one per process.

    Attributes:
        chip: what is known of it; None: an unknown one.
        simulated: it is a CPU that plays one.
    """

    chip: Chip | None = None
    simulated: bool = False

    type: ClassVar[str] = "neuron"
    times_itself: ClassVar[bool] = False  # nothing is written of events with times
    says_when_full: ClassVar[bool] = False  # each size to try would be compiled, for minutes
    fused_adamw: ClassVar[bool] = False
    compiles_ahead: ClassVar[bool] = False
    fixed_graphs: ClassVar[bool] = True
    decodes: ClassVar[bool] = False
    process_group: ClassVar[str] = "cpu:gloo,neuron:neuron"  # gloo for objects and barriers
    patience: ClassVar[int] = 7200  # a cold compilation outlasts anything less
    assumed_flops: ClassVar[float] = 1e13

    def prepare_training(self, dropout: float = 0.0) -> list[str]:
        """Warn of what has gone wrong there."""
        if not dropout:
            return []
        return [
            f"model.dropout={dropout:g}: backward of attention with dropout was wrong on one path of this device; check it with gpt parity"
        ]

    def claim(self, local_rank: int) -> None:
        """The process group assigns the cores, from LOCAL_RANK and LOCAL_WORLD_SIZE; the device must not be touched before."""
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))

    def memory_bytes(self) -> int | None:
        """Peak of what the allocator gave out."""
        stats: dict[str, Any] = importlib.import_module("torch_neuronx").memory_stats()
        return stats.get("allocated_bytes.all.peak")

    def memory_limit(self) -> int | None:
        """HBM of one rank."""
        return self.chip.memory if self.chip is not None else None

    def compile_options(self) -> dict[str, Any]:
        """Whole graphs of fixed shapes: with `dynamic` left to torch the compiler stops with NCC_EMOD025."""
        return {"backend": "neuron", "dynamic": False, "fullgraph": True}

    def rehearsal(self) -> Record | None:
        """The simulated core's record."""
        if not self.simulated:
            return None
        from gpt.runtime.neuron_sim_kernels import RECORD

        return RECORD

    def chip_peak_flops(self) -> float | None:
        """AWS's figure for a rank, which is of bf16."""
        return self.chip.peak_flops if self.chip is not None and self.dtype == torch.bfloat16 else None

    def compile_cache(self) -> str | None:
        """TorchNeuron's own."""
        return None if self.simulated else os.environ[CACHE_VARIABLE]

    def explain(self, error: RuntimeError) -> str | None:
        """Put an operation that is missing, and the compiler's codes, into words."""
        text = str(getattr(error, "inner_exception", error)).strip()  # of what torch.compile says around it
        if isinstance(error, NotImplementedError) and (found := re.search(r"aten::\w+(\.\w+)?", text)):
            return f"the device has no kernel for {found[0]}; device.strict=false lets it run on the CPU, which is far slower"
        line = " ".join(text.splitlines()[0].split()) if text else ""
        return next((f"{meaning} ({line})" for pattern, meaning in _COMPILER.items() if re.search(pattern, text)), None)

    def after_first_step(self) -> str | None:
        """Name what silently ran on the CPU.

        Raises:
            UserError: something did, under device.strict=true.
        """
        found: Sequence[str] = importlib.import_module("torch_neuronx").get_fallback_ops()
        if not found:
            return None
        problem = f"these operations have no kernel for the device and ran on the CPU, far slower: {', '.join(sorted(found))}"
        if os.environ.get(STRICT_VARIABLE) == "1":
            raise UserError(f"{problem}; device.strict=false lets them")
        return problem


def find_neuron(config: DeviceConfig, precision: Literal["auto", "bf16", "fp32"]) -> Neuron:
    """The core that this process will be given; touches nothing yet."""
    if problem := neuron_obstacle():
        raise UserError(f"device={config.name}: {problem}")
    dtype = product_dtype(precision, chip_has_bf16=True)
    machine = instance_type()
    chip = _chip_of(machine.partition(".")[0])
    peak = chip.peak_flops if chip is not None and dtype == torch.bfloat16 else None
    return Neuron(f"Trainium ({machine or 'unknown machine'}), torch-neuronx {neuron_version()}", dtype, peak, chip)


def find_simulated_neuron(config: DeviceConfig, precision: Literal["auto", "bf16", "fp32"]) -> Neuron:
    """A CPU that plays a core of the chip `device.chip`. Its own speed says nothing of the chip's, so there is no MFU."""
    from gpt.runtime.neuron_sim import install

    install(config.unsupported, config.strict).memory_limit = CHIPS[config.chip].memory
    dtype = product_dtype(precision, chip_has_bf16=True)
    return Neuron(
        f"rehearsal of {config.chip} on a CPU, {torch.get_num_threads()} threads", dtype, None, CHIPS[config.chip], simulated=True
    )


def is_here() -> bool:
    """Whether there is a chip, by its driver's files, or one that is simulated in this process."""
    return "gpt.runtime.neuron_sim" in sys.modules or any(_DEVICES.glob("neuron[0-9]*"))


def count_cores() -> int:
    """Logical cores of this machine, asked in a process of its own: one that looks keeps them from others as long as it lives."""
    ask = [sys.executable, "-c", "import torch; print(torch.accelerator.device_count())"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=_COUNTING_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        said, words = f"torch has not answered in {_COUNTING_SECONDS} s", []
    else:
        said, words = " ".join(done.stderr.split())[-200:], [] if done.returncode else done.stdout.split()
    if not words or not words[-1].isdigit():
        raise UserError(f"device=neuron: its cores cannot be counted ({said}); give launch.nproc, or try gpt doctor")
    return int(words[-1])


def why_there_is_none() -> str:
    """Why torch offers no neuron device."""
    return neuron_obstacle() or "torch-neuronx is installed, but finds no core: gpt doctor looks at the driver"


def _chip_of(family: str) -> Chip | None:
    """Of an instance family; where a rank is one physical core (NEURON_LOGICAL_NC_CONFIG=1), it has half of everything."""
    chip = CHIPS.get(next((name for name in CHIPS if family.startswith(name)), ""))
    if chip is not None and os.environ.get("NEURON_LOGICAL_NC_CONFIG") == "1":
        return Chip(chip.peak_flops / 2, chip.memory // 2)
    return chip
