"""Runs that learn classes with language modelling beside them: the same in every layout, on every machine, and for whoever loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gpt.compose import compose_run
from gpt.config import RunConfig
from gpt.errors import UserError
from gpt.inference.loading import load_model
from gpt.model.transformer import GPT
from gpt.training.trainer import Trainer
from tests.finetuning.test_preference_runs import PAIRS
from tests.training.conftest import settings
from tests.training.finetuning import SUMS, finetune_config, save_small_model, write_rows
from tests.training.test_classifiers import LEARN, PEOPLE, THINGS
from tests.training.test_neuron_sim_runs import SIM
from tests.training.test_processes import assert_same_losses, curve, launch

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def config_of(tmp_path, init):
    """Composes a fine-tuning run; takes rows and overrides."""
    return lambda rows, *overrides: finetune_config(tmp_path, init, write_rows(tmp_path / "rows.jsonl", rows), *overrides)


@pytest.mark.parametrize("loss_on", ["auto", "all"])
def test_the_loss_has_both_and_the_stock_class_says_the_same(config_of, loss_on):
    trainer = Trainer(config_of(THINGS, *LEARN, "lm_weight=0.5", f"loss_on={loss_on}", "train.log_every=1"))
    run = trainer.fit().run_directory
    language, both = curve(run, "lm_loss"), curve(run, "loss")
    assert len(language) == len(both) == 40
    assert all(0.5 * lm < loss for lm, loss in zip(language, both, strict=True)), "the classes' own is above 0"
    assert language[-1] < 0.7 * language[0], "what follows is learned"
    assert both[-1] - 0.5 * language[-1] < 0.8 * (both[0] - 0.5 * language[0]), "the classes too"
    assert curve(run, "val_accuracy")[-1] > 0.9
    assert curve(run, "val_loss")[-1] < 0.5, "of the classes alone"
    model = load_model(str(run)).model
    assert not model.config.tie_embeddings
    stock: Any = transformers.AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    tokens = torch.tensor([load_model(str(run)).tokenizer.encode("I saw a cow")])
    with torch.no_grad():
        assert (stock(tokens).logits - model(tokens)[:, -1]).abs().max() < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_passes_of_any_size_are_the_same_batch(config_of, tmp_path, precision):
    for size in (1, 4):
        settings = [f"train.micro_batch={size}", f"run.id=by-{size}", f"precision={precision}", "train.budget=6steps", "train.log_every=1"]
        Trainer(config_of(PEOPLE, *settings, "lm_weight=0.5", "train.eval_every=3", "data.holdout=0.2")).fit()
    one, four = (tmp_path / "runs" / f"by-{size}" for size in (1, 4))
    for key in ("loss", "lm_loss", "val_loss"):
        assert curve(one, key) == pytest.approx(curve(four, key), rel=1e-5 if precision == "fp32" else 2e-2)


def test_nothing_of_it_changes_a_frozen_body(config_of, init):
    """With the head alone, its loss has nothing to teach: the run is that without it."""
    plain, beside = (
        load_model(str(Trainer(config_of(THINGS, "freeze=head_only", f"run.id=w{weight}", f"lm_weight={weight}")).fit().run_directory))
        for weight in (0, 0.5)
    )
    for (name, p), (_, q) in zip(plain.model.named_parameters(), beside.model.named_parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6), name


@pytest.mark.parametrize(
    ("processes", "layouts", "kinds"),
    [
        (2, ["ddp", "fsdp"], ["texts"]),
        pytest.param(3, ["ddp", "fsdp"], ["texts", "words"], marks=pytest.mark.slow),
    ],
)
def test_every_layout_has_the_losses_of_one_process(tmp_path, cache_dir, monkeypatch, processes, layouts, kinds):
    monkeypatch.setattr("gpt.training.results.write_report", lambda directory, *_: directory / "report.html")
    model = save_small_model(tmp_path / "model")
    files = {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("texts", THINGS), ("words", PEOPLE))}

    def run_of(kind: str, layout: str) -> RunConfig:
        base = [*settings(tmp_path, cache_dir), f"init={model}", "data=jsonl", f"data.paths=[{files[kind]}]", "train.batch_tokens=768"]
        base += ["train.budget=8steps", "train.eval_every=4", "optimizer.lr=0.01", "data.holdout=0.3", "lm_weight=0.5"]
        return compose_run("finetune", [*base, f"parallel={layout}", "train.micro_batch=2", f"run.id={kind}-{layout}"])

    for kind in kinds:
        Trainer(run_of(kind, "none")).fit()
    launch({f"{kind}-{layout}": run_of(kind, layout) for layout in layouts for kind in kinds}, tmp_path / "many", processes)
    for kind in kinds:
        reference = tmp_path / "runs" / f"{kind}-none"
        for layout in layouts:
            run = tmp_path / "runs" / f"{kind}-{layout}"
            assert_same_losses(run, reference, 8)
            assert curve(run, "lm_loss") == pytest.approx(curve(reference, "lm_loss"), abs=1e-5)


def test_the_simulated_device_compiles_one_graph_more(tmp_path, cache_dir):
    model, rows = save_small_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", THINGS)

    def run_of(*overrides: str) -> RunConfig:
        data = ["data=jsonl", f"data.paths=[{rows}]", f"init={model}", "train.batch_tokens=512", "train.micro_batch=4", "data.holdout=0.3"]
        steps = ["train.budget=6steps", "train.eval_every=3", "lm_weight=0.5", "loss_on=all"]
        return compose_run("finetune", [*settings(tmp_path, cache_dir), *data, *steps, *overrides])

    launch({"cpu": run_of()}, tmp_path / "cpu", 1)
    launch({"sim": run_of(*SIM)}, tmp_path / "sim", 1)
    assert_same_losses(tmp_path / "runs" / "sim", tmp_path / "runs" / "cpu", 6)
    assert "Graphs: 4 compiled, as expected" in (tmp_path / "runs" / "sim" / "rehearsal.txt").read_text()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            SUMS,
            r"lm_weight=0.5 is of rows with classes \(text and label, or tokens and tags\), and these are texts to continue; leave it out",
        ),
        (PAIRS, r"lm_weight=0.5 is of rows with classes .*, and these are pairs of completions; leave it out"),
    ],
)
def test_of_what_has_no_classes_it_is_refused(config_of, rows, said):
    with pytest.raises(UserError, match=f"^{said}$"):
        Trainer(config_of(rows, "lm_weight=0.5")).fit()


@pytest.mark.parametrize(
    ("command", "overrides", "said"),
    [
        ("finetune", ["lm_weight=-1"], r"lm_weight=-1.* must be at least 0"),
        ("pretrain", ["lm_weight=0.5"], r"lm_weight=0.5 is of examples with classes to fine-tune on, and this is text; leave it out"),
    ],
)
def test_what_cannot_be_is_found_before_anything_is_read(init, command, overrides, said):
    start = [f"init={init}", "data=stdlib_packages"] if command == "finetune" else []
    with pytest.raises(UserError, match=f"^{said}$"):
        compose_run(command, [*start, *overrides]).validate()


def test_an_output_head_apart_from_the_embeddings_is_refused(tmp_path: Path, init):
    tied = load_model(str(init))
    apart = GPT(type(tied.model.config)(**{**vars(tied.model.config), "tie_embeddings": False}))
    apart.save_pretrained(tmp_path / "apart", tokenizer=tied.tokenizer)
    config = finetune_config(tmp_path, tmp_path / "apart", write_rows(tmp_path / "rows.jsonl", THINGS), "lm_weight=0.5")
    with pytest.raises(UserError, match=r"^lm_weight=0.5: the next tokens are told by the embeddings, and init=.*apart has an output head"):
        Trainer(config).fit()
