"""`gpt parity`: a sound device agrees, and a fault that is planted into one layer of the device's pass alone is named there."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.cli import main
from gpt.compose import compose_run
from gpt.config import DeviceConfig, RunConfig
from gpt.model.kernels import without_native
from gpt.model.loss import IGNORE
from gpt.runtime.device import find_device
from gpt.training import parity as module
from gpt.training.layout import Layout, first_weights, lay_out
from gpt.training.parity import FLOOR, LOGITS, LOSS, Error, Place, _observe, _one_batch, compare, judge, parity
from tests.training.conftest import needs_neuron_sim
from tests.training.finetuning import save_small_model

SMALL = ["debug=golden", "model.n_layer=4", "train.batch_tokens=256", "device=cpu"]
GPT2 = ["model.norm=layernorm", "model.bias=true", "model.activation=gelu_tanh", "model.qk_norm=false", "model.positions=learned"]
UNTIED = ["model.tie_embeddings=false"]
NEOX = [*GPT2[:3], "model.qk_norm=false", "model.rope_fraction=0.25", "model.parallel_residual=true", *UNTIED]
SHAPES = {
    "qwen3": [],
    "qwen3-untied": UNTIED,
    "llama-gqa": ["model.qk_norm=false", "model.n_kv_head=1", *UNTIED],
    "gpt2": GPT2,
    "neox": NEOX,
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("gpt.training.parity.gc.collect", lambda *_: 0)  # among everything that pytest holds it takes longer than a pass


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, stdlib_files: list[Path]) -> Path:
    """A folder of short texts: rows hold several."""
    folder = tmp_path_factory.mktemp("texts")
    text = stdlib_files[0].read_text(encoding="utf-8") + stdlib_files[1].read_text(encoding="utf-8")
    for number in range(200):
        (folder / f"{number:03d}.txt").write_text(text[50 * number : 50 * number + 50], encoding="utf-8")
    return folder


@pytest.fixture
def config_of(texts: Path, cache_dir: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Composes a small `gpt parity` on a CPU in fp32, not compiled; takes overrides."""
    places = ["data=text", f"data.paths=[{texts}]", f"data.cache_dir={cache_dir}", f"run.dir={tmp_path / 'runs'}"]
    return lambda *overrides: compose_run("parity", [*SMALL, *places, *overrides])


@pytest.fixture
def plant(monkeypatch) -> Callable[[Callable[[Layout], None]], None]:
    """Has the device's pass, and no other, compute with a fault; it counts as compiled, and is not."""

    def planted(fault: Callable[[Layout], None]) -> None:
        def lay_out_with_it(config: RunConfig, weights: Any, compiled: bool, *where: Any) -> Layout:
            layout = lay_out(config, weights, False, *where)
            if compiled:
                fault(layout)
            return layout

        monkeypatch.setattr(module, "lay_out", lay_out_with_it)
        monkeypatch.setattr(module, "should_compile", lambda *_: (True, ""))

    return planted


@pytest.fixture
def other_kernels(monkeypatch) -> None:
    """Compiles with a backend that takes no time: the kernels are eager's, but attention and GELU those that are made to be compiled."""

    def compile_in_place(model: Any, *_: Any) -> None:
        for block in model.blocks:
            block.compile(dynamic=False, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr("gpt.training.layout.compile_model", compile_in_place)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """Stdout as one line."""
    return " ".join(capsys.readouterr().out.split())


def largest_times(text: str) -> float:
    """Of a verdict that all agrees."""
    found = re.search(r"agrees with the CPU: at most ([\d.]+) times", text)
    assert found, text
    return float(found[1])


# A sound device


@pytest.mark.usefixtures("other_kernels")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_other_kernels_agree(shape, precision, config_of, capsys):
    assert parity(config_of(*SHAPES[shape], f"precision={precision}", "compile=true")) == 0
    text = said(capsys)
    assert 0 < largest_times(text) < 2
    if precision == "bf16":
        assert largest_times(text) != 1, "the kernels are the same, and the comparison of no worth"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_the_compiler_makes_agrees(precision, config_of, capsys):
    assert parity(config_of("compile=auto", f"precision={precision}", "data.document_mask=true", "model.n_layer=2")) == 0
    text = said(capsys)
    assert "CPU, 1 threads, compiled" in text.replace(f"{torch.get_num_threads()} threads", "1 threads")
    assert largest_times(text) < 2


def test_activation_checkpointing_agrees(config_of, capsys):
    assert parity(config_of("train.activation_checkpointing=full", "precision=bf16")) == 0
    assert 0 < largest_times(said(capsys)) < 2


@pytest.mark.parametrize("overrides", [[], GPT2, UNTIED, ["data.document_mask=true"]], ids=str)
def test_what_is_compared_is_what_the_model_computes(overrides, config_of):
    config = config_of(*overrides)
    batch = _one_batch(config)
    targets = int((batch.targets != IGNORE).sum())
    observe = partial(_observe, config, batch, targets, find_device(DeviceConfig("cpu"), "fp32"), False)
    model = first_weights(config, True, print)
    logits = model(batch.tokens, documents=batch.documents)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    loss.backward()
    for found in (observe(), observe(exact=True)):
        torch.testing.assert_close(found[LOGITS], logits.flatten(0, 1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[LOSS], loss)
        gradients = {f"{place.layer}.{place.part}": x for place, x in found.items() if place.backward and place.part != "input"}
        assert gradients.keys() == {name for name, _ in model.named_parameters()}
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, atol=1e-6, rtol=1e-4)
    assert [*dict.fromkeys(place.layer for place in observe())] == [
        "embeddings", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "final_norm", "logits", "loss", "head",
    ]  # fmt: skip
    backward = [place.layer for place in observe() if place.backward]
    assert [*dict.fromkeys(backward)] == ["head", "final_norm", "blocks.3", "blocks.2", "blocks.1", "blocks.0", "embeddings"]


# Faults, one in the device's pass


def after(layer: str, change: Callable[[Tensor], Tensor], layout: Layout) -> None:
    """Have a module give something else."""
    layout.model.get_submodule(layer).register_forward_hook(lambda module, inputs, x: cast(Any, change(cast(Tensor, x))))


def before(layer: str, change: Callable[[Tensor], Tensor], layout: Layout) -> None:
    layout.model.get_submodule(layer).register_forward_pre_hook(lambda module, inputs: (change(inputs[0]), *inputs[1:]))


def gradient(name: str, change: Callable[[Tensor], Tensor], layout: Layout) -> None:
    layout.model.get_parameter(name).register_hook(change)


def weight(name: str, change: Callable[[Tensor], Any], layout: Layout) -> None:
    with torch.no_grad():
        change(layout.model.get_parameter(name))


def nan_at(x: Tensor, *place: int) -> Tensor:
    x = x.clone()
    x[place] = torch.nan
    return x


def wrong_last_token(x: Tensor) -> Tensor:
    return torch.cat([x[:, :-1], x[:, :1]], dim=1)


class WrongGradient(torch.autograd.Function):
    """Its input, and a gradient that is 10 % too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 1.1


def sees_the_future(layout: Layout) -> None:
    attention = layout.model.get_submodule("blocks.1.attention")
    given = attention.forward

    def forward(x: Tensor, rotary: Any, cache: Any = None, mask: Any = None) -> Tensor:
        with without_native():  # which never looks ahead, whatever the mask
            return given(x, rotary, cache, torch.zeros(1, 1, x.shape[1], x.shape[1], dtype=torch.get_autocast_dtype("cpu")))

    attention.forward = forward


def no_rotation(layout: Layout) -> None:
    layout.model.get_buffer("rotary_cos").fill_(1)
    layout.model.get_buffer("rotary_sin").fill_(0)


def ignores_documents(layout: Layout) -> None:
    given = layout.model.hidden_states
    layout.model.hidden_states = lambda tokens, cache=None, documents=None, **way: given(tokens, cache, **way)


def wrong_loss(layout: Layout) -> None:
    layout.objective.register_forward_hook(lambda module, inputs, x: cast(Any, cast(Tensor, x) * 1.001))


def untied(layout: Layout) -> None:
    """As a move to a device does it."""
    layout.model.head.weight = nn.Parameter(layout.model.head.weight.detach().clone())


def not_trained(layout: Layout) -> None:
    layout.model.get_parameter("blocks.2.attention.v.weight").requires_grad_(False)


FAULTS = [
    (partial(after, "blocks.2", lambda x: x * 1.02), [], "the output of blocks.2: it is off by"),
    (partial(after, "blocks.0.attention", lambda x: x * 1.3), [], "the output of blocks.0: it is off by"),
    (partial(after, "blocks.3.feedforward", lambda x: x.roll(1, 1)), [], "the output of blocks.3: it is off by"),
    (partial(after, "blocks.2", wrong_last_token), [], "the output of blocks.2: it is off by"),
    (partial(after, "blocks.1", lambda x: nan_at(x, 0, 3, 5)), [], "the output of blocks.1: it gives no finite number"),
    (partial(after, "embeddings", lambda x: x.roll(1, 1)), [], "the output of embeddings: it is off by"),
    (partial(weight, "embeddings.positions.weight", lambda p: p.copy_(p.roll(1, 0))), GPT2, "the output of embeddings: it is off by"),
    (partial(weight, "final_norm.weight", lambda p: p.mul_(1.05)), [], "the output of final_norm: it is off by"),
    (partial(weight, "final_norm.bias", lambda p: p.add_(0.05)), GPT2, "the output of final_norm: it is off by"),
    (partial(weight, "head.weight", lambda p: p.mul_(1.05)), UNTIED, "the logits: it is off by"),
    (sees_the_future, [], "the output of blocks.1: it is off by"),
    (no_rotation, [], "the output of blocks.0: it is off by"),
    (ignores_documents, ["data.document_mask=true"], "the output of blocks.0: it is off by"),
    (wrong_loss, [], "the loss: it is off by"),
    (partial(gradient, "blocks.1.feedforward.up.weight", lambda g: g * 1.1), [], "the gradient of blocks.1.feedforward.up.weight:"),
    (partial(gradient, "blocks.3.attention.q.bias", lambda g: -g), GPT2, "the gradient of blocks.3.attention.q.bias: it is off by"),
    (partial(gradient, "blocks.2.attention.k_norm.weight", lambda g: g * 0), [], "the gradient of blocks.2.attention.k_norm.weight:"),
    (partial(gradient, "final_norm.weight", lambda g: nan_at(g, 3)), [], "the gradient of final_norm.weight: it gives no finite number"),
    (partial(gradient, "head.weight", lambda g: g * 1.1), UNTIED, "the gradient of head.weight: it is off by"),
    (partial(before, "blocks.2", WrongGradient.apply), [], "the gradient that blocks.2 hands down: it is off by"),
    (partial(before, "final_norm", WrongGradient.apply), [], "the gradient that final_norm hands down: it is off by"),
    (untied, [], "the gradient of embeddings.tokens.weight: it is off by"),
    (not_trained, [], "the gradient of blocks.2.attention.v.weight: it gives no finite number"),
]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("fault", "overrides", "where"), FAULTS, ids=[f"{i}-{where.split(':')[0]}" for i, (*_, where) in enumerate(FAULTS)]
)
def test_a_fault_is_named_where_it_is(fault, overrides, where, precision, plant, config_of, capsys):
    plant(fault)
    assert parity(config_of(*overrides, f"precision={precision}")) == 1
    text = said(capsys)
    assert f"cpu departs from the CPU first in {where}" in text
    assert ("; the forward pass agrees." in text) == ("the gradient" in where)
    assert "Not compiled, it agrees: what the compiler made is wrong." in text


def test_a_narrower_precision_than_asked_for_departs(plant, config_of, capsys):
    def narrow(layout: Layout) -> None:
        given = layout.model.get_submodule("blocks.1.feedforward").forward

        def forward(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return given(x)

        layout.model.get_submodule("blocks.1.feedforward").forward = forward

    plant(narrow)
    assert parity(config_of()) == 1
    assert "first in the output of blocks.1" in said(capsys)


def test_a_fault_that_is_not_the_compilers_is_said_to_be_none(monkeypatch, config_of, capsys):
    """The device's two passes come last; the three before it are the CPU's own."""
    passes = []

    def lay_out_with_a_fault(config: RunConfig, weights: Any, compiled: bool, *where: Any) -> Layout:
        layout = lay_out(config, weights, False, *where)
        passes.append(compiled)
        if len(passes) > 3:
            after("blocks.2", lambda x: x * 1.02, layout)
        return layout

    monkeypatch.setattr(module, "lay_out", lay_out_with_a_fault)
    monkeypatch.setattr(module, "should_compile", lambda *_: (True, ""))
    assert parity(config_of()) == 1
    assert passes == [False, False, False, True, False]
    assert "Not compiled, it departs too, first in the output of blocks.2." in said(capsys)


# Given weights


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_given_weights_are_compared(precision, tmp_path, config_of, plant, capsys):
    init = save_small_model(tmp_path / "model")
    tokenizer = [f"init={init}", f"precision={precision}"]
    config = config_of()  # whose model is not that of init
    config = compose_run("parity", [
        "device=cpu", "compile=false", "data=text", f"data.paths={config.data.paths}", f"data.cache_dir={config.data.cache_dir}",
        "train.batch_tokens=256", "train.eval_tokens=1024", *tokenizer,
    ])  # fmt: skip
    assert parity(config) == 0
    text = said(capsys)
    assert "0.04M parameters" in text
    assert str(init) in text.replace(" ", "")
    plant(partial(after, "blocks.1", lambda x: x * 1.05))
    assert parity(config) == 1
    assert "first in the output of blocks.1" in said(capsys)


def test_weights_that_give_no_numbers_anywhere_are_not_the_devices_fault(tmp_path, config_of, monkeypatch):
    def broken(config: RunConfig, *rest: Any) -> Any:
        model = first_weights(config, *rest)
        weight("blocks.1.attention.q.weight", lambda p: p.fill_(torch.nan), Layout(model, model))
        return model

    monkeypatch.setattr(module, "first_weights", broken)
    with pytest.raises(ValueError, match=r"^model: .* no finite numbers in fp64 either, first in the output of blocks\.1;"):
        parity(config_of())


def test_dropout_is_left_out(config_of, capsys):
    assert parity(config_of(*GPT2, "model.dropout=0.2", "precision=bf16")) == 0
    out, err = capsys.readouterr()
    assert "model.dropout=0.2" in err
    assert 0 < largest_times(" ".join(out.split())) < 2


# The yardstick


def test_the_micro_batch_is_the_runs_own(config_of, capsys):
    config = config_of("train.batch_tokens=512", "train.micro_batch=2")
    assert _one_batch(config).tokens.shape == (2, 64)
    config = config_of("train.batch_tokens=16384")
    assert _one_batch(config).tokens.shape == (64, 64)  # 4,096 tokens of it


def test_a_gradient_that_is_zero_is_measured_against_its_layers():
    """A key's bias moves all scores of a query alike: its gradient is rounding and nothing else."""
    matrix, bias = Place(True, "blocks.0", "attention.k.weight"), Place(True, "blocks.0", "attention.k.bias")
    exact = {matrix: torch.full((8, 8), 2.0), bias: torch.full((8,), 1e-10)}
    errors = compare({matrix: torch.full((8, 8), 2.0), bias: torch.full((8,), 1e-3)}, exact)
    assert errors[matrix] == Error(0.0, 0.0, 0.0)
    assert errors[bias].relative == pytest.approx(1e-3 * 8**0.5 / 16, rel=1e-4)
    assert errors[bias].largest == pytest.approx(1e-3, rel=1e-4)


def test_a_loss_that_the_cpu_happens_to_hit_is_measured_by_its_logits():
    def column(logits: float, loss: float) -> dict[Place, Error]:
        return {LOGITS: Error(0.01, logits, 1.0), LOSS: Error(loss, 8 * loss, 8 * loss)}

    cpu, exact = column(0.08, 0.0), column(0.0, 0.0)
    (_, found) = judge([exact, cpu, column(0.08, 3e-4)], 1, loss=8.0, targets=1024)
    assert found.times == pytest.approx(3e-4 / (0.08 / 32 / 8))
    assert not found.departs
    (_, found) = judge([exact, cpu, column(0.08, 3e-3)], 1, loss=8.0, targets=1024)
    assert found.departs
    (_, found) = judge([exact, exact, column(0.0, 2 * FLOOR)], 1, loss=8.0, targets=1024)
    assert found.times == 2


# On the command line


def test_the_command_prints_at_80_columns_and_leaves_nothing_behind(tmp_path, texts, cache_dir, monkeypatch, plant, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    places = ["data=text", f"data.paths=[{texts}]", f"data.cache_dir={cache_dir}"]
    plant(partial(after, "blocks.10", lambda x: x * 1000))
    assert main(["parity", *SMALL, "model.n_layer=12", *places]) == 1
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 80
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows if row and re.fullmatch(r"blocks\.\d+", row[0])] == [
        *(f"blocks.{i}" for i in range(12)), *(f"blocks.{i}" for i in reversed(range(12))),
    ]  # fmt: skip
    assert [row[0] for row in rows if row[-1:] == ["departs"]][:3] == ["blocks.10", "blocks.11", "final_norm"]
    assert "computing: CPU bf16" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["device=mps" if not torch.backends.mps.is_available() else "device=cuda"], "there is none here"),
        (["parallel=ddp"], "parallel=ddp: gpt parity compares one device with the CPU; leave it out"),
        (["resume=elsewhere"], "resume=elsewhere: gpt parity continues no run; init=<run> takes its weights and their shape"),
        (["-m", "seed=1,2"], "-m: gpt parity has no sweeps; they are of gpt pretrain and gpt finetune"),
        (["seed=1,2"], "gpt: seed=1,2: must be one value\n"),
        (["model.n_hed=3"], "model.n_hed=3: no such key. Did you mean model.n_head?"),
        (["loss_on=completion"], "loss_on=completion is of examples to fine-tune on"),
    ],
    ids=str,
)
def test_a_slip_gets_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["parity", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@needs_neuron_sim
def test_the_rehearsed_device_agrees_in_whole_graphs(config_of):
    """In a process of its own, which has that device for good."""
    config = config_of()
    places = [f"data.paths={config.data.paths}", f"data.cache_dir={config.data.cache_dir}"]
    settings = [*SMALL[:-1], "device=neuron_sim", "compile=true", "precision=bf16", "data=text", *places]
    done = subprocess.run([sys.executable, "-m", "gpt", "parity", *settings], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "neuron bf16" in done.stdout
    assert "neuron agrees with the CPU" in done.stdout
    assert "on a CPU" in done.stdout
    assert ", compiled" in done.stdout
