"""When compiling pays, and what is said where it cannot be."""

import os
import subprocess
import sys

import pytest
import torch

from gpt.model import native_attention, native_products, native_rowwise
from gpt.model.config import GPTConfig, LoRAConfig
from gpt.model.lora import adapted, adapter_parameters
from gpt.model.loss import LinearCrossEntropy
from gpt.model.transformer import GPT
from gpt.runtime.compiling import compile_model, native_throughout, should_compile, should_compile_decoding
from gpt.runtime.cpu import Cpu
from gpt.runtime.cuda import Cuda
from gpt.runtime.parallel import checkpoint_activations

CPU = Cpu("CPU", torch.float32)
GPU = Cuda("GPU", torch.bfloat16)


@pytest.fixture
def no_obstacle(monkeypatch):
    for kind in (Cpu, Cuda):
        monkeypatch.setattr(kind, "compile_obstacle", lambda self: None)


@pytest.mark.parametrize(
    ("setting", "length", "compiled"),
    [
        ("auto", {"flops": 1e11}, False),
        ("auto", {"flops": 1e16}, True),
        ("auto", {"seconds": 10}, False),
        ("auto", {"seconds": 600}, True),
        ("auto", {}, True),
        (False, {"flops": 1e16}, False),
        (True, {"flops": 1e3}, True),
        ("auto", {"seconds": 600, "native": True}, False),
        ("auto", {"seconds": 6000, "native": True}, True),
        ("auto", {"native": True}, False),
        (True, {"native": True}, True),
    ],
)
@pytest.mark.usefixtures("no_obstacle")
def test_auto_compiles_what_is_long_enough(setting, length, compiled):
    assert should_compile(setting, CPU, **length)[0] is compiled


@pytest.mark.parametrize(
    ("changes", "native"),
    [
        ({}, True),
        ({"parallel_residual": True, "positions": "rotary"}, False),
        ({"dropout": 0.1}, False),
        ({"activation": "gelu"}, False),
        ({"n_head": 8}, False),  # heads of 8
    ],
)
def test_what_is_native_throughout(monkeypatch, changes, native):
    for module in (native_rowwise, native_products):
        monkeypatch.setattr(module, "is_native", lambda: True)
    monkeypatch.setattr(native_attention, "is_native", lambda size: size % 16 == 0)
    model = GPTConfig(**{"n_layer": 1, "n_head": 2, "d_model": 64, "vocab_size": 64, **changes})
    assert native_throughout(Cpu("CPU", torch.bfloat16), model) is native
    assert not native_throughout(Cpu("CPU", torch.float32), model)
    assert not native_throughout(GPU, model)


def test_an_obstacle_is_named(monkeypatch):
    monkeypatch.setattr(Cpu, "compile_obstacle", lambda self: "there is no C++ compiler")
    assert should_compile(True, CPU) == (False, "not compiled: there is no C++ compiler, so the run is slower")


@pytest.mark.parametrize(
    ("setting", "device", "tokens", "compiled"),
    [
        ("auto", CPU, 10_000, False),
        ("auto", GPU, 255, False),
        ("auto", GPU, 256, True),
        (False, GPU, 10_000, False),
        (True, CPU, 1, True),
        (True, GPU, 1, True),
    ],
)
@pytest.mark.usefixtures("no_obstacle")
def test_auto_compiles_the_step_of_long_texts_on_a_gpu(setting, device, tokens, compiled):
    assert should_compile_decoding(setting, device, tokens)[0] is compiled


@pytest.mark.parametrize("setting", [True, "auto"])
def test_an_obstacle_to_compiling_the_step_is_named(setting, monkeypatch):
    monkeypatch.setattr(Cuda, "compile_obstacle", lambda self: "there is no Triton")
    assert should_compile_decoding(setting, GPU, 10_000) == (False, "not compiled: there is no Triton")


@pytest.mark.slow
def test_a_compiler_that_fails_is_a_warning(tmp_path, corpus, cache_dir):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho broken compiler >&2\nexit 1\n")
    broken.chmod(0o755)
    settings = (
        f"debug=golden compile=true train.budget=2steps data=text data.paths=[{corpus}] data.cache_dir={cache_dir} run.dir={tmp_path}"
    )
    done = subprocess.run(
        [sys.executable, "-m", "gpt", "pretrain", *settings.split()],
        env={**os.environ, "CXX": str(broken), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "not compiled, so the run is slower" in done.stderr


@pytest.mark.slow
def test_what_is_dropped_is_the_same_compiled_or_not():
    """In blocks, in adapters, and where activations are computed again."""
    tokens, gradients = torch.arange(32).reshape(2, 16), []
    for compiled in (False, True):
        torch.manual_seed(0)
        config = GPTConfig(vocab_size=61, context_length=16, n_layer=2, n_head=2, d_model=32, dropout=0.2)
        model = GPT(config, LoRAConfig(rank=4, dropout=0.3))
        for layer in adapted(model).values():
            torch.nn.init.normal_(layer.lora_b)
        checkpoint_activations(list(model.blocks), "full")
        if compiled:
            compile_model(model, LinearCrossEntropy(), CPU)
        torch.manual_seed(5)
        (model.train().hidden_states(tokens) * torch.linspace(-1, 1, 32)).sum().backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(model).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-3, msg=name)
