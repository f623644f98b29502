"""Checkpoints: written aside, flushed, renamed last; read only if whole.

    checkpoints/step-00001000/model.safetensors  optimizer/state.safetensors  state.json  data_manifest.json  COMPLETE

COMPLETE lists every file with its size and SHA-256, so a checkpoint that was cut short or damaged is known as such and the
newest whole one is used. No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpt.errors import UserError
from gpt.model.transformer import GPT

MANIFEST = "data_manifest.json"
_NAME = re.compile(r"step-(\d{8})$")


@dataclass
class TrainingState:
    """Where a run stands; with the weights and the optimizer's state, all that is needed to go on."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Targets seen."""
    seconds: float = 0.0
    """Spent training, over all its processes."""
    best_val_loss: float | None = None
    best_step: int | None = None
    validated_step: int = 0
    """The last step that was validated."""
    skipped_steps: int = 0
    """Steps left out because loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    interval_loss: float = 0.0
    """Sum of the losses since the last line of metrics."""
    interval_steps: int = 0
    corpus: str = ""
    """Fingerprint of the data."""
    stream: dict[str, Any] | None = None
    """Where a source that is read as it comes stands."""


def save_checkpoint(
    directory: Path,
    model: GPT,
    optimizers: Sequence[torch.optim.Optimizer],
    state: TrainingState,
    keep_last: int,
    manifest: dict[str, Any] | None = None,
) -> Path:
    """Save a checkpoint, then remove old ones beyond the newest `keep_last` and the best.

    Args:
        directory: the run's checkpoints/ folder.
        model, optimizers, state: what to save.
        keep_last: how many to keep.
        manifest: what the weights were trained on, kept beside them.

    Raises:
        OSError: it could not be written (disk full, not writable); earlier checkpoints are as they were.
    """
    path = directory / f"step-{state.step:08d}"
    aside = directory / f".{path.name}.{os.getpid()}"
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.glob(".step-*"):  # of a process that was killed while writing
        shutil.rmtree(left, ignore_errors=True)
    try:
        (aside / "optimizer").mkdir(parents=True)
        save_file(model_tensors(model), aside / "model.safetensors")
        save_file(_optimizer_tensors(model, optimizers), aside / "optimizer" / "state.safetensors")
        (aside / "state.json").write_text(json.dumps(asdict(state), indent=1))
        if manifest is not None:
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
        files = sorted(p for p in aside.rglob("*") if p.is_file())
        contents = {p.relative_to(aside).as_posix(): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
        (aside / "COMPLETE").write_text(json.dumps(contents, indent=1))
        for file in (*files, aside / "COMPLETE", aside / "optimizer", aside):
            _flush(file)
        if path.exists():
            shutil.rmtree(path)
        os.replace(aside, path)
        _flush(directory)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    found = list_checkpoints(directory)
    for step, old in found[: -keep_last or None]:
        if step != state.best_step:
            shutil.rmtree(old, ignore_errors=True)
    return path


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint folder, oldest first, whole or not."""
    if not directory.is_dir():
        return []
    return sorted((int(match[1]), path) for path in directory.iterdir() if (match := _NAME.match(path.name)))


def newest_whole(directory: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; those that are not are named through `say`."""
    for _, path in reversed(list_checkpoints(directory)):
        if (damage := find_damage(path)) is None:
            return path
        say(f"checkpoint {path} is not whole ({damage}); looking for the one before it")
    return None


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        contents: dict[str, Any] = json.loads((path / "COMPLETE").read_text())
    except (OSError, ValueError):
        return "COMPLETE is missing or unreadable"
    for name, expected in contents.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else -1
        if size != expected["bytes"]:
            return f"{name} has {size} bytes, not {expected['bytes']}" if size >= 0 else f"{name} is missing"
        if _sha256(file) != expected["sha256"]:
            return f"{name} is damaged"
    return None


def load_checkpoint(path: Path, model: GPT, optimizers: Sequence[torch.optim.Optimizer]) -> TrainingState:
    """Load weights and optimizer state in place and return where the run stood.

    Raises:
        UserError: the checkpoint is of another model or optimizer.
    """
    load_weights(path, model)
    stored = load_file(path / "optimizer" / "state.safetensors")
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                prefix = f"{names[p]}|"
                found = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
                if found:
                    optimizer.state[p] = {k: v.to(p.device) for k, v in found.items()}
    return TrainingState(**json.loads((path / "state.json").read_text()))


def load_weights(path: Path, model: GPT) -> None:
    """Load a checkpoint's weights into a model of the same config.

    Raises:
        UserError: names or shapes differ.
    """
    tensors = load_file(path / "model.safetensors")
    own = model_tensors(model)
    differing = sorted(own.keys() ^ tensors.keys()) or [n for n in own if own[n].shape != tensors[n].shape]
    if differing:
        raise UserError(f"{path} holds another model than the config describes: {differing[0]} differs")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter once, by name; a tied head is left out."""
    return {name: p.detach() for name, p in model.named_parameters()}


def _optimizer_tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """`<parameter>|<state>` -> tensor."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for optimizer in optimizers:
        for p, states in optimizer.state.items():
            found |= {f"{names[p]}|{key}": value for key, value in states.items()}
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Make sure a file or folder has reached the disk before the rename that makes it count."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
