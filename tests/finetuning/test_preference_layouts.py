"""Runs of DPO in bf16 and with matrices that several processes divide: the losses of one process."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from gpt.config import RunConfig
from gpt.training.metrics import read_metrics
from gpt.training.trainer import Trainer
from tests.finetuning.test_preference_runs import PAIRS
from tests.training.finetuning import finetune_config, write_rows
from tests.training.test_processes import assert_same_losses, curve, launch

COMMON = ["data.packing=none", "train.batch_tokens=1024", "train.micro_batch=2", "train.eval_every=3", "train.budget=6steps"]

pytestmark = pytest.mark.usefixtures("no_report")


def made(folder: Path, init: Path, *overrides: str) -> RunConfig:
    folder.mkdir(exist_ok=True)
    return finetune_config(folder, init, write_rows(folder.parent / "rows.jsonl", PAIRS), *COMMON, "optimizer.lr=0.003", *overrides)


def assert_same_rewards(run: Path, reference: Path, within: float) -> None:
    for key in ("val_reward_accuracy", "val_reward_margin"):
        ours, theirs = ([line[key] for line in read_metrics(path / "metrics.jsonl") if key in line] for path in (run, reference))
        assert len(ours) >= 2
        assert ours == pytest.approx(theirs, abs=within)


def test_matrices_that_two_processes_divide_learn_as_one_process_does(init, tmp_path):
    layouts = {
        "tensor": ["parallel=ddp", "parallel.tensor=2"],
        "tensor-frozen": ["parallel=ddp", "parallel.tensor=2", "freeze=last_n_only"],
    }
    launch({name: made(tmp_path / "two", init, *layout) for name, layout in layouts.items()}, tmp_path / "configs", 2)
    for name, layout in layouts.items():
        one = Trainer(made(tmp_path / "one", init, *layout[2:])).fit().run_directory
        assert_same_losses(tmp_path / "two" / "runs" / name, one, 6)
        assert_same_rewards(tmp_path / "two" / "runs" / name, one, 1e-5)


@pytest.mark.parametrize("overrides", [[], ["lora.rank=4"], ["freeze=last_n_only"]], ids=["full", "LoRA", "frozen"])
def test_in_bf16_it_begins_as_its_own_reference_and_learns(init, tmp_path, overrides):
    """What the reference said has the roundings of the model that it is."""
    result = Trainer(made(tmp_path / "one", init, "precision=bf16", "train.budget=12steps", *overrides)).fit()
    assert curve(result.run_directory, "loss")[0] == pytest.approx(math.log(2), abs=1e-3)
    early, late = (
        line for line in read_metrics(result.run_directory / "metrics.jsonl") if line.get("step") in (3, 12) and "val_loss" in line
    )
    assert late["val_reward_margin"] > early["val_reward_margin"] > 0
    assert late["val_loss"] < early["val_loss"] < math.log(2)


@pytest.mark.slow
def test_two_processes_in_bf16_learn_as_one(init, tmp_path):
    layouts = {"ddp": ["parallel=ddp"], "fsdp": ["parallel=fsdp"], "tensor": ["parallel=ddp", "parallel.tensor=2"]}
    bf16 = ["precision=bf16"]
    launch({name: made(tmp_path / "two", init, *bf16, *layout) for name, layout in layouts.items()}, tmp_path / "configs", 2)
    one = Trainer(made(tmp_path / "one", init, *bf16)).fit().run_directory
    for name in layouts:
        run = tmp_path / "two" / "runs" / name
        assert curve(run, "loss")[0] == pytest.approx(math.log(2), abs=1e-3)
        assert curve(run, "loss") == pytest.approx(curve(one, "loss"), abs=5e-3)
        assert_same_rewards(run, one, 5e-3)
