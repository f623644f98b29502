"""What a run needs besides its own weights, by formula, against the models that it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from gpt.training.needs import run_case
from gpt.training.trainer import Trainer
from tests.finetuning.test_preference_runs import PAIRS
from tests.training.finetuning import SUMS, finetune_config, write_rows
from tests.training.test_classifiers import THINGS

pytestmark = pytest.mark.usefixtures("no_report")


def own_bytes(beside: nn.Module, model: nn.Module) -> int:
    """Of a model's storages that are not those of another."""
    shared = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in beside.parameters()}
    return sum(size for place, size in found.items() if place not in shared)


def set_up(trainer: Any, looked: list) -> None:
    """Have what is beside the model measured before the first step: (by formula, measured)."""
    whole = trainer._set_up

    def then_look() -> None:
        whole()
        givers = trainer.givers
        beside = givers.teacher.teacher.module if givers.teacher is not None else givers.reference._objective.model
        looked.append((trainer.case().beside, own_bytes(beside, trainer.model)))

    trainer._set_up = then_look


@pytest.mark.parametrize("overrides", [[], ["freeze=last_n_only"], ["lora.rank=4"]], ids=["full", "frozen", "LoRA"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_reference_takes_what_trains_in_the_dtype_of_its_products(tmp_path, init, overrides, precision):
    rows, looked = write_rows(tmp_path / "rows.jsonl", PAIRS), []
    trainer = Trainer(finetune_config(tmp_path, init, rows, "train.budget=1steps", f"precision={precision}", *overrides))
    set_up(trainer, looked)
    trainer.fit()
    ((formula, measured),) = looked
    assert formula == measured
    assert (measured == 0) == (overrides == ["lora.rank=4"])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_teacher_is_counted_before_it_is_there_and_then(tmp_path: Path, init, precision):
    rows, looked = write_rows(tmp_path / "rows.jsonl", SUMS), []
    config = finetune_config(tmp_path, init, rows, "train.budget=1steps", f"distill.teacher={init}", f"precision={precision}")
    trainer = Trainer(config)
    set_up(trainer, looked)
    trainer.fit()
    ((formula, measured),) = looked
    assert formula == measured > 0
    before = run_case(config, trainer.plan, 1, 1, trainer.device, compiled=False)
    assert before.beside == measured


def test_what_trains_at_last_is_what_a_run_needs_memory_for(tmp_path, init):
    rows = write_rows(tmp_path / "rows.jsonl", SUMS)
    trainer = Trainer(finetune_config(tmp_path, init, rows, "freeze=last_n_only", "unfreeze=[{at: 20, blocks: '0'}]"))
    trains = trainer.plan.trainable(2)
    trainer.fit()
    case = trainer.case()
    assert case.trains == trains
    assert case.depth == 0
    assert not case.learns("embeddings.")


@pytest.mark.parametrize("frozen", [False, True])
def test_next_tokens_beside_classes_take_what_their_loss_takes(tmp_path, init, frozen):
    """Of two runs that differ in nothing else: their loss over the vocabulary, as if it were the head's own."""
    rows, found = write_rows(tmp_path / "rows.jsonl", THINGS), {}
    plan = ["freeze=embeddings"] if frozen else []
    for weight in (0, 0.5):
        trainer = Trainer(finetune_config(tmp_path, init, rows, f"lm_weight={weight}", "precision=fp32", "train.budget=1steps", *plan))
        trainer.fit()
        found[weight] = trainer.case()
    case = found[0]
    assert (case.beside, replace(found[0.5], beside=0.0)) == (0, case)
    vocabulary, d = case.model.vocab_size, case.model.d_model
    gradients = 4 * (case.tokens * d + (0 if frozen else vocabulary * d))
    assert gradients + 4 * case.tokens * vocabulary < found[0.5].beside < gradients + 32 * case.tokens * vocabulary
