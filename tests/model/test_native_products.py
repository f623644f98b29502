"""Products of linear layers in C++ against torch's, in higher precision; skipped where there are none (`native_products_obstacle`)."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpt.model import native_products
from gpt.model.attention import Attention
from gpt.model.config import GPTConfig
from gpt.model.feedforward import FeedForward
from gpt.model.kernels import without_native
from gpt.model.loss import IGNORE, LinearCrossEntropy
from gpt.model.native_products import (
    Linear,
    multiply_transposed,
    native_feedforward,
    native_linears,
    native_products_obstacle,
    suits_product,
    suits_together,
)

OBSTACLE = native_products_obstacle()
needs_library = pytest.mark.skipif(OBSTACLE is not None, reason=f"products are not native here: {OBSTACLE}")
CONFIG = GPTConfig(n_layer=1, n_head=2, d_model=32, vocab_size=64, context_length=64)
ROUNDING = 2.5e-3  # of bf16, in the mean of squares
# rows, inputs, outputs: panels, strips and tiles whole and not, one chunk of rows and several, a sum deeper than a panel's part
SIZES = [(1, 16, 16), (5, 32, 48), (64, 48, 64), (97, 80, 112), (300, 208, 16), (513, 16, 848), (70, 2080, 32), (66, 4192, 96)]


def error(ours, reference):
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


def layer(inputs, outputs, bias=True, dtype=torch.float32):
    return nn.Linear(inputs, outputs, bias=bias).to(dtype)


def exact(*layers):
    """Copies in fp64 of what products read: weights are rounded to bf16 for them."""
    copies = [copy.deepcopy(layer).double() for layer in layers]
    with torch.no_grad():
        for ours, reference in zip(layers, copies, strict=True):
            reference.weight.copy_(ours.weight.bfloat16())
    return copies


def compare(function, reference, x, parameters, exact_parameters, limit=ROUNDING):
    """The result and all gradients, those of the parameters nearer than bf16."""
    gradient, wide = None, x.detach().double().requires_grad_()
    narrow = x.detach().requires_grad_()
    results = [y if isinstance(y, tuple) else (y,) for y in (function(narrow), reference(wide))]
    gradient = [torch.randn_like(y) for y in results[0]]
    torch.autograd.backward(results[0], gradient)
    torch.autograd.backward(results[1], [g.double() for g in gradient])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == torch.bfloat16
        assert error(ours, theirs) < limit
    assert error(narrow.grad, wide.grad) < limit
    for ours, theirs in zip(parameters, exact_parameters, strict=True):
        assert ours.grad.dtype == ours.dtype
        assert error(ours.grad, theirs.grad) < limit


@needs_library
class TestAgainstHigherPrecision:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("size", SIZES)
    def test_linear(self, size, bias, dtype):
        rows, inputs, outputs = size
        ours = layer(inputs, outputs, bias, dtype)
        (reference,) = exact(ours)
        compare(
            lambda x: native_linears(x, ours)[0], reference, torch.randn(rows, inputs).bfloat16(),
            list(ours.parameters()), list(reference.parameters()),
        )  # fmt: skip

    @pytest.mark.parametrize("size", SIZES)
    def test_gradients_of_weights_are_fp32_sums(self, size):
        rows, inputs, outputs = size
        gradient, x = torch.randn(rows, outputs).bfloat16(), torch.randn(rows, inputs).bfloat16()
        of_weight, of_bias = torch.ones(outputs, inputs), torch.ones(outputs)
        multiply_transposed([gradient], x, [of_weight], [of_bias], add=True)
        assert error(of_weight, 1 + gradient.double().T @ x.double()) < 1e-6
        assert error(of_bias, 1 + gradient.double().sum(0)) < 1e-6

    @pytest.mark.parametrize("widths", [(32, 32, 32), (64, 16, 16), (400, 48, 48)])
    @pytest.mark.parametrize("rows", [(2, 40), (3, 100)])
    @pytest.mark.parametrize("bias", [True, False])
    def test_layers_of_the_same_input(self, widths, rows, bias):
        layers = [layer(96, width, bias) for width in widths]
        reference = exact(*layers)
        compare(
            lambda x: tuple(native_linears(x, *layers)), lambda x: tuple(part(x) for part in reference), torch.randn(*rows, 96).bfloat16(),
            [p for part in layers for p in part.parameters()], [p for part in reference for p in part.parameters()],
        )  # fmt: skip

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("size", [(66, 32, 128), (130, 80, 208), (7, 16, 2112)])
    def test_feedforward(self, size, bias):
        rows, width, hidden = size
        up, down = layer(width, hidden, bias), layer(hidden, width, bias)
        reference = exact(up, down)

        def plain(x):
            before = reference[0](x)
            before = before + (before.bfloat16().double() - before).detach()  # GELU is of what is rounded
            return reference[1](F.gelu(before, approximate="tanh"))

        compare(
            lambda x: native_feedforward(x, up.weight, up.bias, down.weight, down.bias), plain, torch.randn(rows, width).mul(3).bfloat16(),
            [*up.parameters(), *down.parameters()], [p for part in reference for p in part.parameters()], limit=6e-3,
        )  # fmt: skip

    def test_gelu_of_any_number(self):
        numbers = torch.tensor([-1e10, -100.0, -3.0, -0.0, 0.0, 1e-30, 2.0, 100.0, 1e10, torch.nan]).bfloat16()
        x = torch.zeros(len(numbers), 16).bfloat16()
        x[:, 0] = numbers
        x.requires_grad_()
        hidden = native_feedforward(x, torch.eye(16), None, torch.eye(16), None)
        (of_x,) = torch.autograd.grad(hidden[:, 0].sum(), x)
        reference = numbers.float().requires_grad_()
        expected = F.gelu(reference, approximate="tanh")
        (of_reference,) = torch.autograd.grad(expected[:-1].sum(), reference)
        torch.testing.assert_close(hidden[:, 0], expected.bfloat16(), rtol=2**-7, atol=1e-30, equal_nan=True)
        torch.testing.assert_close(of_x[:-1, 0], of_reference[:-1].bfloat16(), rtol=2**-7, atol=1e-30)

    @pytest.mark.parametrize("tied", [True, False])
    def test_loss(self, tied):
        head, hidden = nn.Linear(48, 100, bias=not tied), torch.randn(3, 50, 48, requires_grad=True)
        targets = torch.randint(0, 100, (3, 50))
        targets[:, ::7] = IGNORE
        gradients = []
        for native in (True, False):
            head.zero_grad()
            hidden.grad = None
            loss = LinearCrossEntropy(torch.bfloat16, chunk=64)
            if native:
                loss(hidden, head.weight, targets, bias=head.bias).backward()
            else:
                F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum").backward()
            gradients.append([hidden.grad, *(p.grad for p in head.parameters())])
        for ours, reference in zip(*gradients, strict=True):
            assert error(ours, reference) < 1e-2


@needs_library
def test_results_do_not_depend_on_threads():
    x, up, down = torch.randn(301, 80).bfloat16(), layer(80, 208), layer(208, 80)
    found = []
    for threads in (1, 3, 16):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            leaf = x.clone().requires_grad_()
            y = native_feedforward(leaf, up.weight, up.bias, down.weight, down.bias)
            grads = torch.autograd.grad(y.float().square().sum(), [leaf, *up.parameters(), *down.parameters()])
        finally:
            torch.set_num_threads(before)
        found.append([y, *grads])
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@needs_library
class TestModules:
    """Of the model, under autocast, against the same with torch's kernels."""

    def run(self, module, x, *arguments):
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(leaf, *arguments)
        y.float().square().sum().backward()
        return [y, leaf.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]

    def both(self, module, *arguments):
        ours = self.run(module, *arguments)
        with without_native():
            theirs = self.run(module, *arguments)
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert error(a, b) < 2e-2
        return ours

    @pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
    @pytest.mark.parametrize("frozen", [(), ("up.weight",), ("down.weight", "down.bias"), ("up.weight", "up.bias", "down.weight")])
    def test_feedforward(self, activation, frozen):
        gated = {"norm": "rmsnorm", "positions": "rotary"} if activation == "swiglu" else {}
        module = FeedForward(replace(CONFIG, activation=activation, **gated))
        for name, p in module.named_parameters():
            p.requires_grad_(name not in frozen)
        self.both(module, torch.randn(2, 40, 32))

    @pytest.mark.parametrize("frozen", [(), ("k.weight",), ("q.weight", "k.weight", "v.weight"), ("v.bias",)])
    def test_attention(self, frozen):
        module = Attention(CONFIG, 0)
        for name, p in module.named_parameters():
            p.requires_grad_(name not in (*frozen, "k.bias"))  # the gradient of k's bias is nothing but rounding
        self.both(module, torch.randn(2, 40, 32), None)

    @pytest.mark.parametrize("kind", [FeedForward, lambda c: Attention(c, 0)])
    def test_compiled(self, kind):
        module = kind(CONFIG)
        arguments = (torch.randn(2, 40, 32), *([None] if isinstance(module, Attention) else []))
        eager = self.run(module, *arguments)
        module.compile(fullgraph=True, dynamic=False)
        for a, b in zip(self.run(module, *arguments), eager, strict=True):
            assert error(a, b) < 2e-2

    def test_an_input_of_another_width_is_refused(self):
        with torch.autocast("cpu", torch.bfloat16):
            for layer in (Linear(32, 48), FeedForward(CONFIG)):
                with pytest.raises(RuntimeError, match=r"rows of 48 numbers .* do not fit a weight laid out for 32"):
                    layer(torch.randn(64, 48))

    def test_one_bias_of_two_is_added(self):
        module = FeedForward(replace(CONFIG, norm="rmsnorm", positions="rotary", activation="swiglu", bias=True))
        module.gate.register_parameter("bias", None)
        self.both(module, torch.randn(2, 40, 32))

    def test_a_hook_sees_each_layer(self):
        seen, module, x = [], FeedForward(CONFIG), torch.randn(2, 40, 32).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            assert suits_together(x, module.up, module.down)
            module.up.register_forward_hook(lambda m, i, y: seen.append(y.shape))
            assert not suits_together(x, module.up, module.down)
            module(x)
        assert seen == [(2, 40, 128)]

    def test_what_a_frozen_matrix_reads_is_not_kept(self):
        ours, kept = Linear(32, 48), []
        ours.weight.requires_grad_(False)
        x = torch.randn(70, 32).bfloat16().requires_grad_()
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            ours(x)
        assert (70, 32) not in kept


class TestWhatSuits:
    def suits(self, rows=64, inputs=32, outputs=48, dtype=torch.float32, autocast=True, of_x=torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return suits_product(torch.empty(rows, inputs, dtype=of_x), torch.empty(outputs, inputs, dtype=dtype))

    @needs_library
    def test_yes(self):
        assert self.suits()
        assert self.suits(of_x=torch.float32)
        assert self.suits(dtype=torch.bfloat16)
        assert self.suits(dtype=torch.bfloat16, autocast=False)

    def test_no(self):
        assert not self.suits(rows=63)
        assert not self.suits(inputs=40)
        assert not self.suits(outputs=40)
        assert not self.suits(autocast=False)
        assert not self.suits(autocast=False, of_x=torch.float32)
        assert not self.suits(dtype=torch.float64)
        with without_native():
            assert not self.suits()

    def test_no_library(self, monkeypatch):
        monkeypatch.setattr(native_products, "load_library", lambda _: (None, "there is no C++ compiler"))
        monkeypatch.setattr(native_products, "_found", [])
        assert native_products_obstacle() == "there is no C++ compiler"
        assert not self.suits()
        with torch.autocast("cpu", torch.bfloat16):
            assert Linear(32, 48)(torch.randn(64, 32)).dtype == torch.bfloat16

    @needs_library
    def test_another_processor(self, monkeypatch, tmp_path):
        source = tmp_path / "products.cpp"
        source.write_text("#undef __AVX512BF16__\n" + native_products._SOURCE.read_text())
        shutil.copy(native_products._SOURCE.with_name("avx512_bf16.h"), tmp_path)
        monkeypatch.setattr(native_products, "_SOURCE", source)
        assert native_products_obstacle() == "the CPU has no AVX512-BF16, or matrix units besides"
