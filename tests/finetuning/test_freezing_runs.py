"""Runs that freeze: what stays, what is resumed, what is kept of frozen blocks, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gpt.compose import compose_run, load_config
from gpt.config import RunConfig
from gpt.errors import UserError
from gpt.model.transformer import GPT
from gpt.training.metrics import read_metrics
from gpt.training.trainer import Result, Trainer
from tests.training.finetuning import SUMS, finetune_config, stop_in_the_middle, write_rows

GRADUAL = ["freeze=last_n_only", "unfreeze=[{at: 7, blocks: '0'}, {at: 0.75, all: true}]", "layerwise_lr_decay=0.8", "train.budget=20steps"]


pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def config_of(tmp_path, init) -> Callable[..., RunConfig]:
    rows = write_rows(tmp_path / "rows.jsonl", SUMS)
    return lambda *overrides: finetune_config(tmp_path, init, rows, "data.packing=none", "checkpoint.keep_last=9", *overrides)


def losses(result: Result) -> list[tuple[float | None, float | None]]:
    return [(line.get("loss"), line.get("val_loss")) for line in read_metrics(result.run_directory / "metrics.jsonl")]


def weights(result: Result, step: int) -> dict[str, torch.Tensor]:
    return load_file(result.run_directory / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def start_of(init: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in GPT.from_pretrained(init).named_parameters()}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("plan", ["embeddings", "first_n", "last_n_only", "norms_and_biases", "head_only"])
def test_what_is_frozen_is_the_same_to_the_bit_and_has_no_state(config_of, init, plan, optimizer, capsys):
    extra = ["freeze.first_n_blocks=1"] if plan == "first_n" else []
    result = Trainer(config_of(f"freeze={plan}", f"optimizer={optimizer}", "optimizer.weight_decay=0.1", *extra)).fit()
    before, after = start_of(init), weights(result, 3)
    state = json.loads((result.run_directory / "checkpoints/step-00000003/state.json").read_text())
    kept = load_file(result.run_directory / "checkpoints/step-00000003/optimizer/state.safetensors")
    trained = {name.rpartition("|")[0] for name in kept}
    assert state["frozen"].keys() == after.keys() - trained
    assert state["frozen"], "something is frozen"
    assert trained, "something trains"
    for name, tensor in after.items():
        original = before.get(name, before["embeddings.tokens.weight"])  # the head of its own begins as the embedding
        assert torch.equal(tensor, original) == (name not in trained), name
    assert "learning rate" in capsys.readouterr().err
    rows = json.loads((result.run_directory / "trainable.json").read_text())
    assert sum(row["trains"] for row in rows) == sum(after[name].numel() for name in trained)


def test_a_frozen_parameter_that_changes_ends_the_run(config_of):
    trainer = Trainer(config_of("freeze=embeddings"))
    set_up = trainer._set_up

    def spoil() -> None:
        set_up()
        with torch.no_grad():
            trainer.model.embeddings.positions.weight[0, 0] += 1

    trainer._set_up = spoil
    with pytest.raises(AssertionError, match=r"embeddings\.positions\.weight is frozen, and yet has changed"):
        trainer.fit()


def test_stages_begin_at_their_steps_with_a_warm_up_of_their_own(config_of, init, capsys):
    result = Trainer(
        config_of(*GRADUAL, "schedule=constant", "schedule.warmup=4", "checkpoint.every=1steps", "checkpoint.keep_last=99")
    ).fit()
    before = start_of(init)
    first = {name: next(step for step in range(1, 21) if not torch.equal(weights(result, step)[name], p)) for name, p in before.items()}
    assert {first[name] for name in before if name.startswith("blocks.1.")} == {1}
    assert {first[name] for name in before if name.startswith("blocks.0.")} == {8}
    assert {first[name] for name in before if name.startswith("embeddings.")} == {16}
    state = json.loads((result.run_directory / "checkpoints/step-00000020/state.json").read_text())
    assert state["unfrozen"] == [[7, 0.35], [15, 0.75]]
    assert state["frozen"] == {}
    said = capsys.readouterr().err
    assert "step 7: " in said
    assert "parameters more train now (blocks.0)" in said
    name = "embeddings.positions.weight"
    moved = {step: (weights(result, step)[name] - before[name]).abs().max() for step in (16, 20)}
    assert 0 < moved[16] < moved[20] / 4  # Adam's first step is its learning rate: a quarter of the peak


QUICK = [(3, "0.0"), (7, "0.9"), (9, "0.0"), (15, "0.9"), (17, "0.0")]


@pytest.mark.parametrize(
    ("stop", "ema"),
    [*QUICK, *(pytest.param(stop, "0.9" if ema == "0.0" else "0.0", marks=pytest.mark.slow) for stop, ema in QUICK)],
)
def test_a_run_that_is_stopped_in_the_middle_of_its_schedule_goes_on_exactly(config_of, stop, ema):
    settings = [*GRADUAL, "optimizer=muon", f"train.ema={ema}", "train.micro_batch=2", "train.batch_tokens=256"]
    whole = Trainer(config_of(*settings, "run.id=whole")).fit()
    parts = stop_in_the_middle(Trainer(config_of(*settings, "run.id=parts")), stop)
    assert parts.exit_code == 128 + signal.SIGTERM
    done = Trainer(config_of(*settings, "run.id=parts")).fit()
    for file in ("model.safetensors", "optimizer/state.safetensors", *(["ema.safetensors"] if ema != "0.0" else [])):
        one, other = (load_file(r.run_directory / "checkpoints/step-00000020" / file) for r in (whole, done))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items()), file
    assert losses(whole) == losses(done)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_from_the_second_epoch_on_frozen_blocks_are_not_run_and_nothing_else_changes(config_of, precision, capsys, monkeypatch, tmp_path):
    settings = ["freeze=last_n_only", "train.budget=3epochs", f"precision={precision}", "train.eval_every=5"]
    off = Trainer(config_of(*settings, "freeze.cache=off", "run.id=off")).fit()
    assert "frozen-prefix cache: off (freeze.cache=off)" in capsys.readouterr().err
    ran = []
    forward = GPT.frozen_states
    monkeypatch.setattr(GPT, "frozen_states", lambda self, tokens, *rest: ran.append(len(tokens)) or forward(self, tokens, *rest))
    on = Trainer(config_of(*settings, "run.id=on")).fit()
    said = capsys.readouterr().err
    assert "frozen-prefix cache: on (1 block, " in said
    assert "0 of 120 rows are there" in said
    assert 120 <= sum(ran) < 150, "each row of training and of validation about once"
    if precision == "fp32":
        assert losses(off) == losses(on)
    for line, cached in zip(losses(off), losses(on), strict=True):
        assert [x or 0 for x in line] == pytest.approx([x or 0 for x in cached], rel=1e-2)
    ran.clear()
    again = Trainer(config_of(*settings, "run.id=again")).fit()
    assert losses(again) == losses(on), "what is there already makes no difference"
    assert not ran


def test_the_cache_follows_what_is_frozen_at_the_bottom(config_of, capsys):
    unfreeze = ["freeze.only_last_n_blocks=0", "freeze.except=[final_norm]", "unfreeze=[{at: 40, blocks: '1'}, {at: 60, all: true}]"]
    settings = ["freeze=last_n_only", *unfreeze, "train.budget=5epochs"]
    Trainer(config_of(*settings, "run.id=on")).fit()
    said = capsys.readouterr().err
    assert "frozen-prefix cache: on (2 blocks" in said
    assert "frozen-prefix cache: on (1 block," in said
    assert "frozen-prefix cache: off (the embeddings train" in said


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["freeze=first_n", "freeze.first_n_blocks=1"], "the run sees every example once"),
        (["freeze=custom", "freeze.patterns=[blocks.0]", "train.budget=3epochs"], "the embeddings train, below which nothing lies"),
        (["freeze=embeddings", "train.budget=3epochs"], "the lowest block trains"),
        (
            ["freeze=last_n_only", "train.budget=3epochs", "freeze.cache_gb=1e-6"],
            "it would take 0.0 GB, more than the 1e-06 GB that it may",
        ),
    ],
)
def test_it_is_said_why_nothing_is_kept(config_of, settings, why, capsys):
    Trainer(config_of(*settings)).fit()
    assert f"frozen-prefix cache: off ({why}" in capsys.readouterr().err


def test_text_is_cut_anew_in_every_epoch(tmp_path, init, corpus, capsys):
    places = [f"data.paths=[{corpus}]", f"data.cache_dir={tmp_path / 'cache'}", f"run.dir={tmp_path / 'runs'}", f"init={init}"]
    small = ["debug=golden", "train.budget=3steps", "train.eval_every=0", "train.sample_tokens=2", "train.batch_tokens=256"]
    Trainer(compose_run("finetune", [*small, *places, "data=text", "freeze=last_n_only"])).fit()
    assert "frozen-prefix cache: off (every epoch cuts the text into other rows)" in capsys.readouterr().err


def test_a_full_disk_leaves_the_run_as_it_is(config_of, capsys, monkeypatch):
    settings = ["freeze=last_n_only", "train.budget=3epochs"]
    whole = Trainer(config_of(*settings, "run.id=whole")).fit()
    shutil.rmtree(whole.run_directory.parents[1] / "cache" / "frozen")
    write, written = os.pwrite, []

    def full(file: int, data: bytes, offset: int) -> int:
        written.append(offset)
        if len(written) > 20:
            raise OSError(28, "No space left on device")
        return write(file, data, offset)

    monkeypatch.setattr("os.pwrite", full)
    capsys.readouterr()
    result = Trainer(config_of(*settings, "run.id=full")).fit()
    assert losses(result) == losses(whole)
    said = capsys.readouterr().err
    assert said.count("cannot be written (No space left on device)") == 1


def test_a_cache_of_other_weights_is_refused_in_a_sentence(config_of):
    settings = ["freeze=last_n_only", "train.budget=3epochs"]
    first = Trainer(config_of(*settings, "run.id=first")).fit()
    (meta,) = (first.run_directory.parents[1] / "cache" / "frozen").glob("*/train/meta.json")
    changed = json.loads(meta.read_text())
    changed["key"]["weights"] = "0" * 64
    meta.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"was made from other weights, data or settings than this run's; remove it"):
        Trainer(config_of(*settings, "run.id=second")).fit()


def test_a_plan_that_is_changed_at_resume_is_refused(config_of):
    settings = [*GRADUAL, "run.id=run"]
    stop_in_the_middle(Trainer(config_of(*settings)), 9)
    for change, said in (
        (["freeze.only_last_n_blocks=0"], r"freeze\.only_last_n_blocks=0: the run in \S+ was started with freeze\.only_last_n_blocks=1"),
        (["unfreeze=[{at: 8, blocks: '0'}]"], r"unfreeze=\[.*\]: the run in \S+ was started with unfreeze="),
        (["layerwise_lr_decay=0.5"], r"layerwise_lr_decay=0\.5: the run in \S+ was started with layerwise_lr_decay=0\.8"),
        (["freeze.except=[final_norm]"], r"freeze\.except=\[final_norm\]: the run in \S+ was started with freeze\.except=\[\]"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            Trainer(config_of(*settings, *change)).fit()
    assert Trainer(config_of(*settings, "freeze.cache=off")).fit().exit_code == 0


def test_a_plan_that_cannot_be_is_refused_before_anything_is_written(config_of):
    config = config_of("freeze=first_n", "freeze.first_n_blocks=3", "run.id=never")
    with pytest.raises(UserError, match="there are 2 blocks"):
        Trainer(config).fit()
    assert not (Path(config.run.dir) / "never").exists()


def test_an_untied_head_is_exported_and_can_be_used(config_of):
    result = Trainer(config_of("freeze=head_only", "train.budget=3steps")).fit()
    again = Trainer(config_of("freeze=head_only", "train.budget=4steps", f"run.id={result.run_directory.name}")).fit()
    assert again.state.step == 4, "the run goes on with the head that it has"
    exported = GPT.from_pretrained(result.run_directory / "model")
    assert not exported.config.tie_embeddings
    assert not torch.equal(exported.head.weight, exported.embeddings.tokens.weight)


def test_without_weights_there_is_nothing_to_fine_tune():
    with pytest.raises(UserError, match=r"init: finetune starts from weights"):
        compose_run("finetune", ["freeze=last_n_only"])


def test_a_config_with_a_plan_is_the_same_when_it_is_read_again(config_of, tmp_path):
    config = config_of(*GRADUAL, "freeze.except=[final_norm]")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert "except:" in (tmp_path / "c.yaml").read_text()
    assert dataclasses.asdict(load_config(tmp_path / "c.yaml")) == dataclasses.asdict(config)
