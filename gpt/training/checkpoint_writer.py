"""Saving checkpoints while training goes on: a snapshot in memory, which a thread then puts on disk.

A checkpoint is written aside, flushed, and renamed last, so a process that is killed at any instant leaves the old ones or the new one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.model.transformer import GPT
from gpt.model.weight_files import DTYPE_NAMES
from gpt.runtime.sharding import is_sharded, reshard
from gpt.training.checkpoint import (
    COMPLETE,
    EMA,
    MANIFEST,
    OPTIMIZER,
    REPLACED,
    STATE,
    WEIGHTS,
    TrainingState,
    checkpoint_name,
    digest,
    find_damage,
    list_checkpoints,
    model_tensors,
    optimizer_tensors,
)
from gpt.training.checkpoint_retention import Retention

_PIECE = 2**20  # bytes that are hashed and written at once, while they are in the processor's cache
_DTYPE_NAMES = {**DTYPE_NAMES, torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


class CheckpointWriter:
    """Saves checkpoints of a run in the background.

    Every process makes one, and all call `save` alike; what is on disk is rank 0's affair, to the others the rest is empty.

    Args:
        directory: the run's checkpoints/ folder.
        retention: which older ones stay.
        is_writer: whether this process is rank 0.
        pins_memory: copy from the device into pinned memory, while it goes on.

    Attributes:
        stall_seconds: that the last `save` took, in which training stood still.
        write_seconds: that the thread took for the last checkpoint on disk.
        saved: the last checkpoint on disk, or None.
    """

    def __init__(self, directory: Path, retention: Retention, is_writer: bool = True, pins_memory: bool = False) -> None:
        self.directory = directory
        self.retention = retention
        self.is_writer = is_writer
        self.pins_memory = pins_memory
        self.stall_seconds = self.write_seconds = 0.0
        self.saved: Path | None = None
        self._files = {name: _Snapshot(is_writer, pins_memory) for name in (WEIGHTS, OPTIMIZER, EMA)}
        self._whole: dict[Path, list[tuple[str, int, int]]] = {}
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._problem: str | None = None

    def save(
        self,
        model: GPT,
        optimizers: Sequence[torch.optim.Optimizer],
        state: TrainingState,
        manifest: dict[str, Any] | None = None,
        ema: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take a snapshot and write it in the background; what follows may change all that was given.

        All processes call it together: each DTensor is gathered, in the same order everywhere, and rank 0 keeps it. Other tensors are taken
        as rank 0 has them. Waits for an earlier checkpoint that is still being written.

        Args:
            model, optimizers, state: what to save.
            manifest: what the weights were trained on, kept beside them.
            ema: the moving average of the weights (`WeightAverage.tensors`).
        """
        started = time.perf_counter()
        self._join()
        reshard(model)
        weights = model_tensors(model)
        contents = {WEIGHTS: weights, OPTIMIZER: optimizer_tensors(model, optimizers)}
        if ema is not None:
            contents[EMA] = dict(ema)
        for name, tensors in contents.items():
            self._files[name].take(tensors)
        if self.is_writer:
            copied = record_event(next(iter(weights.values()))) if self.pins_memory else None
            texts = {STATE: json.dumps(asdict(state), indent=1)}
            if manifest is not None:
                texts[MANIFEST] = json.dumps(manifest, indent=1, ensure_ascii=False)
            work = (state.step, list(contents), texts, state.best_step, copied, dict(state.frozen))
            self._failure = None
            self._thread = threading.Thread(target=self._work, args=work, name="checkpoint")  # no daemon: an exit waits for it
            try:
                self._thread.start()
            except RuntimeError:  # no more threads: the interpreter is shutting down
                self._thread = None
                self._work(*work)
        self.stall_seconds = time.perf_counter() - started

    def problem(self) -> str | None:
        """What went wrong in the background since this was last asked, or None. Does not wait."""
        problem, self._problem = self._problem, None
        return problem

    def wait(self) -> None:
        """Return when the last checkpoint is on disk.

        Raises:
            OSError: it could not be written (disk full, not writable); earlier ones are as they were.
        """
        self._join()
        failure, self._failure = self._failure, None
        if failure is not None:
            self._problem = None
            raise failure

    def close(self) -> None:
        """Wait until nothing is being written any more; what went wrong is left for `problem`."""
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _work(
        self, step: int, names: list[str], texts: dict[str, str], best_step: int | None, copied: torch.Event | None, frozen: dict[str, str]
    ) -> None:
        started = time.perf_counter()
        try:
            if copied is not None:
                copied.synchronize()
            weights = self._files[WEIGHTS].tensors()
            changed = [name for name, expected in frozen.items() if digest(weights[name]) != expected]
            assert not changed, f"{changed[0]} is frozen, and yet has changed"
            contents = {name: self._files[name].contents() for name in names}
            contents |= {name: [memoryview(text.encode())] for name, text in texts.items()}
            path = write_checkpoint(self.directory, step, contents)
        except Exception as error:  # told in the thread that trains
            self._failure = error
            self._problem = f"the checkpoint of step {step} could not be written ({error})"
            return
        self.saved, self.write_seconds = path, time.perf_counter() - started
        try:
            self._whole[path] = _stamp(path)
            self._remove_superseded(step, best_step)
        except OSError as error:
            self._problem = f"checkpoints before that of step {step} could not be removed ({error})"

    def _remove_superseded(self, saved: int, best_step: int | None) -> None:
        found = dict(list_checkpoints(self.directory))
        whole = {step: _validation_loss(path) for step, path in found.items() if self._is_whole(path)}
        for step in self.retention.superseded(whole, found.keys() - whole.keys(), saved, best_step):
            self._whole.pop(found[step], None)
            remove_checkpoint(found[step])

    def _is_whole(self, path: Path) -> bool:
        """As `find_damage`, but files that were whole and have not been touched since are not read again."""
        if (stamp := _stamp(path)) != self._whole.get(path):
            if find_damage(path):
                return False
            self._whole[path] = stamp
        return True


def write_checkpoint(directory: Path, step: int, contents: Mapping[str, Sequence[memoryview]]) -> Path:
    """Write a checkpoint's files aside and put it in its place, instead of one of the same step.

    Args:
        directory: the run's checkpoints/ folder; what a process that was killed left unfinished in it is removed.
        step: the checkpoint's.
        contents: name of each file -> its bytes, in pieces.

    Raises:
        OSError: it could not be written; nothing is left of it.
    """
    path = directory / checkpoint_name(step)
    aside = directory / f".{path.name}.new"
    directory.mkdir(parents=True, exist_ok=True)
    _clear(directory)
    try:
        (aside / OPTIMIZER).parent.mkdir(parents=True)
        listed = {name: _write(aside / name, pieces) for name, pieces in contents.items()}
        _write(aside / COMPLETE, [memoryview(json.dumps(listed, indent=1).encode())])
        for folder in ((aside / OPTIMIZER).parent, aside):
            _flush(folder)
        replaced = directory / f".{path.name}{REPLACED}"
        if path.exists():
            path.rename(replaced)  # list_checkpoints knows it by this name until the new one is there
        aside.rename(path)
        _flush(directory)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, at once: a process that is killed meanwhile leaves it whole or nothing of that name."""
    going = path.with_name(f".{path.name}.old")
    path.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def record_event(tensor: Tensor) -> torch.Event:
    """An event that happens when what was queued on the tensor's device until now is done."""
    event = torch.Event(tensor.device)
    event.record()
    return event


class _Snapshot:
    """A copy of tensors in host memory, laid out as a safetensors file has them.

    The memory is kept from one copy to the next, for to allocate it anew would take longer than to fill it. (safetensors' own writer
    would need the tensors as they are, and hold Python's lock while it writes.)

    Args:
        keeps: whether this process keeps the copy, or takes part in gathering only.
        pin: whether the memory is pinned, and copies into it are queued.
    """

    def __init__(self, keeps: bool, pin: bool) -> None:
        self.keeps = keeps
        self.pin = pin
        self._layout: dict[str, tuple[torch.dtype, torch.Size]] | None = None
        self._header = b""
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._parts: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy; DTensors are gathered by all processes together. Into pinned memory the copy is only queued."""
        layout = {name: (t.dtype, t.shape) for name, t in tensors.items()}
        if self.keeps and layout != self._layout:
            self._lay_out(layout)
        for name, tensor in tensors.items():
            whole = (tensor.full_tensor() if is_sharded(tensor) else tensor).detach()
            if not self.keeps:
                continue
            if whole.is_cpu:
                # By this thread alone: torch would divide each copy among its threads, and to wait for them takes longer on a busy machine.
                self._parts[name].view(torch.uint8).numpy()[:] = whole.contiguous().view(-1).view(torch.uint8).numpy()
            else:
                self._parts[name].copy_(whole.reshape(-1), non_blocking=self.pin)

    def tensors(self) -> Mapping[str, Tensor]:
        """The copies, flat, by name."""
        return self._parts

    def contents(self) -> list[memoryview]:
        """The file's bytes."""
        return [memoryview(self._header), self._memory.numpy().data]

    def _lay_out(self, layout: dict[str, tuple[torch.dtype, torch.Size]]) -> None:
        """The format is described at https://github.com/huggingface/safetensors#format: header size, header, tensors without gaps."""
        header: dict[str, Any] = {}
        end = 0
        for name, (dtype, shape) in sorted(layout.items(), key=lambda item: -item[1][0].itemsize):  # so that each lies aligned
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = struct.pack("<Q", len(text)) + text
        self._memory = torch.empty(end, dtype=torch.uint8, pin_memory=self.pin)
        self._parts = {name: self._memory[slice(*header[name]["data_offsets"])].view(dtype) for name, (dtype, _) in layout.items()}
        self._layout = layout


def _clear(directory: Path) -> None:
    """Remove what killed processes left; a checkpoint whose successor did not come gets its name back."""
    for step, path in list_checkpoints(directory):
        if path.name != checkpoint_name(step):
            path.rename(directory / checkpoint_name(step))
    for left in directory.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def _write(file: Path, pieces: Sequence[memoryview]) -> dict[str, Any]:
    """Write a file, make sure that it has reached the disk, and return its entry in COMPLETE."""
    digest = hashlib.sha256()
    size = 0
    with file.open("wb", buffering=0) as opened:
        for piece in pieces:
            for start in range(0, len(piece), _PIECE):
                part = piece[start : start + _PIECE]
                digest.update(part)
                while part:
                    written = opened.write(part)
                    size, part = size + written, part[written:]
        os.fsync(opened.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _flush(folder: Path) -> None:
    """Make sure that a folder's names have reached the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a checkpoint's files: what changes when they are touched."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return [(file.relative_to(path).as_posix(), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]


def _validation_loss(path: Path) -> float | None:
    """The loss on held-out text at the step of a checkpoint, if it was measured then."""
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    return state.get("val_loss") if state.get("validated_step") == state["step"] else None
