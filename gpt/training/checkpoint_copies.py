"""Checkpoints where several machines share no disk: the main process writes them on its own, and sends copies to who has to read one."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

from gpt.runtime.distributed import World
from gpt.training.checkpoint import COMPLETE, EMA, WEIGHTS, find_damage

TO_USE = (WEIGHTS, EMA)
"""The files that `load_weights` reads."""
_PIECE = 16 << 20  # bytes that are sent at once


@contextlib.contextmanager
def at_hand(checkpoint: Path, world: World, files: Collection[str] | None = None) -> Iterator[Path]:
    """Where this process can read a checkpoint of the main process, until the context ends: in its place, if its machine has the same one
    there, and else in a copy in the folder for temporary files.

    All processes enter together, and leave together where copies were made. A machine that never gets to see the main process's disk must
    not write a copy into its own run directory: both may be synchronised with one place, as the hosts of a SageMaker job are.

    Args:
        checkpoint: whole, on the main process's disk.
        world: the processes.
        files: of it that are needed; None: all.
    """
    if world.size == world.local_size:
        yield checkpoint
        return
    listed = world.share(lambda: (checkpoint / COMPLETE).read_bytes())
    leads = world.local_rank == 0
    lacking = world.gather(leads and not world.is_main and not _is_same(checkpoint, listed))
    receivers = [rank for rank, lacks in enumerate(lacking) if lacks]
    if not receivers:
        yield checkpoint
        return
    group = cast(dist.ProcessGroup, dist.new_group([0, *receivers], backend="gloo"))  # called by all, as torch asks
    folder = Path(tempfile.mkdtemp(prefix="gpt-checkpoint-")) if world.rank in receivers else None
    try:
        if world.is_main or folder is not None:
            sizes = {name: entry["bytes"] for name, entry in json.loads(listed).items() if files is None or name in files}
            for name, size in sizes.items():
                _pass_on(checkpoint / name, folder / name if folder is not None else None, size, group)
        copies = world.gather(folder)
        yield copies[world.rank - world.local_rank] or checkpoint
        world.gather(None)  # nobody of this machine reads any more
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _is_same(checkpoint: Path, listed: bytes) -> bool:
    """Whether a whole checkpoint with these contents lies here."""
    try:
        return (checkpoint / COMPLETE).read_bytes() == listed and find_damage(checkpoint) is None
    except OSError:
        return False


def _pass_on(source: Path, target: Path | None, size: int, group: dist.ProcessGroup) -> None:
    """Send a file of the main process, or write what it sends."""
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") if target is None else target.open("wb") as file:
        for start in range(0, size, _PIECE):
            length = min(_PIECE, size - start)
            piece = torch.empty(length, dtype=torch.uint8)
            if target is None:
                file.readinto(memoryview(piece.numpy()))  # type: ignore[attr-defined]  # of both kinds of file, only this one reads
            dist.broadcast(piece, 0, group)
            if target is not None:
                file.write(piece.numpy().data)
