"""Runs with adapters: the base stays as it was to the bit, a resumed run is exact, and what is left loads everywhere with equal logits."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from gpt.commands import ExportConfig
from gpt.compose import compose_run
from gpt.errors import UserError
from gpt.inference.loading import load_model, read_shape
from gpt.model.lora import adapter_parameters
from gpt.model.transformer import GPT
from gpt.training.export import export
from gpt.training.metrics import read_metrics
from gpt.training.trainer import Trainer
from tests.training.finetuning import SUMS, finetune_config, stop_in_the_middle, write_rows

pytestmark = pytest.mark.usefixtures("no_report")

LORA = ["lora.rank=4", "optimizer.lr=2e-2", "train.log_every=1"]
TOKENS = torch.arange(32).reshape(2, 16) + 40
CLOSE: Any = {"rtol": 1e-4, "atol": 3e-5}


@pytest.fixture
def run(tmp_path, init):
    """Makes small fine-tuning runs; takes overrides, returns the run directory."""
    rows = write_rows(tmp_path / "rows.jsonl", SUMS)

    def make(name: str, *overrides: str, start: Path | str = init) -> Path:
        config = finetune_config(tmp_path, Path(start), rows, *LORA, f"run.id={name}", *overrides)
        assert Trainer(config).fit().exit_code == 0
        return tmp_path / "runs" / name

    return make


@torch.no_grad()
def stock_logits(model: Any) -> torch.Tensor:
    return model.eval()(TOKENS).logits


@torch.no_grad()
def ours(path: Path | str) -> torch.Tensor:
    return load_model(str(path)).model(TOKENS)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


@pytest.mark.parametrize("dora", ["false", "true"])
def test_a_run_learns_and_leaves_a_merged_model_and_an_adapter(run, init, dora):
    made = run("a", f"lora.dora={dora}", "train.budget=12steps")
    assert losses(made)[-1] < losses(made)[0] - 0.5
    stored, start = weights(made, 12), dict(GPT.from_pretrained(init).named_parameters())
    assert all(torch.equal(stored[name], p) for name, p in start.items()), "the base is as it was"
    assert {name.rpartition(".")[2] for name in stored.keys() - start.keys()} == {"lora_a", "lora_b"} | (
        {"magnitude"} if dora == "true" else set()
    )
    assert json.loads((made / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(init)
    expected = stock_logits(transformers.AutoModelForCausalLM.from_pretrained(made / "model"))
    assert (expected - stock_logits(transformers.AutoModelForCausalLM.from_pretrained(init))).abs().max() > 0.1
    torch.testing.assert_close(stock_logits(peft.AutoPeftModelForCausalLM.from_pretrained(made / "adapter")), expected, **CLOSE)
    for place in (made, made / "model", made / "adapter", made / "checkpoints" / "step-00000012"):
        torch.testing.assert_close(ours(place), expected, **CLOSE)


def test_a_run_that_is_interrupted_in_a_step_goes_on_exactly_as_if_it_had_not_been(tmp_path, run, init):
    more = ["lora.dropout=0.2", "train.micro_batch=2", "train.budget=6steps", "model.dropout=0.1", "lora.targets=[attention]"]
    whole = run("whole", *more)
    assert losses(whole) != losses(run("without", *[m for m in more if "lora.dropout" not in m])), "adapters have dropout"
    rows = tmp_path / "rows.jsonl"
    config = finetune_config(tmp_path, init, rows, *LORA, "run.id=cut", *more)
    assert stop_in_the_middle(Trainer(config), 3).exit_code == 143
    cut = tmp_path / "runs" / "cut"
    unfinished = ours(cut)
    assert Trainer(compose_run("finetune", [f"resume={cut}"])).fit().exit_code == 0
    assert losses(cut) == losses(whole)
    for name, tensor in weights(whole, 6).items():
        assert torch.equal(weights(cut, 6)[name], tensor), name
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes()
    assert not torch.equal(ours(cut), unfinished)


def test_export_writes_either_format_of_a_run_and_of_its_checkpoints(run, tmp_path, capsys):
    made = run("a")
    places = {"run": made, "checkpoint": made / "checkpoints" / "step-00000003"}
    for name, place in places.items():
        for kind in ("hf", "peft"):
            assert export(ExportConfig(run=str(place), output=str(tmp_path / name / kind), format=kind)) == 0
            torch.testing.assert_close(ours(tmp_path / name / kind), ours(made), rtol=0, atol=0)
    assert "adapters of" in capsys.readouterr().out
    assert (tmp_path / "run" / "peft" / "adapter_model.safetensors").stat().st_size < (made / "model" / "model.safetensors").stat().st_size
    with pytest.raises(UserError, match=r"^output=.*not empty"):
        export(ExportConfig(run=str(made), output=str(tmp_path / "run" / "peft"), format="peft"))
    with pytest.raises(UserError, match=r"^run=.* has no adapters to write in PEFT's format"):
        export(ExportConfig(run=str(run("full", "lora.rank=0", "optimizer.lr=1e-4")), format="peft"))
    with pytest.raises(UserError, match=r"^dtype=float16: adapters are small"):
        ExportConfig(run="x", format="peft", dtype="float16").validate()


def test_an_adapter_is_something_to_start_from(run, init):
    first = run("first")
    second = run("second", "lora.targets=[q, v]", start=first / "adapter")
    base = Path(json.loads((second / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"])
    assert base == second / "adapter" / "base", "which no one else has"
    torch.testing.assert_close(ours(base), ours(first), rtol=0, atol=0)
    torch.testing.assert_close(stock_logits(peft.AutoPeftModelForCausalLM.from_pretrained(second / "adapter")), ours(second), **CLOSE)
    assert read_shape(str(first / "adapter"))[0] == read_shape(str(init))[0]
    full = run("full", "lora.rank=0", start=first / "adapter")
    assert not (full / "adapter").exists()
    assert not torch.equal(ours(full), ours(first))


def test_adapters_can_be_frozen_and_more_than_they_can_be_set_free(run):
    frozen = run("frozen", "freeze.first_n_blocks=1", "freeze.embeddings=true", "train.budget=4steps")
    trained = weights(frozen, 4)
    b = {name: tensor for name, tensor in trained.items() if name.endswith("lora_b")}
    assert {name.split(".")[1] for name, tensor in b.items() if tensor.any()} == {"1"}
    torch.testing.assert_close(stock_logits(peft.AutoPeftModelForCausalLM.from_pretrained(frozen / "adapter")), ours(frozen), **CLOSE)
    gradual = run(
        "gradual",
        "freeze.first_n_blocks=1",
        "unfreeze=[{at: 2, patterns: [blocks.0.attention_norm, 'blocks.0.*.lora_?']}]",
        "train.budget=4steps",
    )
    assert not torch.equal(weights(gradual, 4)["blocks.0.attention_norm.weight"], trained["blocks.0.attention_norm.weight"])
    torch.testing.assert_close(stock_logits(peft.AutoPeftModelForCausalLM.from_pretrained(gradual / "adapter")), ours(gradual), **CLOSE)


def test_what_the_format_cannot_hold_is_said_and_the_merged_model_is_there(run, capsys):
    made = run("a", "freeze.first_n_blocks=1", "unfreeze=[{at: 2, all: true}]", "train.budget=4steps")
    assert "which PEFT's format cannot hold" in capsys.readouterr().err
    assert not (made / "adapter").exists()
    torch.testing.assert_close(
        stock_logits(transformers.AutoModelForCausalLM.from_pretrained(made / "model")),
        ours(made / "checkpoints" / "step-00000004"),
        **CLOSE,
    )


def test_a_moving_average_of_adapters_is_what_is_left(run):
    made = run("a", "train.ema=0.9", "optimizer=muon", "optimizer.adam_lr=2e-2")
    torch.testing.assert_close(ours(made), ours(made / "adapter"), **CLOSE)
    torch.testing.assert_close(ours(made), ours(made / "checkpoints" / "step-00000003"), **CLOSE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.rank=-2"], r"^lora\.rank=-2 must be at least 1"),
        (["lora.targets=[q_proj]"], r"^lora\.targets: q_proj is attention\.q here\. There are: attention\.q"),
        (["lora.targets=[blocks.2]"], r"^lora\.targets: no projection is called blocks\.2"),
        (["parallel=ddp", "parallel.tensor=2"], r"^lora\.rank=4: tensor parallelism does not divide adapters"),
        (["freeze.patterns=['*']"], r"^freeze: this plan leaves nothing to train"),
        (["freeze.patterns=['*.lora_c']"], r"^freeze\.patterns=\*\.lora_c matches no parameter"),
    ],
)
def test_impossible_settings_are_told_before_anything_is_written(overrides, message, tmp_path, init):
    rows = write_rows(tmp_path / "rows.jsonl", SUMS)
    with pytest.raises(UserError, match=message):
        Trainer(finetune_config(tmp_path, init, rows, *LORA, *overrides))
    assert not (tmp_path / "runs").exists()


def test_adapters_need_weights(tiny_config):
    with pytest.raises(UserError, match=r"^lora\.rank=8: adapters change weights that have been trained; add init="):
        tiny_config("lora.rank=8")


def test_an_adapter_whose_base_is_gone_is_told(run, init, tmp_path):
    made = run("a")
    file = made / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace(str(init), str(tmp_path / "gone")))
    with pytest.raises(UserError, match=r"^model=.*adapter: its base=.*gone: there is no such directory"):
        load_model(str(made / "adapter"))
    with pytest.raises(UserError, match=r"^init=.*adapter: its base=.*gone: there is no such directory"):
        read_shape(str(made / "adapter"))


def test_only_adapters_have_optimizer_state(run):
    made = run("a", "optimizer=adamw")
    state = load_file(made / "checkpoints" / "step-00000003" / "optimizer" / "state.safetensors")
    model = GPT(read_shape(str(made))[0], compose_run("finetune", [f"resume={made}"]).lora)
    assert {name.partition("|")[0] for name in state} == set(adapter_parameters(model))
