"""Runs on the simulated Trainium device: the CPU's losses, exactly the expected graphs, and refusals where the hardware would refuse."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt.compose import compose_run
from gpt.config import RunConfig
from gpt.data.batches import Batch
from gpt.training.step import Step
from tests import processes
from tests.training.conftest import needs_neuron_sim, settings
from tests.training.finetuning import SUMS, save_small_model, write_rows
from tests.training.test_processes import FREEZING, ROOT, TEXT, assert_same_losses, curve, launch

pytestmark = needs_neuron_sim
SIM = ["device=neuron_sim", "compile=true"]
TEN = ["train.budget=10steps", "train.eval_every=5", "train.eval_tokens=1024", "train.final_eval_tokens=1024"]


@pytest.fixture
def pretrain(tmp_path: Path, corpus: Path, cache_dir: Path) -> Callable[..., tuple[int, str]]:
    """`gpt pretrain` on the simulated device, after what is to be done first in its process: the exit code, and what it said."""

    def run(*overrides: str, command: str = "pretrain", first: Callable[[], None] | None = None) -> tuple[int, str]:
        arguments = [command, "data=text", f"data.paths=[{corpus}]", *settings(tmp_path, cache_dir), *SIM, *overrides]
        process = processes.Forked(processes.gpt, arguments, first, log=tmp_path / f"{len(list(tmp_path.iterdir()))}.log")
        _, said = process.communicate(200)
        return process.wait(), said

    return run


@pytest.fixture
def examples_run(tmp_path: Path, cache_dir: Path) -> Callable[..., RunConfig]:
    """Fine-tuning on masked examples of uneven length, with frozen parts."""
    model, rows = save_small_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", SUMS[:48])

    def make(*overrides: str) -> RunConfig:
        data = ["data=jsonl", f"data.paths=[{rows}]", f"init={model}", "data.packing=none", "train.batch_tokens=512", *FREEZING]
        return compose_run("finetune", [*settings(tmp_path, cache_dir), *data, *TEN, "optimizer=muon", *overrides])

    return make


def test_every_kind_of_run_has_the_cpus_losses_and_exactly_its_graphs(text_run, examples_run, tmp_path):
    """Muon, an average, accumulation and clipping; AdamW and packed documents; activation checkpointing; examples, with frozen parts."""
    kinds = {
        "muon": (text_run, [*TEXT, *TEN, "train.micro_batch=4"], 3),
        "adamw": (text_run, ["train.batch_tokens=1024", "optimizer=adamw", "data.document_mask=true", *TEN], 3),
        "checkpointing": (text_run, [*TEXT, *TEN, "train.micro_batch=8", "train.activation_checkpointing=every_n"], 5),
        "examples-frozen": (examples_run, ["train.micro_batch=4"], 5),
    }
    launch({f"{name}-cpu": make(*given) for name, (make, given, _) in kinds.items()}, tmp_path / "cpu", 1)
    launch({f"{name}-sim": make(*given, *SIM) for name, (make, given, _) in kinds.items()}, tmp_path / "sim", 1)
    for name, (_, _, graphs) in kinds.items():
        run = tmp_path / "runs" / f"{name}-sim"
        assert_same_losses(run, tmp_path / "runs" / f"{name}-cpu", 10)
        assert curve(run, "graphs")[-1] == graphs, name
        assert f"Graphs: {graphs} compiled, as expected" in (run / "rehearsal.txt").read_text(), name


def test_two_processes_have_the_losses_of_one(text_run, examples_run, tmp_path):
    layouts = {"ddp": ["parallel=ddp"], "fsdp": ["parallel=fsdp"], "tensor": ["parallel=ddp", "parallel.tensor=2"]}
    text = [*TEXT, *TEN, "train.micro_batch=4"]
    launch({"text-one": text_run(*text), "frozen-one": examples_run("train.micro_batch=4")}, tmp_path / "one", 1)
    configs = {f"text-{name}": text_run(*text, *layout, *SIM) for name, layout in layouts.items()}
    for name in ("ddp", "fsdp"):  # each with a cache of its own for what frozen blocks make
        own = f"data.cache_dir={tmp_path / f'cache-{name}'}"
        configs[f"frozen-{name}"] = examples_run("train.micro_batch=4", *layouts[name], *SIM, own)
    launch(configs, tmp_path / "two", 2)
    for name in configs:
        run = tmp_path / "runs" / name
        assert_same_losses(run, tmp_path / "runs" / f"{name.partition('-')[0]}-one", 10)
        assert curve(run, "graphs")[-1] == (3 if name.startswith("text") else 5), name
        assert "on 2 ranks" in (run / "rehearsal.txt").read_text()


def test_it_resumes_to_the_bit_and_its_checkpoints_go_on_elsewhere(text_run, tmp_path):
    half, whole = ["train.budget=6steps", "schedule=constant"], ["train.budget=12steps", "schedule=constant"]
    launch({"whole": text_run(*TEXT, *SIM, *whole), "parts": text_run(*TEXT, *SIM, *half)}, tmp_path / "one", 1)
    launch({"moved": text_run(*TEXT, *SIM, *half)}, tmp_path / "two", 1)
    launch({"parts": text_run(*TEXT, *SIM, *whole)}, tmp_path / "three", 1)
    launch({"moved": text_run(*TEXT, *whole)}, tmp_path / "four", 1)
    last = [tmp_path / "runs" / name / "checkpoints" / "step-00000012" for name in ("whole", "parts")]
    for file in ("model.safetensors", "optimizer/state.safetensors", "ema.safetensors"):
        found = [load_file(path / file) for path in last if (path / file).is_file()]
        assert len(found) == 2, [p.name for p in last[0].rglob("*")]
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items()), file
    for name in ("parts", "moved"):
        assert curve(tmp_path / "runs" / name, "loss") == pytest.approx(curve(tmp_path / "runs" / "whole", "loss"), abs=1e-5)


def shorten_a_batch() -> None:
    """The fifth batch has a sequence less than the others."""
    step = Step.__call__

    def shortened(self: Step, batch: Batch, *arguments, **options) -> bool:
        if int(self.counts.values["losses"]) == 4:
            batch = dataclasses.replace(batch, tokens=batch.tokens[:-1], targets=batch.targets[:-1])
        return step(self, batch, *arguments, **options)

    Step.__call__ = shortened


def test_a_graph_that_is_compiled_anew_ends_the_run_with_the_shape(pretrain):
    code, said = pretrain("run.id=r", "train.eval_every=0", first=shorten_a_batch)
    assert code == 2, said
    assert re.search(r"^gpt: training would compile a graph anew .* size mismatch at index 0\. expected 8, actual 7", said, re.M)
    assert "Traceback" not in said


def test_what_the_chip_lacks_ends_the_run_or_is_named(pretrain, tmp_path):
    lacks = "device.unsupported=[aten::linalg_vector_norm]"
    code, said = pretrain("run.id=strict", lacks)
    assert code == 2, said
    assert re.search(r"^gpt: the device has no kernel for aten::linalg_vector_norm.*device\.strict=false", said, re.M), said
    code, said = pretrain("run.id=lax", lacks, "device.strict=false", "train.budget=4steps")
    assert code == 0, said
    assert re.search(r"warning: these operations have no kernel.*linalg_vector_norm", said)
    report = (tmp_path / "runs" / "lax" / "rehearsal.txt").read_text()
    assert "on the CPU, for want of a kernel: aten::linalg_vector_norm" in report
    code, said = pretrain("run.id=compiled", "device.unsupported=[aten::mm]")
    assert code == 2, said
    assert "aten::mm is not supported" in said


def test_precompiling_runs_both_passes_and_leaves_nothing(pretrain, tmp_path):
    code, said = pretrain(command="precompile")
    assert code == 0, said
    assert "compiled: a rehearsal keeps nothing" in said
    assert "Graphs: 3 compiled, as expected" in said
    assert not (tmp_path / "runs").exists()


def test_the_report_says_what_a_real_chip_would_hold_and_take(pretrain, tmp_path):
    code, said = pretrain("run.id=r", "train.budget=4steps", "device.chip=trn3", "device.mfu=0.5", "precision=bf16")
    assert code == 0, said
    text = (tmp_path / "runs" / "r" / "rehearsal.txt").read_text()
    assert text.startswith("Rehearsal of trn3 on 1 rank\n")
    assert text.strip() in said
    assert re.search(r"1\. Block\.forward, forward: \d+ operations on \(8, 64, 64\)", text)
    assert re.search(r"memory of the device +36 GiB", text)
    assert "50% of the chip's 167.8 TFLOP/s" in text
    assert re.search(r"the run's 4 steps, both together: [\d.e-]+ ms", text)
    assert max(len(line) for line in text.splitlines()) <= 100


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "files",
    [["test_trainer"], ["test_finetune", "test_training_data"], ["test_spikes", "test_export", "test_weight_average", "test_micro_batch"]],
)
def test_the_trainers_own_tests_pass_on_it(files):
    """The tests of training as they are, with every run that names no device on the simulated one."""
    paths = [str(Path(__file__).with_name(f"{name}.py")) for name in files]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GPT_TEST_DEVICE": "neuron_sim"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "not slow", *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=880, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
