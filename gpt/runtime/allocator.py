"""How this process keeps its memory.

A training step frees and asks for the same large blocks over and over. glibc gives them back to the system each time, which
then hands out empty pages one by one: 57,000 page faults a step, a tenth of its time, in the model of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
from collections.abc import Iterator

# <malloc.h>; mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD = 32 << 20  # the most that glibc takes; larger blocks are mapped and unmapped as before
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have blocks of up to 32 MB reused instead of returned to the system; for processes that train on a CPU.

    Returns:
        Whether it was done: False where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _NEVER))


def give_back_freed_memory() -> None:
    """Return whole pages that nothing uses now to the system, which `keep_freed_memory` keeps: after much has been freed for good."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Python's collector runs between steps, when asked, and not within them; what is there now is never looked at again."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
