"""Runs with adapters in two processes, and on a device that compiles slowly."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt.compose import compose_run
from gpt.model.transformer import GPT
from gpt.training.trainer import Trainer
from tests.training.conftest import needs_neuron_sim, settings
from tests.training.finetuning import SUMS, save_small_model, write_rows
from tests.training.test_processes import assert_same_losses, curve, launch

EXAMPLES = ["data=jsonl", "data.packing=none", "train.batch_tokens=512", "train.budget=8steps", "optimizer=adamw", "optimizer.lr=1e-2"]
ADAPTERS = ["lora.rank=3", "lora.dora=true", "lora.targets=[q, feedforward]", "train.ema=0.9", "train.grad_clip=0.5"]


@pytest.fixture
def settings_of_runs(tmp_path, cache_dir) -> list[str]:
    """Of small runs on examples, with adapters."""
    model, rows = save_small_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", SUMS)
    return [*settings(tmp_path, cache_dir), *EXAMPLES, *ADAPTERS, f"init={model}", f"data.paths=[{rows}]"]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_every_layout_trains_the_adapters_of_one_process(settings_of_runs, tmp_path):
    """DDP, FSDP, and what FSDP began in two processes going on in one."""
    steady = "schedule=constant"
    layouts = {"ddp": ["parallel=ddp"], "fsdp": ["parallel=fsdp"], "moved": ["parallel=fsdp", "train.budget=4steps"]}
    configs = {
        name: compose_run("finetune", [*settings_of_runs, steady, "train.micro_batch=1", *layout]) for name, layout in layouts.items()
    }
    launch(configs, tmp_path / "two", 2)
    for name in ("one", "moved"):
        config = compose_run("finetune", [*settings_of_runs, steady, "train.micro_batch=4", f"run.id={name}"])
        assert Trainer(config).fit().exit_code == 0
    start = dict(GPT.from_pretrained(tmp_path / "model").named_parameters())
    expected = adapter(tmp_path / "runs" / "one")
    for name in layouts:
        run = tmp_path / "runs" / name
        assert curve(run, "loss") == pytest.approx(curve(tmp_path / "runs" / "one", "loss"), abs=1e-5)
        assert curve(run, "grad_norm") == pytest.approx(curve(tmp_path / "runs" / "one", "grad_norm"), rel=1e-4)
        ours = adapter(run)
        assert ours.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(ours[key], tensor, rtol=0, atol=2e-4, msg=f"{name}: {key}")
        stored = load_file(run / "checkpoints" / "step-00000008" / "model.safetensors")
        assert all(torch.equal(stored[parameter], p) for parameter, p in start.items()), "the base is as it was"


@needs_neuron_sim
def test_as_many_graphs_are_compiled_as_were_foreseen(settings_of_runs, tmp_path):
    """Blocks with other adapters are of another kind, and have the CPU's losses: two in training and in evaluation, and the softmax."""
    overrides = [*settings_of_runs, "lora.targets=[q, blocks.1.feedforward]", "train.micro_batch=4"]
    launch({"sim": compose_run("finetune", [*overrides, "device=neuron_sim", "compile=true"])}, tmp_path / "sim", 1)
    assert Trainer(compose_run("finetune", [*overrides, "run.id=cpu"])).fit().exit_code == 0
    assert_same_losses(tmp_path / "runs" / "sim", tmp_path / "runs" / "cpu", 8)
    assert "Graphs: 5 compiled, as expected" in (tmp_path / "runs" / "sim" / "rehearsal.txt").read_text()
