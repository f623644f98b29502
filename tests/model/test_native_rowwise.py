"""Norms, activations and the loss in C++ against torch's, in higher precision; skipped where they cannot be built."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gpt.model import native_rowwise
from gpt.model.config import GPTConfig
from gpt.model.feedforward import FeedForward, GELUTanh
from gpt.model.loss import IGNORE, LinearCrossEntropy
from gpt.model.native_rowwise import native_cross_entropy, native_gelu, native_norm, native_swiglu
from gpt.model.norms import LayerNorm, RMSNorm, block_norm

pytestmark = pytest.mark.skipif(not native_rowwise.is_native(), reason="the library cannot be built here")
ROUNDING = 3e-3  # of bf16, in the mean of squares


def error(ours, reference):
    return ((ours.double() - reference).norm() / reference.norm()).item()


def both(function, exact, inputs, gradient):
    """Results and gradients of two functions, the second in fp64: pairs."""
    results = []
    for call, leaves in (
        (function, [x.detach().clone().requires_grad_() for x in inputs]),
        (exact, [x.double().detach().requires_grad_() for x in inputs]),
    ):
        y = call(*leaves)
        y.backward(gradient.to(y.dtype))
        results.append([y.detach(), *(x.grad for x in leaves)])
    return list(zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(1,), (7, 5), (3, 4096), (33, 257)])
@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_activations_and_their_gradients(name, shape, scale):
    x, up, gradient = (torch.randn(shape).mul(scale).bfloat16() for _ in range(3))
    if name == "gelu":
        pairs = both(native_gelu, lambda x: F.gelu(x, approximate="tanh"), [x], gradient)
    else:
        pairs = both(native_swiglu, lambda gate, up: F.silu(gate) * up, [x, up], gradient)
    for ours, reference in pairs:
        assert ours.dtype == torch.bfloat16
        assert ours.shape == reference.shape
        torch.testing.assert_close(ours.double(), reference, rtol=2**-8, atol=2e-5 * scale)


def test_activations_far_from_zero_and_of_what_is_no_number():
    x = torch.tensor([-torch.inf, -3e38, -100.0, -0.0, 0.0, 100.0, 3e38, torch.inf, torch.nan]).bfloat16()
    y = native_gelu(x)
    assert y[2:6].tolist() == pytest.approx([0.0, 0.0, 0.0, 100.0], abs=1e-30)
    assert y[6] == x[6]
    assert y[7] == torch.inf
    assert y[8].isnan()
    assert native_swiglu(x[2:6], torch.ones(4).bfloat16()).tolist() == pytest.approx([0.0, 0.0, 0.0, 100.0], abs=1e-30)
    assert torch.ops.gpt.gelu_backward(x[2:6], torch.ones(4).bfloat16()).tolist() == pytest.approx([0.0, 0.5, 0.5, 1.0], abs=1e-30)


@pytest.mark.parametrize("shape", [(1, 16), (5, 3, 48), (2, 300, 33), (4, 7)])
@pytest.mark.parametrize("kind", ["layernorm", "no bias", "rmsnorm"])
def test_norms_and_their_gradients(kind, shape):
    width = shape[-1]
    x, gradient = torch.randn(shape) * 2 + 1, torch.randn(shape).bfloat16()
    weight, bias = torch.rand(width) + 0.5, torch.randn(width)
    if kind == "layernorm":
        pairs = both(lambda *a: native_norm(*a, 1e-5, True), lambda x, w, b: F.layer_norm(x, w.shape, w, b), [x, weight, bias], gradient)
    elif kind == "no bias":
        pairs = both(lambda x, w: native_norm(x, w, None, 1e-5, True), lambda x, w: F.layer_norm(x, w.shape, w), [x, weight], gradient)
    else:
        pairs = both(lambda x, w: native_norm(x, w, None, 1e-5, False), lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), [x, weight], gradient)
    assert pairs[0][0].dtype == torch.bfloat16
    assert error(*pairs[0]) < ROUNDING
    for ours, reference in pairs[1:]:
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [5, 64, 4097])
def test_the_loss_and_its_gradient(width):
    logits, targets = torch.randn(40, width).mul(3).bfloat16(), torch.randint(width, (40,))
    targets[3] = IGNORE
    logits[5, : width // 2] = -torch.inf
    targets[5] = width - 1
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction="sum", ignore_index=IGNORE)
    expected.backward()
    nll, gradient = native_cross_entropy(logits, targets)
    assert gradient is logits
    assert nll.item() == pytest.approx(expected.item(), rel=1e-6)
    assert not gradient[3].any()
    assert not gradient[5, : width // 2].any()
    torch.testing.assert_close(gradient.double(), wide.grad, rtol=2**-8, atol=1e-6)


def test_a_target_beyond_the_logits_is_refused():
    with pytest.raises(IndexError, match="target 64 is beyond 64 logits"):
        native_cross_entropy(torch.zeros(3, 64).bfloat16(), torch.tensor([1, 64, IGNORE]))
    assert native_cross_entropy(torch.zeros(0, 64).bfloat16(), torch.zeros(0, dtype=torch.int64))[0] == 0


def test_a_row_of_the_loss_that_is_no_number():
    logits = torch.randn(3, 64).bfloat16()
    logits[1, 7] = torch.nan
    nll, gradient = native_cross_entropy(logits, torch.tensor([1, 2, 3]))
    assert nll.isnan()
    assert gradient[1].isnan().all()
    assert gradient[[0, 2]].isfinite().all()


def test_the_number_of_threads_changes_nothing():
    x, weight, gradient = torch.randn(700, 96), torch.rand(96), torch.randn(700, 96).bfloat16()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, means, scales = torch.ops.gpt.norm(x, weight, None, 1e-5, True)
            loss = native_cross_entropy(gradient.clone(), torch.arange(700) % 96)
            results.append([y, *torch.ops.gpt.norm_backward(x, weight, means, scales, True, gradient), native_gelu(gradient), *loss])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_torch_finds_nothing_wrong_with_the_operators():
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((3, 5, 16), (16,), (16,)))
    ops = torch.ops.gpt
    for arguments in ((x, weight, bias, 1e-5, True), (x.transpose(0, 1), weight, None, 1e-5, False)):
        torch.library.opcheck(ops.norm.default, arguments)
    narrow = [torch.randn(5, 3).bfloat16().requires_grad_() for _ in range(2)]
    torch.library.opcheck(ops.gelu.default, (narrow[0],))
    torch.library.opcheck(ops.gelu.default, (narrow[0].T,))
    torch.library.opcheck(ops.swiglu.default, tuple(narrow))
    plain = [t.detach() for t in narrow]
    torch.library.opcheck(ops.gelu_backward.default, tuple(plain))
    torch.library.opcheck(ops.swiglu_backward.default, (*plain, plain[0]))
    statistics = ops.norm(x, weight, bias, 1e-5, True)[1:]
    arguments = (x, weight, *statistics, True, torch.randn(3, 5, 16).bfloat16())
    torch.library.opcheck(ops.norm_backward.default, tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments))


def config(norm="layernorm", **changes) -> GPTConfig:
    if norm == "rmsnorm":
        changes |= {"positions": "rotary", "activation": "swiglu", "bias": False}
    return GPTConfig(vocab_size=50, context_length=16, n_layer=1, n_head=2, d_model=32, norm=norm, **changes)


@pytest.mark.parametrize(("norm", "kind"), [("layernorm", LayerNorm), ("rmsnorm", RMSNorm)])
def test_a_norm_is_native_between_the_fp32_residual_and_bf16_products_only(norm, kind):
    layer, x = block_norm(config(norm=norm)), torch.randn(2, 8, 32)
    assert isinstance(layer, kind)
    plain = layer(x)
    assert plain.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert error(layer(x), plain.double()) < ROUNDING
    with torch.autocast("cpu", torch.float16):
        assert layer(x).dtype == torch.float32
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu", "gelu"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_feed_forward_is_the_same_with_and_without(monkeypatch, activation, compiled):
    torch.manual_seed(0)
    layer, x = FeedForward(config("rmsnorm") if activation == "swiglu" else config(activation=activation)), torch.randn(2, 8, 32)

    def results():
        torch._dynamo.reset()
        call = torch.compile(layer, dynamic=False, backend="aot_eager") if compiled else layer
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = call(leaf)
        y.float().square().sum().backward()
        return [y.detach(), leaf.grad, *(p.grad for p in layer.parameters())]

    native = results()
    monkeypatch.setattr(native_rowwise, "_found", [False])
    for ours, plain in zip(native, results(), strict=True):
        assert error(ours, plain.double()) < 1e-2


def test_in_fp32_torch_does_it(monkeypatch):
    monkeypatch.setattr(native_rowwise, "_call", lambda *_: pytest.fail("not in fp32"))
    assert torch.equal(GELUTanh()(torch.ones(3)), F.gelu(torch.ones(3), approximate="tanh"))
    hidden, weight = torch.randn(6, 8), torch.randn(20, 8, requires_grad=True)
    LinearCrossEntropy()(hidden, weight, torch.arange(6)).backward()


@pytest.mark.parametrize("chunk", [3, 16, 64])
def test_chunks_of_the_loss_wait_for_one_product(monkeypatch, chunk):
    """Whatever waits for whatever, the gradient is the same; here a little memory makes it two chunks or three."""
    from gpt.model import kernels

    hidden, weight = torch.randn(50, 16).bfloat16().float(), torch.randn(70, 16).mul(0.3).bfloat16().float().requires_grad_()
    targets = torch.randint(70, (50,))
    gradients = []
    for most in (0, 2 * 128 * chunk * 2, 2**25):
        monkeypatch.setitem(kernels._KERNELS, "cpu", kernels.Kernels(native=True, logits_chunk=chunk, logits_bytes=0, gradient_bytes=most))
        weight.grad = None
        LinearCrossEntropy(torch.bfloat16)(hidden, weight, targets).backward()
        gradients.append(weight.grad)
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.double() @ exact.T, targets, reduction="sum").backward()
    for gradient in gradients:
        assert error(gradient, exact.grad) < 5e-3
