"""What the files of a run directory say about the run: how far it is, how good, and whether it goes on.

Reads every state that a directory can be in, also damaged ones, and imports nothing heavy: it is asked about hundreds of runs.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gpt.aws.records import has_completed
from gpt.config import Span, parse_span
from gpt.errors import UserError
from gpt.training.charts import is_finite

State = Literal["running", "finished", "interrupted", "not started", "broken"]
MARKS = ("config.yaml", "metrics.jsonl", "checkpoints", ".lock")  # one of them is in every run directory


@dataclass(frozen=True)
class RunRow:
    """A run in figures; None stands for what is not known.

    Its state:
        running: another process, or this one, holds the lock of the directory.
        finished: `model/config.json` is there, or a training job has made it elsewhere (job.json), and the last step was made. Where the
            length of the run is not known in steps, the last step is one that was validated: a run that ends validates, one that is
            interrupted does not.
        interrupted: neither, but some step was made. That it was killed, stopped or ended by an error is not to be told from files.
        not started: neither, and no step was made.
        broken: config.yaml is missing or cannot be read; `problem` says so.
    """

    id: str
    path: Path
    command: str
    state: State
    step: int
    """The last one that is known of."""
    total: int | None
    """Steps of the whole run; estimated where its length is in epochs."""
    best_val_loss: float | None
    best_step: int | None
    val_bpb: float | None
    """Bits per byte at the best validation."""
    last_loss: float | None
    """Of training."""
    seconds: float
    """Of training."""
    tokens: int
    size_bytes: int
    """All files of the directory."""
    started: str
    """In UTC, as ISO 8601: when it was started, or resumed."""
    total_seconds: float | None = None
    """Of the whole run, where its length is a time."""
    problem: str = ""
    """What could not be read."""
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    """As it stands in config.yaml."""


def describe_run(directory: Path) -> RunRow:
    """Read a run directory. Nothing in it is changed, and nothing that is damaged raises."""
    problems: list[str] = []
    config = _read_config(directory / "config.yaml", problems)
    broken = bool(problems)
    validations, last = _read_metrics(directory / "metrics.jsonl", problems)
    saved = _newest_state(directory / "checkpoints", problems)
    step, tokens, seconds = (
        max([0, *(line[key] for line in (*validations[-1:], last, saved) if is_finite(line.get(key)))])
        for key in ("step", "tokens", "seconds")
    )
    best = min(validations, key=lambda line: line["val_loss"], default={})
    best_bpb = best.get("val_bpb")
    total, total_seconds = _length(config, last)
    validated = bool(validations) and validations[-1].get("step") == step
    done = step >= total if total is not None and not _in_epochs(config) else validated
    state: State = (
        "running" if is_locked(directory)
        else "broken" if broken
        else "finished" if done and (os.path.isfile(directory / "model" / "config.json") or has_completed(directory))
        else "interrupted" if step else "not started"
    )  # fmt: skip
    return RunRow(
        id=directory.resolve().name, path=directory, command=str(config.get("command", "")), state=state, step=int(step), total=total,
        best_val_loss=best.get("val_loss"), best_step=best.get("step"), val_bpb=best_bpb if is_finite(best_bpb) else None,
        last_loss=last["loss"] if is_finite(last.get("loss")) else None, seconds=float(seconds), tokens=int(tokens),
        size_bytes=_size(directory), started=_started(directory), total_seconds=total_seconds, config=config,
        problem="" if state == "running" and not config else "; ".join(problems),  # its config comes after its data
    )  # fmt: skip


def is_run(directory: Path) -> bool:
    """Whether a folder is a run directory, whole or not."""
    return any(os.path.exists(directory / mark) for mark in MARKS)  # which takes folders that are not for us to read


def is_locked(directory: Path) -> bool:
    """Whether a process is working in a run directory. The lock is tried shared, for an instant, and its file is never made."""
    import fcntl

    try:
        descriptor = os.open(directory / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return result


def count_parameters(directory: Path) -> int | None:
    """Parameters of a run's model, from the headers of its weight files; None before the first checkpoint."""
    for folder in (directory / "model", *(path for _, path in reversed(_checkpoints(directory / "checkpoints")))):
        try:
            headers = [_safetensors_header(file) for file in folder.glob("model*.safetensors")]
            if headers:
                return sum(math.prod(tensor["shape"]) for header in headers for name, tensor in header.items() if name != "__metadata__")
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return None


def _safetensors_header(file: Path) -> dict[str, Any]:
    """Format: https://huggingface.co/docs/safetensors/index#format."""
    with file.open("rb") as source:
        return json.loads(source.read(int.from_bytes(source.read(8), "little")))


def _read_config(file: Path, problems: list[str]) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.load(file.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the one in C takes a tenth of the time
    except FileNotFoundError:
        problems.append(f"no {file.name}")
        return {}
    except (OSError, ValueError, yaml.YAMLError):
        config = None
    if not isinstance(config, dict):
        problems.append(f"{file.name} cannot be read")
        return {}
    return config


def _read_metrics(file: Path, problems: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The validations, and the last line of training; no other line is parsed, of which a long run has many."""
    try:
        texts = [text for text in file.read_bytes().split(b"\n") if text]
    except OSError:
        return [], {}
    damaged = len({number for number, text in enumerate(texts) if not (text.startswith(b"{") and text.endswith(b"}"))} - {len(texts) - 1})
    validations, training = [], {}
    for text in texts:
        if b'"val_loss"' in text and (line := _json_object(text)) and is_finite(line.get("val_loss")):
            validations.append(line)
    for text in reversed(texts):
        if b'"loss"' in text and (training := _json_object(text)):
            break
    if damaged or (texts and not validations and not training):  # a last line that is cut short is that of a run that was killed
        problems.append(f"{file.name} is damaged")
    return validations, training


def _json_object(text: bytes | str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _checkpoints(directory: Path) -> list[tuple[int, Path]]:
    try:
        found = [(re.fullmatch(r"step-(\d{8})", path.name), path) for path in directory.iterdir()]
    except OSError:
        return []
    return sorted((int(match[1]), path) for match, path in found if match)


def _newest_state(directory: Path, problems: list[str]) -> dict[str, Any]:
    """state.json of the newest checkpoint that has a readable one."""
    damaged: list[str] = []
    found: dict[str, Any] = {}
    for _, path in reversed(_checkpoints(directory)):
        try:
            found = _json_object((path / "state.json").read_bytes())
        except OSError:  # missing, or removed while we look
            found = {}
        if found:
            break
        damaged.append(path.name)
    if damaged:
        problems.append(f"checkpoint{'s' if len(damaged) > 1 else ''} {', '.join(damaged)} without a readable state.json")
    return found


def _budget(config: dict[str, Any]) -> Span | None:
    try:
        return parse_span("train.budget", str(config["train"]["budget"]))
    except (LookupError, TypeError, UserError):
        return None


def _in_epochs(config: dict[str, Any]) -> bool:
    budget = _budget(config)
    return budget is not None and budget.unit == "epochs"


def _length(config: dict[str, Any], last: dict[str, Any]) -> tuple[int | None, float | None]:
    """The run's length in steps and in seconds, as far as they are known."""
    budget = _budget(config)
    if budget is None:
        return None, None
    if budget.unit == "seconds":
        return None, budget.amount
    if budget.unit == "steps":
        return math.ceil(budget.amount), None
    if budget.unit == "tokens":
        batch_tokens = config["train"].get("batch_tokens")
        return math.ceil(budget.amount / batch_tokens) if is_finite(batch_tokens) and batch_tokens > 0 else None, None
    epoch, step = last.get("epoch"), last.get("step")
    if is_finite(epoch) and is_finite(step) and epoch > 0:
        return max(int(step), math.ceil(budget.amount * step / epoch)), None
    return None, None


def _started(directory: Path) -> str:
    try:
        started = _json_object((directory / "environment.json").read_bytes()).get("started")
    except OSError:
        started = None
    if isinstance(started, str):
        return started
    times = [(directory / mark).stat().st_mtime for mark in (*MARKS, ".") if os.path.exists(directory / mark)]
    return datetime.datetime.fromtimestamp(times[0] if times else 0, datetime.UTC).isoformat(timespec="seconds")


def _size(directory: Path) -> int:
    """Bytes of all files below a folder; what goes while we look counts for nothing."""
    total = 0
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    is_folder = entry.is_dir(follow_symlinks=False)
                    total += _size(Path(entry.path)) if is_folder else entry.stat(follow_symlinks=False).st_size
    except OSError:  # gone, or not for us to read
        return total
    return total
