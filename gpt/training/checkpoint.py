"""Checkpoints: what they hold, which there are, whether one is whole, and how a run goes on from one.

    checkpoints/step-00001000/model.safetensors  optimizer/state.safetensors  [ema.safetensors]  state.json  data_manifest.json  COMPLETE

Tensors are whole and go by their parameter's name, however many processes shared them, so a run may go on in another layout.
COMPLETE lists every file with its size and SHA-256, so a checkpoint that was cut short or damaged is known as such and the
newest whole one is used. `checkpoint_writer` writes them. No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gpt.errors import UserError
from gpt.model.transformer import GPT
from gpt.model.weight_files import TensorHeader, read_tensors
from gpt.runtime.sharding import is_sharded, local_part, part_of, reshard

WEIGHTS, OPTIMIZER, EMA = "model.safetensors", "optimizer/state.safetensors", "ema.safetensors"
STATE, MANIFEST, COMPLETE = "state.json", "data_manifest.json", "COMPLETE"
REPLACED = ".replaced"
_NAME = re.compile(r"step-(\d{8,})$|\.step-(\d{8,})\.replaced$")


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
    val_loss: float | None = None
    """Loss of that validation."""
    batch: int = 0
    """Batches drawn: one for each step done, and for each that was undone after a loss spike."""
    skipped_steps: int = 0
    """Steps left out because loss or gradient was not finite, or the loss a spike."""
    skipped_in_a_row: int = 0
    spikes: int = 0
    """Steps whose loss was a spike."""
    rewinds: int = 0
    """How often the run went back to a checkpoint after a spike."""
    loss_mean: float = 0.0
    """Moving average of the loss, by which a spike is told."""
    loss_variance: float = 0.0
    losses: int = 0
    """That are in the two."""
    interval_loss: float = 0.0
    """Sum of the losses since the last line of metrics."""
    interval_steps: int = 0
    corpus: str = ""
    """Fingerprint of the data."""
    stream: dict[str, Any] | None = None
    """Where a source that is read as it comes stands."""
    unfrozen: list[list[float]] = field(default_factory=list)
    """Of each stage of `unfreeze` that has begun, after how many steps and which share of the run."""
    frozen: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each parameter that does not train: what every checkpoint is held to."""


def checkpoint_name(step: int) -> str:
    """Of the folder that holds the checkpoint of a step."""
    return f"step-{step:08d}"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint folder, oldest first, whole or not."""
    if not directory.is_dir():
        return []
    found: dict[int, Path] = {}
    for path in directory.iterdir():
        if match := _NAME.match(path.name):
            # One whose process was killed while a new checkpoint of the same step took its place counts until that one is there.
            if match[1]:
                found[int(match[1])] = path
            else:
                found.setdefault(int(match[2]), path)
    return sorted(found.items())


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
        contents = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{COMPLETE} is missing or unreadable"
    try:
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in contents.items()}
    except (AttributeError, KeyError, TypeError):
        return f"{COMPLETE} is damaged"
    if missing := {WEIGHTS, OPTIMIZER, STATE} - expected.keys():
        return f"{COMPLETE} does not list {min(missing)}"
    for name, (size, digest) in expected.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else -1
        if found != size:
            return f"{name} has {found} bytes, not {size}" if found >= 0 else f"{name} is missing"
        try:
            if _sha256(file) != digest:
                return f"{name} is damaged"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def read_state(path: Path) -> TrainingState:
    """Where the run stood at a checkpoint; what an older one does not say is at its default.

    Raises:
        UserError: it says what this version does not know.
    """
    stored: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    if unknown := stored.keys() - {f.name for f in fields(TrainingState)}:
        raise UserError(f"{path / STATE} has the field {min(unknown)}, which this version of gpt does not know; use the one that wrote it")
    return TrainingState(**stored)


def load_checkpoint(
    path: Path, model: GPT, optimizers: Sequence[torch.optim.Optimizer], ema: Mapping[str, Tensor] | None = None
) -> TrainingState:
    """Load weights and optimizer state in place and return where the run stood.

    Every process reads the files and takes its own part of each tensor; none waits for another. State that an optimizer does not have
    yet gets the layout of its parameter. State of parameters that no longer train is left out.

    Args:
        path: of a whole checkpoint, the same for all processes.
        model, optimizers: as they will train.
        ema: the moving average of the weights (`WeightAverage.tensors`), to load too.

    Raises:
        UserError: the checkpoint is of another model or optimizer.
    """
    reshard(model)
    weights = model_tensors(model)
    _load(path / WEIGHTS, weights)
    if ema is not None:
        _load(path / EMA, ema)
    _load_optimizers(path / OPTIMIZER, model, optimizers)
    return read_state(path)


def load_weights(path: Path, model: GPT) -> None:
    """Load the weights to use into a model of the same config: the moving average where the checkpoint has one, else those trained.

    Raises:
        UserError: names or shapes differ.
    """
    reshard(model)
    weights = model_tensors(model)
    _load(path / WEIGHTS, weights)
    if (path / EMA).is_file():  # of what trains, and the number of updates
        averages = {header.name: header for header in _headers(path / EMA) if header.name in weights}
        for header, tensor in read_tensors(averages.values()):
            _fill(weights[header.name], tensor)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter once, by name; a tied head is left out."""
    return {name: p.detach() for name, p in model.named_parameters()}


def digest(tensor: Tensor) -> str:
    """SHA-256 of a whole tensor's bytes, on the CPU."""
    return hashlib.sha256(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def optimizer_tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """`<parameter>|<state>` -> tensor, in an order that is the same in every process."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for optimizer, _, p in _trained(optimizers):
        for key, value in sorted(optimizer.state.get(p, {}).items()):
            assert isinstance(value, Tensor), f"{type(optimizer).__name__} keeps {key} as a {type(value).__name__}"
            found[f"{names[p]}|{key}"] = value
    return found


def _trained(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[tuple[torch.optim.Optimizer, dict[str, Any], Tensor]]:
    """Every parameter that an optimizer updates, with its group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                yield optimizer, group, p


def _load(file: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill tensors from a file that holds just these."""
    headers = {header.name: header for header in _headers(file)}
    differing = sorted(targets.keys() ^ headers.keys()) or [n for n, t in targets.items() if tuple(t.shape) != headers[n].shape]
    if differing:
        raise UserError(f"{file.parent} holds another model than the config describes: {differing[0]} differs")
    for header, tensor in read_tensors(headers.values()):
        _fill(targets[header.name], tensor)


def _load_optimizers(file: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Give every optimizer exactly the state that the file has of its parameters."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    stored: dict[Tensor, dict[str, TensorHeader]] = {p: {} for p in parameters.values()}
    for header in _headers(file):
        name, _, key = header.name.rpartition("|")
        if name not in parameters:
            raise UserError(f"{file.parent.parent} holds another model than the config describes: {name} differs")
        stored[parameters[name]][key] = header
    for optimizer, group, p in _trained(optimizers):
        states = optimizer.state[p] if stored[p] else optimizer.state.pop(p, {})
        for key in states.keys() - stored[p].keys():
            del states[key]
        for header, tensor in read_tensors(stored[p].values()):
            key = header.name.rpartition("|")[2]
            if key not in states:
                states[key] = _new_state(p, group, tensor)
            elif states[key].shape != tensor.shape:
                raise UserError(f"{file.parent.parent} holds another optimizer's state than the config describes: {header.name} differs")
            _fill(states[key], tensor)


def _new_state(p: Tensor, group: Mapping[str, Any], like: Tensor) -> Tensor:
    """Room for a state of a parameter: one of its shape gets its layout; a count of steps lies where torch's optimizers want it."""
    if like.shape == p.shape:
        return torch.empty_like(p, dtype=like.dtype, requires_grad=False)
    on_device = like.dim() or group.get("fused") or group.get("capturable")
    return torch.empty_like(like, device=p.device if on_device else "cpu")


def _fill(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, or of it the part that this process holds."""
    with torch.no_grad():
        local_part(target).copy_(part_of(whole, target) if is_sharded(target) else whole)


def _headers(file: Path) -> list[TensorHeader]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return [TensorHeader(file, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()]
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}); use another checkpoint of the run") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
