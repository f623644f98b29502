"""Trains a config undisturbed, then again and again in processes that are killed at random instants, every other one
within a checkpoint, each going on where the last one was.

`killed_runs.py <config file> <kills>`. Everything is imported once and every process is a fork, so that a start takes little. A run that
comes to its end is compared with the undisturbed one, file by file, and another is begun, until there were so many kills. Prints, as JSON,
how many `kills`, `runs` and `unfinished` checkpoints left behind there were.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401  as the next two: what a run imports when it comes to it
import torch
import torch._dynamo
from transformers import PreTrainedTokenizerFast  # noqa: F401

from gpt.compose import load_config
from gpt.config import RunConfig
from gpt.training.checkpoint import list_checkpoints, read_state
from gpt.training.metrics import read_metrics
from gpt.training.trainer import Trainer

ALLOWED_SECONDS = 60.0  # of one run


def start(config: RunConfig, run_id: str) -> int:
    """The id of a process that trains."""
    child = os.fork()
    if child:
        return child
    config.run.id = run_id
    code = 1
    try:
        log = os.open(Path(config.run.dir) / f"{run_id}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        code = Trainer(config).fit().exit_code
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended_within(child: int, seconds: float, aim: Path | None = None) -> bool:
    """Whether a process ends by itself in time, and well; else it is killed, with `aim` not before something is being written there."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or not (aim is None or unfinished(aim)):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"a run ended with status {status}"
            return True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def unfinished(run: Path) -> bool:
    """Whether something was being written to checkpoints/."""
    folder = run / "checkpoints"
    return folder.is_dir() and any(path.name.startswith(".step-") for path in folder.iterdir())


def outcome(run: Path) -> dict[str, object]:
    """Everything about a run that has ended but its times."""
    newest = list_checkpoints(run / "checkpoints")[-1][1]
    files = [*newest.rglob("*.safetensors"), *(run / "model").rglob("*.safetensors")]
    found: dict[str, object] = {path.relative_to(run).as_posix(): path.read_bytes() for path in files}
    assert len(found) >= 3
    for key in ("loss", "val_loss", "lr", "grad_norm", "tokens"):
        found[key] = [(line["step"], line[key]) for line in read_metrics(run / "metrics.jsonl") if key in line]
    found["state"] = {key: value for key, value in vars(read_state(newest)).items() if key != "seconds"}
    return found


def main(file: Path, kills: int) -> None:
    config = load_config(file)
    runs, chance = Path(config.run.dir), random.Random(0)
    runs.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    assert ended_within(start(config, "undisturbed"), ALLOWED_SECONDS)
    duration, wanted = time.monotonic() - began, outcome(runs / "undisturbed")
    counts = {"kills": 0, "runs": 0, "unfinished": 0}
    while counts["kills"] < kills:
        run = runs / f"killed-{counts['runs']}"
        while True:
            more = counts["kills"] < kills
            aim = run if more and counts["kills"] % 2 else None  # every other kill comes while a checkpoint is being written
            if ended_within(start(config, run.name), chance.uniform(0, duration / 2) if more else ALLOWED_SECONDS, aim):
                break
            assert more, f"{run} does not end"
            counts["kills"] += 1
            counts["unfinished"] += unfinished(run)
        found = outcome(run)
        assert found.keys() == wanted.keys(), run
        for key in wanted:
            assert found[key] == wanted[key], f"{key} of {run} is not that of the run that was not killed"
        counts["runs"] += 1
        shutil.rmtree(run)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
