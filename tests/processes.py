"""Functions in processes of their own, forked from one that has imported what runs need: each would take seconds for it."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing
from torch.distributed import TCPStore

IMPORTED = [
    "gpt.training.trainer", "hydra", "matplotlib.figure", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel",
    "transformers",
]  # fmt: skip


def run(function: Callable[..., None], arguments: tuple[Any, ...], processes: int, log: Path, seconds: float = 240) -> None:
    """Call a module's function in processes that find in their environment what torchrun would say; who is left after `seconds` is ended.

    Args:
        log: a new file, of what they say.
    """
    multiprocessing.set_forkserver_preload(IMPORTED)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    environment = {**os.environ, **world, "OMP_NUM_THREADS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    given = (function, arguments, environment, log)
    context = torch.multiprocessing.start_processes(_work, given, nprocs=processes, join=False, start_method="forkserver")
    assert context is not None
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"not done after {seconds} seconds: {log.read_text()[-4000:]}"
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def _work(rank: int, function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str], log: Path) -> None:
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    function(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
