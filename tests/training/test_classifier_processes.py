"""Classifiers in several processes: every layout counts what one process counts, and a head of fewer classes than processes is shared."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt.compose import compose_run
from gpt.config import RunConfig
from gpt.inference.loading import load_model
from gpt.training.metrics import read_metrics
from gpt.training.trainer import Trainer
from tests.training.conftest import settings
from tests.training.finetuning import save_small_model, write_rows
from tests.training.test_classifiers import PEOPLE, THINGS
from tests.training.test_processes import launch

KEYS = ("val_loss", "val_accuracy", "val_macro_f1", "val_span_f1", "tokens")


def validations(run: Path) -> list[list[float]]:
    return [[line[key] for key in KEYS if key in line] for line in read_metrics(run / "metrics.jsonl") if "val_loss" in line]


@pytest.mark.parametrize(
    ("processes", "layouts", "kinds"),
    [
        (2, ["fsdp"], ["words"]),
        pytest.param(2, ["ddp", "fsdp"], ["texts", "words"], marks=pytest.mark.slow),
        pytest.param(3, ["ddp", "fsdp"], ["texts", "words"], marks=pytest.mark.slow),
    ],
)
def test_every_layout_counts_what_one_process_counts(tmp_path, cache_dir, monkeypatch, processes, layouts, kinds):
    monkeypatch.setattr("gpt.training.results.write_report", lambda directory, *_: directory / "report.html")
    model = save_small_model(tmp_path / "model")
    rows = {"texts": [row for row in THINGS if row["label"] != "tool"], "words": PEOPLE}
    files = {name: write_rows(tmp_path / f"{name}.jsonl", rows[name]) for name in kinds}

    def run_of(kind: str, layout: str) -> RunConfig:
        base = [*settings(tmp_path, cache_dir), f"init={model}", "data=jsonl", f"data.paths=[{files[kind]}]", "train.batch_tokens=768"]
        base += ["train.budget=8steps", "train.eval_every=4", "optimizer.lr=0.01", "data.holdout=0.3"]
        return compose_run("finetune", [*base, f"parallel={layout}", f"run.id={kind}-{layout}"])

    for kind in kinds:
        Trainer(run_of(kind, "none")).fit()
    launch({f"{kind}-{layout}": run_of(kind, layout) for layout in layouts for kind in kinds}, tmp_path / "many", processes)
    for kind in kinds:
        wanted = validations(tmp_path / "runs" / f"{kind}-none")
        assert len(wanted) == 2
        assert wanted[-1][1] > 0.6
        for layout in layouts:
            run = tmp_path / "runs" / f"{kind}-{layout}"
            assert validations(run) == [pytest.approx(line, abs=1e-5) for line in wanted]
            assert load_model(str(run)).model.config == load_model(str(tmp_path / "runs" / f"{kind}-none")).model.config
