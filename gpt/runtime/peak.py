"""The rate of a large matrix product on this machine: the peak for the MFU of a CPU, whose data sheet states none."""

from __future__ import annotations

import time

import torch

SIZES = (2048, 1536, 1024, 512)  # of the square matrices: the largest one that the time allows
SECONDS = 0.2  # that the products take in all, once the size is found


def measured_peak_flops(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product on the CPU, with the number of threads that torch has now.

    The fastest of a few products of square matrices (what else the machine does only slows them), in some 0.2 s. It is what a plain
    product reaches, not what a data sheet would promise: shares of it compare on one machine, and may exceed 1 where shapes suit it better.

    Args:
        dtype: of the matrices.
    """
    probe = SIZES[-1]
    per_operation = min(_seconds(probe, dtype) for _ in range(4)) / (2 * probe**3)  # the first one also makes the kernel
    size = next((size for size in SIZES if 2 * size**3 * per_operation < SECONDS / 4), probe)
    times: list[float] = []
    while sum(times) < SECONDS * 3 / 4 and len(times) < 9:
        times.append(_seconds(size, dtype))
    return 2 * size**3 / min(times)


def _seconds(size: int, dtype: torch.dtype) -> float:
    a = torch.full((size, size), 0.5, dtype=dtype)  # no random numbers: a run's own stay as they are
    b = torch.full((size, size), 0.25, dtype=dtype)
    out = torch.empty(size, size, dtype=dtype)
    started = time.perf_counter()
    torch.mm(a, b, out=out)
    return time.perf_counter() - started
