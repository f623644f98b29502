"""Runs of DPO: what they learn, how they go on after a kill and in several processes, with freezing, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch

from gpt.compose import compose_run
from gpt.config import RunConfig
from gpt.errors import UserError
from gpt.model.transformer import GPT
from gpt.training.metrics import read_metrics
from gpt.training.trainer import Result, Trainer
from tests.training.finetuning import SUMS, finetune_config, stop_in_the_middle, write_rows
from tests.training.test_processes import assert_same_losses, launch
from tests.training.test_trainer import assert_same_run

PAIRS = [
    {"prompt": f"{a} or {b}: ", "chosen": f"the first, {a}"[: 10 + b % 3], "rejected": f"no idea{'!' * (a % 4)}"}
    for a in range(10)
    for b in range(12)
]
LEARNING = ["optimizer.lr=0.003", "train.budget=40steps", "train.eval_every=20", "data.holdout=0.2"]


pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def config_of(tmp_path, init) -> Callable[..., RunConfig]:
    def compose(*overrides: str, rows=PAIRS) -> RunConfig:
        return finetune_config(tmp_path, init, write_rows(tmp_path / "rows.jsonl", rows), *overrides)

    return compose


def lines(result: Result) -> list[dict]:
    return read_metrics(result.run_directory / "metrics.jsonl")


def held_out(result: Result) -> list[dict]:
    return [line for line in lines(result) if "val_loss" in line]


def test_training_raises_the_margin_of_held_out_pairs(config_of, capsys):
    result = Trainer(config_of(*LEARNING)).fit()
    first = lines(result)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)  # it begins as its own reference
    early, late = held_out(result)
    assert late["val_reward_margin"] > early["val_reward_margin"] > 0
    assert late["val_reward_accuracy"] == 1
    assert late["val_loss"] < early["val_loss"] < math.log(2)
    assert "val_bpb" not in late
    said = capsys.readouterr().err
    assert "rows of preference" in said
    assert re.search(r"held-out pairs \(\d+\): the chosen one gained more in 100\.0% \(reward accuracy\), reward margin \d", said)
    assert "bits per byte" not in said
    assert "DPO: held to the weights of" in said


def test_tokens_count_what_is_learned_and_the_loss_is_per_pair(config_of):
    rows = [{"prompt": f"{n}: ", "chosen": "ab", "rejected": "cde"} for n in range(100, 180)]
    trainer = Trainer(config_of("data.packing=none", "train.batch_tokens=512", "train.budget=1steps", "dpo.beta=0.2", rows=rows))
    result = trainer.fit()
    assert result.state.tokens == 4 * (3 + 4)  # eight rows are four pairs, and each completion ends
    assert lines(result)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result.held_out is not None
    assert result.held_out.pairs * 7 == result.held_out.tokens


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_the_held_out_loss_is_that_of_every_pair_by_itself(config_of, init, packing):
    """Against the weights of the file and of the run, in fp64, by the formula."""
    trainer = Trainer(config_of(*LEARNING, f"data.packing={packing}", "dpo.beta=0.3", "dpo.label_smoothing=0.1", "train.budget=10steps"))
    result = trainer.fit()
    ours, theirs = (GPT.from_pretrained(path).double() for path in (result.run_directory / "model", init))
    total = pairs = 0
    for batch in trainer.data.held_out(2, 10**9):
        gained = []
        for tokens, targets, documents in zip(batch.tokens, batch.targets, batch.documents, strict=True):
            gained.append({})
            for number in documents.unique().tolist():
                here = documents == number
                if not (valid := targets[here] >= 0).any():
                    continue
                picked = targets[here][valid][:, None]
                each = [torch.log_softmax(model(tokens[here][None])[0][valid], -1).gather(1, picked).sum() for model in (ours, theirs)]
                gained[-1][number] = (each[0] - each[1]).item()
        assert gained[0].keys() == gained[1].keys()
        for number, chosen in gained[0].items():
            z = 0.3 * (chosen - gained[1][number])
            total += 0.9 * math.log1p(math.exp(-z)) + 0.1 * math.log1p(math.exp(z))
            pairs += 1
    assert result.held_out is not None
    assert result.held_out.pairs == pairs
    assert result.held_out.loss == pytest.approx(total / pairs, abs=1e-5)


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not(config_of, cache):
    overrides = [f"dpo.cache={cache}", "train.budget=6steps", "train.micro_batch=2", "optimizer.lr=0.003", "train.eval_every=2"]
    whole = Trainer(config_of(*overrides, "run.id=whole")).fit()
    stopped = stop_in_the_middle(Trainer(config_of(*overrides, "run.id=again")), step=3)
    assert stopped.exit_code != 0
    again = Trainer(config_of(*overrides, "run.id=again")).fit()
    assert_same_run(whole.run_directory, again.run_directory)
    assert [line["val_loss"] for line in held_out(whole)] == [line["val_loss"] for line in held_out(again)]


def test_frozen_blocks_are_not_run_twice_and_belong_to_both_models(config_of, init):
    """The reference shares what never trains; what begins to train later it has of its own, so that it stays as it began."""
    plan = ["freeze=last_n_only", "unfreeze=[{at: 20, blocks: '0'}]"]
    trainer = Trainer(config_of(*LEARNING, *plan))
    set_up, shared = trainer._set_up, set()

    def set_up_and_look():
        set_up()
        live, held = (dict(model.named_parameters()) for model in (trainer.model, trainer.givers.reference._objective.model))
        shared.update(name for name in live if live[name] is held[name])

    trainer._set_up = set_up_and_look
    cached = trainer.fit()
    assert shared == {"embeddings.tokens.weight", "embeddings.positions.weight"}
    assert not trainer.givers.reference.is_loaded  # since all rows have been seen
    plain = Trainer(config_of(*LEARNING, *plan, "freeze.cache=off", "dpo.cache=off")).fit()
    for ours, theirs in zip(lines(cached), lines(plain), strict=True):
        for name in ("loss", "val_loss", "val_reward_margin"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-6)


def test_with_adapters_the_base_is_the_reference_of_itself(config_of):
    trainer = Trainer(config_of(*LEARNING, "lora.rank=4", "lora.targets=[attention.*, feedforward.*]", "optimizer.lr=0.01"))
    set_up, shared = trainer._set_up, []

    def set_up_and_look():
        set_up()
        live = {id(p) for p in trainer.model.parameters()}
        shared.extend(id(p) in live for p in trainer.givers.reference._objective.parameters())

    trainer._set_up = set_up_and_look
    result = trainer.fit()
    assert shared
    assert all(shared)
    assert lines(result)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    early, late = held_out(result)
    assert late["val_reward_margin"] > early["val_reward_margin"] > 0


def test_two_processes_learn_as_one(init, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", PAIRS)
    common = [
        "data.packing=none",
        "train.batch_tokens=1024",
        "train.micro_batch=2",
        "train.eval_every=3",
        "train.budget=6steps",
        "optimizer.lr=0.003",
    ]
    layouts = {"ddp": ["parallel=ddp"], "fsdp-frozen": ["parallel=fsdp", "freeze=last_n_only"]}

    def made(folder: str, *overrides: str) -> RunConfig:
        return finetune_config(tmp_path / folder, init, rows, *common, *overrides)

    launch({name: made("two", *layout) for name, layout in layouts.items()}, tmp_path / "configs", 2)
    one = {frozen: Trainer(made("one", *frozen)).fit().run_directory for frozen in ((), ("freeze=last_n_only",))}
    for name, layout in layouts.items():
        run = tmp_path / "two" / "runs" / name
        reference = one[tuple(layout[1:])]
        assert_same_losses(run, reference, 6)
        for key in ("val_reward_accuracy", "val_reward_margin"):
            ours, theirs = ([line[key] for line in read_metrics(path / "metrics.jsonl") if key in line] for path in (run, reference))
            assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.batch_tokens=192"], r"train.batch_tokens: a batch of 3 rows is no whole pairs, .* take an even number"),
        (["train.batch_tokens=192", "train.micro_batch=3"], r"train.batch_tokens: a batch of 3 rows .*"),
        (["train.micro_batch=1"], r"train.micro_batch=1: rows of preference come in pairs, .* and train.micro_batch=2"),
        (["train.batch_tokens=384", "train.micro_batch=3"], r"train.micro_batch=3: rows of preference come in pairs, .*"),
        (["dpo.beta=0"], r"dpo.beta=0\.?0? must be greater than 0"),
        (["dpo.label_smoothing=0.5"], r"dpo.label_smoothing=0.5 must be at least 0 and below 0.5"),
        (["loss_on=all"], r"loss_on=all is not for rows of preference; there are: auto"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(config_of, overrides, said):
    with pytest.raises(UserError, match=f"^{said}$"):
        Trainer(config_of(*overrides)).fit()


def test_an_odd_automatic_micro_batch_becomes_an_even_one(config_of):
    trainer = Trainer(config_of("train.batch_tokens=384", "train.budget=1steps"))
    trainer.fit()
    assert trainer.micro_batch == 6


def test_settings_of_dpo_are_refused_elsewhere(config_of):
    with pytest.raises(
        UserError, match=r"^dpo.beta=0.2 is of rows of preference \(prompt, chosen, rejected\), and these are others; leave it"
    ):
        Trainer(config_of("dpo.beta=0.2", rows=SUMS)).fit()


def test_the_experiment_composes(tmp_path, init):
    rows = write_rows(tmp_path / "rows.jsonl", PAIRS)
    config = compose_run("finetune", ["experiment=finetune_preference", f"data.paths=[{rows}]", f"init={init}", "train.batch_tokens=256"])
    config.validate()
    assert config.data.format == "preference"
