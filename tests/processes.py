"""Processes that are forked from one that has imported what runs need: a new Python takes seconds for that."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
from torch.distributed import TCPStore

IMPORTED = [
    "gpt.cli", "gpt.launch", "gpt.training.trainer", "hydra", "matplotlib.figure", "torch._dynamo", "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel", "transformers",
]  # fmt: skip
STANDSTILL = 60.0  # seconds in which processes together use less than one of a core


class Forked:
    """A module's function in a process of its own, with the names of `subprocess.Popen`. What it says goes to the end of a file."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, log: Path, environment: Mapping[str, str] | None = None) -> None:
        multiprocessing.set_forkserver_preload(IMPORTED)
        given = (function, arguments, {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}, log)
        self.log = log
        self._process = multiprocessing.get_context("forkserver").Process(target=_work, args=given, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0, self.log.read_bytes())
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        """Wait for its end; all that it said stands in the place of stderr."""
        self.wait(timeout)
        return None, self.log.read_text(encoding="utf-8")


def _work(function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], log: Path) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    function(*arguments)


def processor_seconds(process: int) -> float:
    """What a process has used of the cores so far; 0 where there is none of this number."""
    try:
        times = psutil.Process(process).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system


def seconds_to_end(process: Forked | subprocess.Popen[str], number: int) -> float:
    """Send a process a signal: the seconds until it has ended, or those of a core where it shares that with others. Waits 120."""
    started, used, worked = time.monotonic(), processor_seconds(process.pid), 0.0
    process.send_signal(number)
    while process.poll() is None and time.monotonic() < started + 120:
        worked = max(worked, processor_seconds(process.pid) - used)
        time.sleep(0.02)
    return min(time.monotonic() - started, worked)


def gpt(arguments: list[str], before: Callable[[], None] | None = None) -> None:
    """`gpt <arguments>`, after what `before` changes in its process."""
    from gpt.cli import run

    if before is not None:
        before()
    sys.argv = ["gpt", *arguments]
    run()


def run_together(function: Callable[..., None], *arguments: Any, processes: int, log: Path) -> None:
    """Call a function in processes that find in their environment what torchrun would say, until all have ended well.

    They may take long where they share their cores with others, but not stand still: that is a failure after STANDSTILL seconds.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True"} for rank in range(processes)]
    started = [Forked(function, *arguments, log=log, environment=world | rank) for rank in ranks]
    used, since = 0.0, time.monotonic()
    try:
        while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
            if abs((now := sum(processor_seconds(process.pid) for process in started)) - used) > 1:
                used, since = now, time.monotonic()
            assert time.monotonic() < since + STANDSTILL, f"they stand still: {log.read_text()[-4000:]}"
            time.sleep(0.02)
        assert [process.poll() for process in started] == [0] * processes, log.read_text()[-4000:]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
