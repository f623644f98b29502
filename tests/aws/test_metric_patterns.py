"""What a run prints in a job is what the metric definitions read: lines on a stream that is no terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.aws.training_job import METRICS
from gpt.training.metrics import read_metrics
from gpt.training.progress import Progress


def read(text: str) -> dict[str, list[float]]:
    """The metrics as CloudWatch finds them: the first group of each pattern, in each line, as a number."""
    lines = text.splitlines()
    return {name: [float(found[1]) for line in lines if (found := re.search(pattern, line))] for name, pattern in METRICS.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[str, Path]:
    """What a short run writes to its log, as a job's rank 0 does; and its folder."""
    folder = tmp_path_factory.mktemp("job")
    settings = f"debug=golden data=text data.paths=[{corpus}] run.id=r train.budget=20steps train.eval_every=10"
    done = subprocess.run(
        [sys.executable, "-m", "gpt", "pretrain", *settings.split(), f"run.dir={folder}", f"data.cache_dir={folder}/cache"],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"SM_CURRENT_HOST": "algo-1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout, folder / "r"


def test_a_runs_own_lines_are_read(run):
    log, folder = run
    found = read(log)
    lines = list(read_metrics(folder / "metrics.jsonl"))
    last = [line for line in lines if "loss" in line][-1]
    assert found["train:loss"][-1] == pytest.approx(last["loss"], abs=6e-4)
    assert found["train:tokens_per_second"][-1] == pytest.approx(last["tokens_per_second"], abs=0.6)
    validations = [line for line in lines if "val_loss" in line]
    assert found["validation:loss"][-1] in [pytest.approx(line["val_loss"], abs=6e-4) for line in validations]
    assert found["validation:bits_per_byte"][-1] in [pytest.approx(line["val_bpb"], abs=6e-4) for line in validations]
    assert found["final:best_validation_loss"] == [pytest.approx(min(line["val_loss"] for line in validations), abs=6e-4)]
    (final,) = found["final:bits_per_byte"]
    assert f"{final:.3f} bits per byte" in log


def test_large_numbers_and_what_only_some_runs_have(monkeypatch, capsys):
    monkeypatch.setenv("SM_CURRENT_HOST", "algo-1")
    with Progress(1200, timed=False) as progress:
        progress.validated({"val_loss": 3.333, "val_accuracy": 0.912})
        progress.update({"step": 1200, "loss": 3.21, "tokens": 4096, "tokens_per_second": 1234567.0, "mfu": 0.413, "seconds": 120})
    found = read(capsys.readouterr().err)
    assert {name: values for name, values in found.items() if values} == {
        "train:loss": [3.21], "train:tokens_per_second": [1234567.0], "train:mfu_percent": [41.3],
        "validation:loss": [3.333], "validation:accuracy": [0.912],
    }  # fmt: skip


def test_a_text_that_is_generated_is_no_metric():
    assert not any(read("the loss 3.2 of step 4\nvalidation loss\nheld-out tokens/s 5").values())
