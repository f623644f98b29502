"""The device a run computes on: the only place that knows one kind from another."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sysconfig
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt.errors import UserError

# Dense bf16 TFLOP/s from the makers' data sheets. A chip that is not here has no MFU: better none than a guess.
PEAK_TFLOPS = {
    "A100": 312, "A10G": 70, "A30": 165, "A40": 149.7, "B200": 2250, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835,
    "H100": 989, "H200": 989, "L4": 121, "L40S": 362, "RTX 3090": 71, "RTX 4090": 165.2, "RTX 5090": 209.5,
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """Where to compute and in what precision.

    Attributes:
        type: torch's device type.
        description: for people.
        dtype: of the matrix products.
        peak_flops: dense floating-point operations a second in `dtype`, or None if not known.
    """

    type: str
    description: str
    dtype: torch.dtype
    peak_flops: float | None

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in `dtype` within the block."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.type, self.dtype)

    @property
    def pins_memory(self) -> bool:
        """Whether copies to it are faster from pinned memory, and may go on while it computes."""
        return self.type == "cuda"

    def synchronize(self) -> None:
        """Wait for the device; a CPU has nothing to wait for."""
        if self.type != "cpu":
            torch.accelerator.synchronize()

    def memory_bytes(self) -> int | None:
        """Peak memory: of the process on a CPU, of the allocator on an accelerator; None where it is not known."""
        if self.type == "cpu":
            with contextlib.suppress(ImportError):  # there is no `resource` on Windows
                import resource

                return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
            return None
        return torch.accelerator.max_memory_allocated() if self.type == "cuda" else None

    def compile_obstacle(self) -> str | None:
        """Why torch.compile cannot work here, or None."""
        if self.type == "cpu":
            if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
                return "there is no C++ compiler"
            if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
                return "Python's C headers are not installed"
        elif self.type == "mps":
            return "torch.compile on mps is not used"
        return None


def count_devices(name: str) -> int:
    """How many processes a run on this kind of device has on this machine: one per accelerator, or one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.accelerator.device_count() if accelerator is not None and name in ("auto", accelerator.type) else 1


def find_device(name: str, precision: str, threads: int = 0, processes: int = 1) -> Device:
    """The device that a config asks for.

    Args:
        name: auto, cpu, cuda or mps.
        precision: auto, bf16 or fp32.
        threads: CPU threads; 0: one for each physical core that this process may use, unless OMP_NUM_THREADS says otherwise.
        processes: of the run on this machine, which share its cores.

    Raises:
        UserError: it is not there; the message says what is.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found = accelerator.type if accelerator is not None else "cpu"
    if name not in ("auto", "cpu", found):
        hint = " (this torch was built without CUDA)" if name == "cuda" and not torch.backends.cuda.is_built() else ""
        raise UserError(f"device={name}: there is none here{hint}; found: {found}. device=auto takes what there is")
    kind = found if name == "auto" else name
    if threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or max(1, usable_cores() // processes))
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")
        title = torch.cuda.get_device_name()
        dtype = _dtype(precision, torch.cuda.is_bf16_supported(including_emulation=False))
        peak = next((tflops for chip, tflops in sorted(PEAK_TFLOPS.items(), key=lambda i: -len(i[0])) if chip in title), None)
        return Device(kind, title, dtype, peak * 1e12 if peak and dtype == torch.bfloat16 else None)
    if kind == "cpu":
        dtype = _dtype(precision, _cpu_multiplies_bf16())
        return Device(kind, f"CPU, {torch.get_num_threads()} threads", dtype, None)
    return Device(kind, kind.upper(), _dtype(precision, chip_has_it=False), None)


def usable_cores() -> int:
    """Physical cores that this process may use: those of its CPU affinity, within the quota of its container."""
    try:
        allowed = os.sched_getaffinity(0)
        topology = Path("/sys/devices/system/cpu")
        siblings = {(topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text() for cpu in allowed}
        cores = len(siblings)
    except (AttributeError, OSError):  # not Linux, or it does not say
        cores = torch.get_num_threads()
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return max(1, cores)


def widest_float(device: torch.device) -> torch.dtype:
    """The dtype for sums that should be as exact as the device can."""
    return torch.float32 if device.type == "mps" else torch.float64


def _dtype(precision: str, chip_has_it: bool) -> torch.dtype:
    if precision == "auto":
        return torch.bfloat16 if chip_has_it else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _cpu_multiplies_bf16() -> bool:
    """Whether the CPU has bf16 matrix instructions; without them bf16 is emulated and slower than fp32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
