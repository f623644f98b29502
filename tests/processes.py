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

from torch.distributed import TCPStore

IMPORTED = [
    "gpt.cli", "gpt.launch", "gpt.training.trainer", "hydra", "matplotlib.figure", "torch._dynamo", "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel", "transformers",
]  # fmt: skip


class Forked:
    """A module's function in a process of its own, with the names of `subprocess.Popen`. What it says goes to the end of a file."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, log: Path, environment: Mapping[str, str] | None = None) -> None:
        multiprocessing.set_forkserver_preload(IMPORTED)
        given = (function, arguments, {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}, log)
        self.log = log
        self._process = multiprocessing.get_context("forkserver").Process(target=_work, args=given, daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

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


def gpt(arguments: list[str], before: Callable[[], None] | None = None) -> None:
    """`gpt <arguments>`, after what `before` changes in its process."""
    from gpt.cli import run

    if before is not None:
        before()
    sys.argv = ["gpt", *arguments]
    run()


def run_together(function: Callable[..., None], *arguments: Any, processes: int, log: Path, seconds: float = 240) -> None:
    """Call a function in processes that find in their environment what torchrun would say, until all have ended well."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True"} for rank in range(processes)]
    started = [Forked(function, *arguments, log=log, environment=world | rank) for rank in ranks]
    deadline = time.monotonic() + seconds
    try:
        while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
            assert time.monotonic() < deadline, f"not done after {seconds} seconds: {log.read_text()[-4000:]}"
            time.sleep(0.02)
        assert [process.poll() for process in started] == [0] * processes, log.read_text()[-4000:]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
