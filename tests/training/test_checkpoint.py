"""What a checkpoint holds, whether it is whole, and loading it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_models import learn, optimizers_of, save, tiny_model
from safetensors.torch import load_file

from gpt.errors import UserError
from gpt.training.checkpoint import (
    COMPLETE,
    TrainingState,
    find_damage,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    model_tensors,
    newest_whole,
    optimizer_tensors,
    read_state,
)


def assert_equal(a, b) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    model = tiny_model(0)
    optimizers = optimizers_of(model)
    learn(model, optimizers)
    return save(tmp_path / "checkpoints", model, optimizers, TrainingState(step=1, tokens=64, stream={"file": 3}))


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_is_what_safetensors_reads_and_what_is_loaded(tmp_path, name, tied):
    model = tiny_model(0, tied, frozen=True)
    optimizers = optimizers_of(model, name)
    learn(model, optimizers)
    ema = {key: t * 0.5 for key, t in model_tensors(model).items()}
    path = save(tmp_path, model, optimizers, TrainingState(step=1, tokens=64), ema)
    assert path == tmp_path / "step-00000001"
    assert_equal(load_file(path / "model.safetensors"), model_tensors(model))
    assert_equal(load_file(path / "ema.safetensors"), ema)
    stored = load_file(path / "optimizer/state.safetensors")
    assert_equal(stored, optimizer_tensors(model, optimizers))
    assert not any(key.startswith("blocks.0.") for key in stored), "frozen parameters have no state"
    assert any(key.endswith("|step") for key in stored)
    assert ("head.weight" in load_file(path / "model.safetensors")) == (not tied)

    other = tiny_model(1, tied, frozen=True)
    fresh = optimizers_of(other, name)
    average = {key: torch.zeros_like(t) for key, t in ema.items()}
    assert load_checkpoint(path, other, fresh, average) == TrainingState(step=1, tokens=64)
    assert_equal(model_tensors(other), model_tensors(model))
    assert_equal(average, ema)
    for m, o in ((model, optimizers), (other, fresh)):
        learn(m, o, seed=5)
    assert_equal(model_tensors(other), model_tensors(model))
    load_weights(path, other)
    assert_equal(model_tensors(other), ema)


def test_going_back_forgets_what_was_learned_since(tmp_path):
    model = tiny_model(0)
    optimizers = optimizers_of(model)
    at_start = save(tmp_path, model, optimizers, TrainingState(step=0))
    learn(model, optimizers, seed=1)
    then, path = {k: t.clone() for k, t in model_tensors(model).items()}, save(tmp_path, model, optimizers)
    state = {k: t.clone() for k, t in optimizer_tensors(model, optimizers).items()}
    learn(model, optimizers, seed=2)
    load_checkpoint(path, model, optimizers)
    assert_equal(model_tensors(model), then)
    assert_equal(optimizer_tensors(model, optimizers), state)
    load_checkpoint(at_start, model, optimizers)
    assert optimizer_tensors(model, optimizers) == {}
    learn(model, optimizers, seed=1)
    assert_equal(model_tensors(model), then)


def test_a_parameter_that_no_longer_trains_loses_its_state_and_a_new_one_starts_without(checkpoint, tmp_path):
    model = tiny_model(1, frozen=True)
    optimizers = optimizers_of(model)
    load_checkpoint(checkpoint, model, optimizers)
    frozen = save(tmp_path / "frozen", model, optimizers)
    assert not any(name.startswith("blocks.0.") for name in load_file(frozen / "optimizer/state.safetensors"))
    model = tiny_model(1)
    optimizers = optimizers_of(model)
    load_checkpoint(frozen, model, optimizers)
    learn(model, optimizers)
    assert any(name.startswith("blocks.0.") for name in optimizer_tensors(model, optimizers))


@pytest.mark.parametrize(("changed", "named"), [({"tied": False}, "head.weight"), ({}, "embeddings.tokens.weight")])
def test_another_model_is_refused_by_the_name_of_what_differs(checkpoint, changed, named):
    model = tiny_model(1, **changed)
    if not changed:
        model.embeddings.tokens = torch.nn.Embedding(7, 12)
        model.tie()
    with pytest.raises(UserError, match=f"another model.*{named} differs"):
        load_weights(checkpoint, model)


def test_state_of_another_version(checkpoint):
    state = json.loads((checkpoint / "state.json").read_text())
    del state["val_loss"], state["stream"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert read_state(checkpoint) == TrainingState(step=1, tokens=64)
    (checkpoint / "state.json").write_text(json.dumps({**state, "phase_of_the_moon": 0.5}))
    with pytest.raises(UserError, match=r"state\.json has the field phase_of_the_moon"):
        read_state(checkpoint)


FILES = ["model.safetensors", "optimizer/state.safetensors", "state.json", "data_manifest.json", "COMPLETE"]


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    file.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(checkpoint, name, damage):
    newer = checkpoint.with_name("step-00000002")
    shutil.copytree(checkpoint, newer)
    file, said = newer / name, []
    assert newest_whole(checkpoint.parent, said.append) == newer
    assert not said
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        file.unlink()
    else:
        flip(file, 8 * (file.stat().st_size // 2))
    assert newest_whole(checkpoint.parent, said.append) == checkpoint
    [reason] = said
    assert f"{newer} is not whole" in reason
    if name != "COMPLETE":
        assert name in reason
    assert {"cut": "bytes, not", "flipped": "damaged", "missing": "missing"}[damage] in reason or name == "COMPLETE"


def test_no_single_bit_of_complete_can_be_wrong(checkpoint):
    file = checkpoint / COMPLETE
    content, random_bits = file.read_bytes(), random.Random(0)
    for bit in [*range(64), *random_bits.sample(range(8 * len(content)), 150)]:
        flip(file, bit)
        assert find_damage(checkpoint), file.read_bytes()
        file.write_bytes(content)
    assert find_damage(checkpoint) is None


def test_a_checkpoint_set_aside_counts_until_its_successor_is_there(checkpoint):
    aside = checkpoint.rename(checkpoint.with_name(".step-00000001.replaced"))
    assert list_checkpoints(checkpoint.parent) == [(1, aside)]
    shutil.copytree(aside, checkpoint)
    assert list_checkpoints(checkpoint.parent) == [(1, checkpoint)]
