"""Run directories as the trainer leaves them, without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from gpt.config import RunConfig


def write_run(
    directory: Path,
    step: int = 40,
    *,
    budget: str = "40steps",
    best: float = 2.0,
    finished: bool | None = None,
    started: str = "2026-11-20T10:00:00+00:00",
    **settings: Any,
) -> Path:
    """A run whose newest line is of `step`; `finished` adds the model (None: if the budget of 40 steps is spent).

    Validation at every 20th step: `best` at step 20, worse after that. `settings` are dotted keys with __ for the dot.
    """
    config = RunConfig().to_dict()
    config["run"] = {"id": directory.name, "dir": str(directory.parent)}
    config["train"]["budget"] = budget
    for key, value in settings.items():
        section, _, name = key.rpartition("__")
        (config[section] if section else config)[name] = value
    directory.mkdir(parents=True)
    (directory / ".lock").touch()
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (directory / "environment.json").write_text(json.dumps({"started": started}))
    lines: list[dict[str, Any]] = []
    for number in range(2, step + 1, 2):
        counters = {"step": number, "tokens": number * 4096, "seconds": number / 4}
        loss = {"epoch": number / 10, "loss": best + 5 * math.exp(-number / 10), "lr": 0.01, "grad_norm": 1.0}
        lines.append({**counters, **loss, "tokens_per_second": 16384.0, "mfu": None, "skipped_steps": 0})
        if number % 20 == 0:
            lines.append({**counters, "val_loss": best + (number - 20) / 100, "val_bpb": (best + (number - 20) / 100) / 2})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint = directory / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": step, "tokens": step * 4096, "seconds": step / 4 + 0.5}))
    if finished if finished is not None else step >= 40:
        (directory / "model").mkdir()
        (directory / "model" / "config.json").write_text("{}")
    return directory
