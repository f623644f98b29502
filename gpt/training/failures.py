"""What a run that fails tells its user: which errors are the machine's or the user's to mend, and the sentence for each."""

from __future__ import annotations

import errno
from collections.abc import Callable

from safetensors import SafetensorError

from gpt.config import RunConfig
from gpt.errors import UserError
from gpt.runtime.case import Case
from gpt.runtime.device import Device
from gpt.runtime.distributed import World, collective_of, waited_too_long
from gpt.runtime.out_of_memory import memory_error

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explained(
    error: Exception, config: RunConfig, world: World, device: Device, patience: float, path: object, doing: str, last: str,
    case: Callable[[], Case],
) -> Exception | None:  # fmt: skip
    """What to raise in place of an error, or None where it says what it is itself.

    Args:
        error: that the run ended with.
        config, world, device: of the run.
        patience: seconds that processes wait for each other.
        path: of the run directory.
        doing: what it was at.
        last: which checkpoint there is, in words.
        case: says what it needs, for what it could do without memory.
    """
    if isinstance(error, (OSError, SafetensorError)):
        if isinstance(error, OSError) and error.errno not in _DISK_FULL:
            return None
        return UserError(f"run.dir: {path} could not be written ({error}); {last}")
    if not isinstance(error, RuntimeError):
        return None
    where = f"{doing}; {last}"
    if told := memory_error(error, config, case, device, where):
        return told
    if told := device.explain(error):
        return UserError(f"{told} (while {where})")
    if world.size == 1 or not waited_too_long(error):
        return None
    return TimeoutError(
        f"process {world.rank} waited {patience:g}s (launch.timeout) for the others in vain while {doing}, in "
        f"{collective_of(error)} ({_first_line(error)}); {last}"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
