"""What a model that is being fine-tuned answers to held-out prompts, within the run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt.compose import compose_use
from gpt.data.tokenizer_training import byte_tokenizer
from gpt.errors import UserError
from gpt.evaluation.command import evaluate
from gpt.model.transformer import GPT
from gpt.runtime.device import find_device
from gpt.runtime.distributed import World
from gpt.training.answering import Answering
from gpt.training.metrics import read_metrics
from gpt.training.trainer import Result, Trainer
from tests.training.finetuning import CHATS, SUMS, finetune_config, save_small_model, write_rows


@pytest.fixture
def init(tmp_path):
    return save_small_model(tmp_path / "init")


def finetune(tmp_path: Path, init: Path, rows: list[dict[str, Any]], *overrides: str) -> Result:
    return Trainer(finetune_config(tmp_path, init, write_rows(tmp_path / "rows.jsonl", rows), *overrides)).fit()


def validations(result: Result) -> list[dict[str, Any]]:
    return [line for line in read_metrics(result.run_directory / "metrics.jsonl") if "val_loss" in line]


@pytest.mark.parametrize(
    "overrides",
    [[], ["train.ema=0.9"], ["freeze.first_n_blocks=1", "optimizer.lr=0.03", "train.budget=20steps", "train.eval_every=10"]],
    ids=["weights", "their average", "frozen"],
)
def test_the_figures_are_those_of_gpt_evaluate(tmp_path, init, overrides, capsys):
    settings = ["train.metrics=[chrf,rouge]", "train.metrics_examples=7", "train.eval_every=2", "data.holdout=0.3", "train.budget=4steps"]
    result = finetune(tmp_path, init, CHATS, "optimizer.lr=0.003", *settings, *overrides)
    lines = validations(result)
    assert len(lines) == 2
    assert all(line.keys() >= {"val_chrf", "val_rouge_1", "val_rouge_2", "val_rouge_l"} for line in lines)
    best = next(line for line in lines if line["step"] == result.state.best_step)
    output = tmp_path / "figures.json"
    arguments = ["metrics=[chrf,rouge]", "limit=7", "precision=fp32", "device=cpu", f"output={output}"]
    assert evaluate(compose_use("evaluate", [f"model={result.run_directory}", *arguments])) == 0
    found = json.loads(output.read_text())
    assert found["answers"]["count"] == 7
    assert {name: best[f"val_{name}"] for name in found["metrics"]} == pytest.approx(found["metrics"])
    assert best["val_chrf"] > 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"answers to 7 held-out prompts at step {lines[0]['step']}: rouge 1 " in said
    assert f"answers: rouge 1 {best['val_rouge_1']:.1f}, " in said
    page = (result.run_directory / "report.html").read_text()
    assert "Answers to held-out prompts" in page
    assert ">rouge l<" in page


def test_asking_changes_nothing_in_the_training(tmp_path, init, monkeypatch):
    monkeypatch.setattr("gpt.training.results.write_report", lambda directory, *_: directory / "report.html")
    weights, losses = [], []
    for metrics in ("[]", "[exact_match]"):
        place = f"run.id=run-{len(weights)}"
        result = finetune(tmp_path, init, SUMS, place, f"train.metrics={metrics}", "train.eval_every=1", "model.dropout=0.1")
        weights.append(GPT.from_pretrained(result.run_directory / "model").state_dict())
        losses.append([line["val_loss"] for line in validations(result)])
        assert all(("val_exact_match" in line) == (metrics != "[]") for line in validations(result))
    assert losses[0] == losses[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        (SUMS, ["train.metrics=[pass]"], r"train.metrics=\[pass\]: a run never runs what the model writes.*gpt evaluate"),
        (SUMS, ["train.metrics=[rouge]", "train.metrics_examples=0"], "train.metrics_examples=0 must be at least 1"),
        (SUMS, ["train.metrics=[rogue]"], "Did you mean rouge?"),
        ([{"text": row["prompt"] * 3} for row in SUMS], ["train.metrics=[rouge]"], "train.metrics: rows of text have no prompts to answer"),
    ],
)
def test_metrics_that_cannot_be(tmp_path, init, rows, overrides, message):
    with pytest.raises(UserError, match=message):
        finetune(tmp_path, init, rows, *overrides)


def test_text_has_no_prompts(tiny_config):
    with pytest.raises(UserError, match=r"train.metrics=\[rouge\]: are of answers to the prompts of examples, and this run learns text"):
        tiny_config("train.metrics=[rouge]").validate()


def test_where_the_model_cannot_write_it_is_said(tmp_path, init, monkeypatch):
    config = finetune_config(tmp_path, init, write_rows(tmp_path / "rows.jsonl", SUMS), "train.metrics=[rouge]")
    device, said = find_device(config.device, config.precision), []
    none: Any = None
    divided = Answering(config, byte_tokenizer(), World(is_divided=True), device, said.append)
    assert "each process holds only a part of the model; measure the result with gpt evaluate" in said[0]
    assert divided(none, None, none, 1, said.append) == {}
    monkeypatch.setattr(type(device), "decodes", False)
    Answering(config, byte_tokenizer(), World(), device, said.append)
    assert "this device compiles for each length" in said[1]
    assert len(said) == 2
