"""Python, the disk that runs are written to, and the limits of this system."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

from gpt.commands import DoctorConfig
from gpt.doctor.result import Result, gib, nearest_folder

OLDEST_PYTHON = (3, 11)
_MIB = 1 << 20
_WRITTEN = 64 * _MIB  # to measure the disk's speed
_SECONDS = 3.0  # that writing may take
_LEAST_FREE, _PLENTY_FREE = 1 << 30, 10 << 30  # bytes; a checkpoint of 124M parameters with its optimizer has 1.5e9
_SLOW_DISK = 50e6  # bytes a second
_LEAST_SHARED = 1 << 30
_LEAST_FILES, _LEAST_TASKS = 1024, 1024
SHARED_MEMORY = Path("/dev/shm")
TASK_LIMIT = Path("/sys/fs/cgroup/pids.max")


def python(config: DoctorConfig) -> Result:
    """Whether this Python is new enough."""
    found = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return Result("problem", f"{found}; {oldest} or newer is needed", f"python{oldest} -m venv .venv, and install there")
    return Result("ok", found)


def run_directory(config: DoctorConfig) -> Result:
    """Room and speed of the folder that runs are written to, or of the one in which it would be made; leaves nothing there."""
    path = Path(os.path.expanduser(config.run_dir))
    elsewhere = "give runs another folder: run.dir=<folder>"
    try:
        folder = nearest_folder(path)
        free = shutil.disk_usage(folder).free
        speed = _write_speed(folder, min(_WRITTEN, free // 4))
    except OSError as error:
        return Result("problem", f"{config.run_dir} cannot be written to: {error.strerror}", elsewhere)
    found = f"{config.run_dir}: {gib(free)} free, writes {speed / 1e6:.0f} MB/s"
    if free < _LEAST_FREE:
        return Result("problem", found, f"delete old runs (gpt runs shows their sizes), or {elsewhere}")
    if free < _PLENTY_FREE:
        return Result("warning", found, f"delete old runs (gpt runs shows their sizes), {elsewhere}, or keep less: checkpoint.keep_last=1")
    if speed < _SLOW_DISK:
        return Result("warning", f"{found}, slow for checkpoints", f"{elsewhere} on a local disk; or checkpoint.every=30min")
    return Result("ok", found)


def _write_speed(folder: Path, size: int) -> float:
    """Bytes a second, of a file that has no name; OSError if it cannot be written."""
    block = os.urandom(4 * _MIB)  # a disk that compresses should not look faster than it is
    with tempfile.TemporaryFile(dir=folder) as file:
        written, started = 0, time.perf_counter()
        while written < max(1, size) and time.perf_counter() - started < _SECONDS:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written += len(block)
        return written / (time.perf_counter() - started)


def shared_memory(config: DoctorConfig) -> Result:
    """The size of /dev/shm, through which processes of one machine (NCCL, data loaders) pass their data; Docker gives 64 MB."""
    if sys.platform != "linux":
        return Result("ok", "n/a: only Linux has it")
    larger = "docker run --shm-size=8g (or --ipc=host); without Docker: sudo mount -o remount,size=8g /dev/shm"
    if not SHARED_MEMORY.is_dir():
        return Result("warning", "there is none; several GPUs may not find each other", "sudo mount -t tmpfs -o size=8g tmpfs /dev/shm")
    size, _, free = shutil.disk_usage(SHARED_MEMORY)
    if size < _LEAST_SHARED:
        return Result("warning", f"{size / _MIB:.0f} MiB, too little for several GPUs", larger)
    if free < _LEAST_SHARED // 4:
        return Result(
            "warning", f"{gib(size)}, only {free / _MIB:.0f} MiB of it free", "remove what ended processes left in it: ls -l /dev/shm"
        )
    return Result("ok", f"{gib(size)}, {gib(free)} free")


def open_files(config: DoctorConfig) -> Result:
    """How many files a process may open."""
    try:
        import resource
    except ImportError:
        return Result("ok", "n/a: this system has no such limit")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_limit(soft, resource.RLIM_INFINITY)} (at most {_limit(hard, resource.RLIM_INFINITY)})"
    if soft != resource.RLIM_INFINITY and soft < _LEAST_FILES:
        within = hard == resource.RLIM_INFINITY or hard >= _LEAST_FILES
        fix = f"ulimit -n {65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)}"
        return Result("warning", found, fix if within else "raise nofile in /etc/security/limits.conf; docker run --ulimit nofile=65536")
    return Result("ok", found)


def process_limit(config: DoctorConfig) -> Result:
    """How many processes and threads the user, and the container, may have."""
    try:
        import resource
    except ImportError:
        return Result("ok", "n/a: this system has no such limit")
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and soft < _LEAST_TASKS:
        return Result("warning", f"{soft} processes and threads of this user", f"ulimit -u {4 * _LEAST_TASKS}")
    container = TASK_LIMIT.read_text().strip() if TASK_LIMIT.is_file() else "max"
    if container != "max" and int(container) < _LEAST_TASKS:
        return Result("warning", f"{container} processes and threads in this container", f"docker run --pids-limit={4 * _LEAST_TASKS}")
    return Result("ok", _limit(soft, resource.RLIM_INFINITY) + (f", {container} in this container" if container != "max" else ""))


def _limit(number: int, unlimited: int) -> str:
    return "unlimited" if number == unlimited else str(number)
