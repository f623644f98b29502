"""The processor: its cores, what it multiplies, and whether it can compile."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from gpt.runtime.allocator import keep_freed_memory
from gpt.runtime.device import Device, product_dtype
from gpt.runtime.peak import measured_peak_flops


@dataclass(frozen=True)
class Cpu(Device):
    """The processor."""

    type: ClassVar[str] = "cpu"
    is_host: ClassVar[bool] = True
    times_itself: ClassVar[bool] = False
    says_when_full: ClassVar[bool] = False  # memory is shared
    assumed_flops: ClassVar[float] = 2.5e11

    def prepare_training(self, dropout: float = 0.0) -> list[str]:
        """Keep freed memory."""
        keep_freed_memory()
        return []

    def claim(self, local_rank: int) -> None:
        """There is one for all."""

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def memory_bytes(self) -> int | None:
        """Peak memory of the process."""
        with contextlib.suppress(ImportError):  # there is no `resource` on Windows
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
        return None

    def measured_peak(self) -> float:
        """The rate of a large matrix product now, since no data sheet states it."""
        return measured_peak_flops(self.dtype)

    def compile_options(self) -> dict[str, Any]:
        """Random numbers by torch's own kernels, the same as uncompiled: inductor would draw others, one by one, for half a step."""
        return {**super().compile_options(), "options": {"fallback_random": True}}

    def compile_obstacle(self) -> str | None:
        """Why torch.compile cannot work here, or None."""
        if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
            return "there is no C++ compiler"
        if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
            return "Python's C headers are not installed"
        return None


def find_cpu(precision: Literal["auto", "bf16", "fp32"]) -> Cpu:
    """The processor, with the threads that torch has now."""
    return Cpu(f"CPU, {torch.get_num_threads()} threads", product_dtype(precision, multiplies_bf16()))


def multiplies_bf16() -> bool:
    """Whether the CPU has bf16 matrix instructions; without them bf16 is emulated and slower than fp32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def set_threads(threads: int, processes: int) -> None:
    """Give torch its CPU threads.

    Args:
        threads: how many; 0: one for each physical core that this process may use, unless OMP_NUM_THREADS says otherwise.
        processes: that share the cores.
    """
    if threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or max(1, usable_cores() // processes))


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
