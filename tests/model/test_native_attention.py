"""Attention in C++ against torch's, in higher precision; skipped where there is none (`native_attention_obstacle`)."""

from __future__ import annotations

import shutil

import pytest
import torch

from gpt.model import native_attention
from gpt.model.attention import causal_attention, document_places
from gpt.model.native_attention import native_attention_obstacle, native_causal_attention

OBSTACLE = native_attention_obstacle(64)
needs_library = pytest.mark.skipif(OBSTACLE is not None, reason=f"attention is not native here: {OBSTACLE}")


def example(heads=(2, 2), length=70, head_dim=32, masked=False, batch=2):
    """q, k, v and the gradient of the result, and a mask or None, in bf16."""
    n_head, n_kv_head = heads
    tensors = [torch.randn(batch, n, length, head_dim).bfloat16() for n in (n_head, n_kv_head, n_kv_head, n_head)]
    documents = torch.randint(0, 3, (batch, length)).sort(-1).values
    return *tensors, document_places(documents, torch.bfloat16)[1] if masked else None


def run(attention, q, k, v, gradient, mask):
    """The result and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = attention(*leaves, mask=mask)
    y.backward(gradient)
    return [y.detach(), *(x.grad for x in leaves)]


def exact(q, k, v, gradient, mask):
    wide = [x.double() for x in (q, k, v, gradient)]
    return run(causal_attention, *wide, None if mask is None else mask.double())


def error(ours, reference):
    """Relative, but to no less than a twentieth of what random numbers would be: gradients of few scores nearly cancel."""
    return ((ours.double() - reference).norm() / max(reference.norm().item(), 0.05 * reference.numel() ** 0.5)).item()


@needs_library
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 1)])
@pytest.mark.parametrize("length", [2, 31, 64, 65, 300])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 128])
@pytest.mark.parametrize("masked", [False, True])
def test_it_and_its_gradients_are_exact_to_bf16s_rounding(heads, length, head_dim, masked):
    torch.manual_seed(0)
    inputs = example(heads, length, head_dim, masked)
    # Weights, gradients of scores and results are rounded to 8 bits once each; those of few scores have nothing to even out in.
    limits = [2.5e-3, *[3.5e-3 if length > 30 else 2e-2] * 2, 3.5e-3]
    for ours, reference, limit in zip(run(native_causal_attention, *inputs), exact(*inputs), limits, strict=True):
        assert ours.dtype == torch.bfloat16
        assert ours.shape == reference.shape
        assert error(ours, reference) < limit


@needs_library
def test_it_is_nearer_to_the_truth_than_torchs():
    inputs = example((3, 3), 256, 64)
    reference = exact(*inputs)

    def fused(q, k, v, mask):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    for ours, torchs, truth in zip(run(native_causal_attention, *inputs), run(fused, *inputs), reference, strict=True):
        assert error(ours, truth) < 1.1 * error(torchs, truth)


@needs_library
def test_any_layout_will_do():
    q, k, v, gradient, mask = example((4, 2), 37, 32, masked=True)
    expected = run(native_causal_attention, q, k, v, gradient, mask)

    def laid_out(x, order):
        return x.permute(order).contiguous().permute([order.index(i) for i in range(4)])

    for order in ((0, 2, 1, 3), (1, 0, 2, 3), (0, 1, 3, 2), (2, 3, 0, 1)):
        others = [laid_out(x, order) for x in (q, k, v, gradient)]
        for ours, before in zip(run(native_causal_attention, *others, laid_out(mask, order)), expected, strict=True):
            assert torch.equal(ours, before)
    y = native_causal_attention(q, k, v, mask)
    assert y.transpose(1, 2).is_contiguous(), "as the product after it reads it"
    assert torch.equal(native_causal_attention(q, k, v, mask[:1])[0], y[0]), "one mask for all rows"


@needs_library
def test_the_number_of_threads_changes_nothing():
    inputs, before = example((4, 2), 130, 64, masked=True), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(native_causal_attention, *inputs))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], others, strict=True))


@needs_library
def test_what_comes_later_is_not_seen():
    q, k, v, gradient, _ = example((2, 2), 100, 64)
    y = native_causal_attention(q, k, v)
    for x in (q, k, v):
        x[:, :, 60:] = 1e30
    assert torch.equal(native_causal_attention(q, k, v)[:, :, :60], y[:, :, :60])
    gradient[:, :, :60] = 0
    _, of_q, *_ = run(native_causal_attention, *example((2, 2), 100, 64)[:3], gradient, None)
    assert not of_q[:, :, :60].any()
    assert of_q[:, :, 60:].any()


@needs_library
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_not_hidden(bad):
    q, k, v, gradient, _ = example((2, 2), 40, 32)
    k[0, 1, 20, 3] = bad
    y, of_q, *_ = run(native_causal_attention, q, k, v, gradient, None)
    assert y[0, 1, 20:].isnan().any(-1).all() if bad != bad else y[0, 1, 20:].isnan().any()
    assert of_q[0, 1, 20:].isnan().any()
    assert y[1].isfinite().all()
    assert y[0, 1, :20].isfinite().all()


@needs_library
def test_compiled_it_is_the_same():
    inputs = example((4, 2), 65, 32, masked=True)
    expected = run(causal_attention, *inputs)  # first: while it is compiled nothing is looked for
    compiled = torch.compile(causal_attention, fullgraph=True, dynamic=False, backend="aot_eager")
    for ours, eager in zip(run(compiled, *inputs), expected, strict=True):
        assert torch.equal(ours, eager)


@needs_library
def test_torch_finds_nothing_wrong_with_the_operators():
    q, k, v, gradient, mask = example((4, 2), 20, 16, masked=True)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.gpt.causal_attention.default, (*leaves, mask))
    torch.library.opcheck(torch.ops.gpt.causal_attention.default, (*leaves, None))
    y, logarithms = torch.ops.gpt.causal_attention(q, k, v, mask)
    detached = [x.detach() for x in (q, k, v, mask, y, logarithms, gradient)]
    torch.library.opcheck(torch.ops.gpt.causal_attention_backward.default, tuple(detached))


@needs_library
@pytest.mark.parametrize(
    ("changes", "dropout", "is_native"),
    [({}, 0.0, True), ({"head_dim": 24}, 0.0, False), ({"length": 1}, 0.0, False), ({}, 0.1, False)],
)
def test_attention_is_native_where_it_can_be(monkeypatch, changes, dropout, is_native):
    called = []
    monkeypatch.setattr("gpt.model.attention.native_causal_attention", lambda q, *_: called.append(1) or q)
    q, k, v, *_ = example(**changes)
    causal_attention(q, k, v, dropout)
    assert bool(called) == is_native
    called.clear()
    causal_attention(q.float(), k.float(), v.float(), dropout)
    assert not called


@needs_library
def test_single_queries_of_fp32_over_bf16_keys_keep_their_dtype():
    q, k, v, *_ = example()
    y = causal_attention(q.float(), k, v)
    assert y.dtype == torch.float32
    assert torch.equal(y, native_causal_attention(q, k, v).float())


class TestObstacles:
    def test_sizes_of_heads(self):
        assert native_attention_obstacle(20) == "head_dim=20 is no multiple of 16"

    def test_no_library(self, monkeypatch):
        monkeypatch.setattr(native_attention, "load_library", lambda _: (None, "there is no C++ compiler"))
        monkeypatch.setattr(native_attention, "_found", {})
        assert native_attention_obstacle(64) == "there is no C++ compiler"
        q, k, v, gradient, mask = example()
        for ours, reference in zip(run(causal_attention, q, k, v, gradient, mask), exact(q, k, v, gradient, mask), strict=True):
            assert error(ours, reference) < 1e-2

    @needs_library
    def test_another_processor(self, monkeypatch, tmp_path):
        source = tmp_path / "attention.cpp"
        source.write_text("#undef __AVX512BF16__\n" + native_attention._SOURCE.read_text())
        shutil.copy(native_attention._SOURCE.with_name("avx512_bf16.h"), tmp_path)
        monkeypatch.setattr(native_attention, "_SOURCE", source)
        assert native_attention_obstacle(64) == "the CPU has no AVX512-BF16, or matrix units besides"
