"""Runs on a real GPU: the CPU's losses, checkpoints to the bit, memory, attention kernels. Skipped, visibly, where there is none."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile

from gpt.cli import main
from gpt.compose import compose_run
from gpt.config import DeviceConfig
from gpt.data import prefetch
from gpt.model.config import GPTConfig
from gpt.model.transformer import GPT
from gpt.runtime.cuda import Cuda
from gpt.runtime.device import count_devices, find_device
from gpt.training import step as stepping
from gpt.training.metrics import read_metrics
from gpt.training.trainer import Trainer

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")]
ROOT = Path(__file__).parents[2]
MODEL = {"vocab_size": 257, "context_length": 256, "n_layer": 2, "n_head": 4, "d_model": 256}
GROUPS = {"n_kv_head": 2, "positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False}
# A run whose loss is nowhere near what it starts with, of every kind of step: accumulation, clipping, an average.
STEPS = ["debug=golden", "data=text", "train.budget=8steps", "train.batch_tokens=1024", "train.micro_batch=8", "train.grad_clip=0.2"]
STEPS += ["train.ema=0.9", "train.eval_every=4", "train.eval_tokens=1024", "train.final_eval_tokens=1024", "train.sample_prompts=[]"]
Settings = Callable[..., list[str]]


@pytest.fixture
def settings(tmp_path: Path, corpus: Path, cache_dir: Path) -> Settings:
    """A run of that name, of 8 steps unless it says otherwise."""
    places = [f"data.paths=[{corpus}]", f"data.cache_dir={cache_dir}", f"run.dir={tmp_path}"]
    return lambda name, *more: [*STEPS, *places, f"run.id={name}", *more]


def curve(run: Path, key: str) -> list[float]:
    return [line[key] for line in read_metrics(run / "metrics.jsonl") if key in line]


# Numbers


@pytest.mark.parametrize(
    "kind",
    [
        ["optimizer=adamw"],  # fused
        ["optimizer=muon", "model.positions=rotary", "model.n_head=4", "model.n_kv_head=2"],
        ["optimizer=adamw", "data.document_mask=true", "model.n_head=4", "model.n_kv_head=2"],  # a mask, and heads in groups
        ["optimizer=adamw", "train.activation_checkpointing=selective"],
    ],
    ids=["adamw", "muon", "documents", "checkpointing"],
)
def test_training_has_the_losses_of_the_cpu(kind, settings, tmp_path):
    """In fp32, eager and compiled; what products in TF32 would be off by is more than is allowed here."""
    for name, device, compiled in (("cpu", "cpu", "false"), ("eager", DEVICE, "false"), ("compiled", DEVICE, "true")):
        result = Trainer(compose_run("pretrain", settings(name, f"device={device}", f"compile={compiled}", "precision=fp32", *kind))).fit()
        assert result.exit_code == 0
    cpu = tmp_path / "cpu"
    assert curve(cpu, "loss")[-1] < curve(cpu, "loss")[0] - 0.1
    for name in ("eager", "compiled"):
        for key, tolerance in (("loss", 1e-4), ("val_loss", 1e-4), ("grad_norm", 1e-3)):
            assert len(curve(cpu, key)) > 1
            assert curve(tmp_path / name, key) == pytest.approx(curve(cpu, key), abs=tolerance), (name, key)


def test_bf16_trains_compiled_and_its_weights_are_the_cpus_to_load(settings, tmp_path):
    result = Trainer(compose_run("pretrain", settings("r", f"device={DEVICE}", "precision=auto", "compile=true"))).fit()
    assert result.exit_code == 0
    losses = curve(tmp_path / "r", "loss")
    assert losses[-1] < losses[0] - 0.1
    tokens = torch.arange(64)[None]
    logits = [GPT.from_pretrained(str(tmp_path / "r" / "model")).to(place).eval()(tokens.to(place)).cpu() for place in ("cpu", DEVICE)]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-2, rtol=1e-2)


def test_it_resumes_to_the_bit(settings, tmp_path):
    """With dropout, whose random numbers are the GPU's own, by torch's deterministic kernels."""
    program = """
import sys, torch
torch.use_deterministic_algorithms(True)
from gpt.cli import main
sys.exit(main(sys.argv[1:]))
"""

    def train(*arguments: str) -> None:
        environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program, "pretrain", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, check=False)
        assert done.returncode == 0, done.stderr

    same = [f"device={DEVICE}", "model.dropout=0.2", "schedule=constant", "optimizer=muon", "checkpoint.every=1000steps"]
    train(*settings("whole", *same))
    train(*settings("parts", *same, "train.budget=4steps"))
    train(f"resume={tmp_path / 'parts'}", "train.budget=8steps")
    assert curve(tmp_path / "parts", "loss") == curve(tmp_path / "whole", "loss")
    last = [tmp_path / name / "checkpoints" / "step-00000008" for name in ("whole", "parts")]
    for file in ("model.safetensors", "optimizer/state.safetensors", "ema.safetensors"):
        whole, parts = (load_file(path / file) for path in last)
        assert whole.keys() == parts.keys()
        assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items()), file


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_is_left_out_on_the_device(optimizer, settings, tmp_path, monkeypatch):
    """By the fused kernel's own flag for AdamW: the weights of the step before stay as they are."""
    whole, weights = stepping.Step.__call__, []

    def spoiled(step: stepping.Step, *arguments, **options) -> bool:
        number = len(weights)
        handle = step.trainable[0].register_hook(lambda gradient: gradient * torch.nan) if number == 3 else None
        done = whole(step, *arguments, **options)
        if handle is not None:
            handle.remove()
        weights.append([p.detach().clone() for p in step.trainable])
        return done

    monkeypatch.setattr(stepping.Step, "__call__", spoiled)
    result = Trainer(compose_run("pretrain", settings("r", f"device={DEVICE}", f"optimizer={optimizer}", "train.eval_every=0"))).fit()
    assert result.exit_code == 0
    assert result.state.skipped_steps == 1
    same = [all(torch.equal(a, b) for a, b in zip(weights[i], weights[i + 1], strict=True)) for i in range(7)]
    assert same == [False, False, True, False, False, False, False]


# Memory


def test_memory_is_counted_and_bounded():
    device = find_device(DeviceConfig(DEVICE))
    torch.accelerator.reset_peak_memory_stats()
    kept = torch.empty(64 << 20, dtype=torch.uint8, device=DEVICE)
    peak, limit = device.memory_bytes(), device.memory_limit()
    assert peak is not None
    assert limit is not None
    assert kept.nbytes <= peak < limit
    del kept
    assert device.memory_bytes() == peak
    assert limit == pytest.approx(torch.cuda.mem_get_info()[1], rel=0.02)
    assert count_devices(DeviceConfig(DEVICE)) == torch.cuda.device_count()


def gives_out(most: int) -> None:
    """Have torch's allocator end with an error beyond so many bytes, and give back what it keeps."""
    gc.collect()
    torch.accelerator.empty_cache()
    torch.cuda.set_per_process_memory_fraction(most / torch.cuda.get_device_properties().total_memory)


def test_a_micro_batch_that_cannot_fit_ends_with_advice_that_helps(settings, monkeypatch, capsys):
    """The GPU gives out 3 GiB, so that the attempt is short; the setting that is said to fit does."""
    most = 3 << 30
    monkeypatch.setattr(Cuda, "memory_limit", lambda self: most)
    gives_out(most)
    shape = ["model.d_model=256", "model.d_ff=1024", "model.n_layer=4", "model.context_length=256", "train.budget=2steps", "train.ema=0"]
    sizes = ["train.batch_tokens=65536", "train.eval_every=0", "train.eval_tokens=65536", "train.final_eval_tokens=65536"]
    run = ["pretrain", *settings("r", f"device={DEVICE}", *shape, *sizes), "train.micro_batch=256"]
    try:
        assert main(run) == 2
        said = capsys.readouterr().err
        needs = r"^gpt: out of memory while .*; the run needs about [\d.]+ GiB of the 3\.0 GiB that .*one of these:$"
        assert re.search(needs, said, re.M), said
        assert "Traceback" not in said
        found = re.search(r"^  train\.micro_batch=(\d+) saves [\d.]+ GiB, and the run fits", said, re.M)
        assert found, said
        gives_out(most)
        assert main([*run[:-1], f"train.micro_batch={found[1]}", "run.id=fits"]) == 0
        gives_out(most // 2)  # to the 64 sequences of 256 tokens that would be tried first
        assert main([*run[:-1], "train.micro_batch=auto", "run.id=tried"]) == 0
        assert "sequences: 64 do not fit into memory" in capsys.readouterr().err
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# Kernels


def passes(model: GPT, documents: torch.Tensor | None = None) -> set[str]:
    """The attention operators of a forward and backward pass in bf16."""
    tokens = torch.randint(MODEL["vocab_size"], (2, MODEL["context_length"]), device=DEVICE)
    with profile() as recorded, torch.autocast(DEVICE, torch.bfloat16):
        model.hidden_states(tokens, documents=documents).float().sum().backward()
    names = {event.key for event in recorded.key_averages()}
    return {name for name in names if name.startswith("aten::_scaled_dot_product_")}


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="flash attention needs an Ampere GPU")
@pytest.mark.parametrize("shape", [{}, GROUPS, {"n_head": 2}], ids=["plain", "groups", "head-128"])
def test_causal_attention_is_flash(shape):
    model = GPT(GPTConfig(**{**MODEL, **shape})).to(DEVICE)
    used = passes(model)
    assert used, "attention was not seen"
    assert all(re.search("flash|cudnn", name) for name in used), used
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where it cannot
        assert any("flash" in name for name in passes(model))


@pytest.mark.parametrize("shape", [{}, GROUPS], ids=["plain", "groups"])
def test_packed_documents_do_not_keep_all_scores(shape):
    """Their mask keeps flash attention out; the memory-efficient kernel takes it, but no heads in groups."""
    model = GPT(GPTConfig(**{**MODEL, **shape})).to(DEVICE)
    documents = (torch.arange(MODEL["context_length"], device=DEVICE) // 50).expand(2, -1)
    used = passes(model, documents)
    assert used, "attention was not seen"
    assert not any("math" in name for name in used), used
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        passes(model, documents)


# Batches


def test_batches_are_pinned_by_the_thread_that_makes_them(settings, monkeypatch):
    seen, threads = [], set()
    pin, move = prefetch._pinned, stepping.rows_on_device

    def pinned(batch):
        threads.add(threading.current_thread().name)
        return pin(batch)

    def rows_on_device(batch, those, *arguments):
        tensors = [t for t in (batch.tokens, batch.targets, batch.documents) if t is not None]
        seen.append((len(tensors), all(t.is_pinned() and t[those].is_pinned() for t in tensors)))
        moved = move(batch, those, *arguments)
        assert torch.equal(moved[0].tokens.cpu(), batch.tokens[those])
        return moved

    monkeypatch.setattr(prefetch, "_pinned", pinned)
    monkeypatch.setattr(stepping, "rows_on_device", rows_on_device)
    run = settings("r", f"device={DEVICE}", "train.budget=2steps", "data.document_mask=true", "train.eval_every=0")
    assert Trainer(compose_run("pretrain", run)).fit().exit_code == 0
    assert threads == {"prefetch"}
    assert set(seen) == {(3, True)}
