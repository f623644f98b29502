"""Tensors and operations on the simulated device; run in a process of its own by test_neuron_sim.py."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpt.runtime.neuron_sim import install

RECORD = install()
FLOATS, INTEGERS, ALL = (torch.float32, torch.bfloat16, torch.float16), (torch.int64, torch.int32), None


@pytest.fixture(autouse=True)
def fresh():
    install(unsupported=(), strict=False)
    torch.manual_seed(0)
    RECORD.clear()


@pytest.fixture
def empty():
    """Nothing left of the tests before."""
    gc.collect()
    RECORD.clear()
    assert RECORD.allocated_bytes == 0


def on_device(value):
    """The same tensors, views of one another where they were, on the device."""
    return value.to("neuron") if isinstance(value, torch.Tensor) else value


# Each: (a, b, i) -> tensors. a (4, 6) and b (4, 6) in a dtype, i (4, 6) int64 below 4.
EVERYWHERE = {
    "add": lambda a, b, i: a + b,
    "sub number": lambda a, b, i: 3 - a,
    "mul number": lambda a, b, i: a * 2,
    "broadcast": lambda a, b, i: a + b[:1],
    "mixed dtypes": lambda a, b, i: a + i,
    "compare": lambda a, b, i: a > b,
    "equal": lambda a, b, i: (a == a) & (a != b),
    "minimum": lambda a, b, i: torch.minimum(a, b),
    "where": lambda a, b, i: torch.where(a > b, a, 0),
    "masked_fill": lambda a, b, i: a.masked_fill(i > 1, 2),
    "masked_select": lambda a, b, i: a[a > b],
    "nonzero": lambda a, b, i: (a > b).nonzero(),
    "sum": lambda a, b, i: (a.sum(), a.sum(1), a.sum(0, keepdim=True)),
    "cumsum": lambda a, b, i: a.cumsum(1),
    "max": lambda a, b, i: (*a.max(1), a.max(), a.amax(0)),
    "argmax": lambda a, b, i: a.argmax(-1),
    "sort": lambda a, b, i: a.sort(1),
    "topk": lambda a, b, i: a.topk(3),
    "cat": lambda a, b, i: torch.cat([a, b], 1),
    "stack": lambda a, b, i: torch.stack([a, b]),
    "index": lambda a, b, i: (a[i[:, 0]], a[:, 1], a[1:3, ::2], a[..., None], a[[0, 2]], a[i[0, 0], 2]),
    "gather": lambda a, b, i: a.gather(0, i),
    "index_select": lambda a, b, i: a.index_select(0, i[0]),
    "take_along_dim": lambda a, b, i: a.take_along_dim(i, 1),
    "flip": lambda a, b, i: a.flip(0),
    "roll": lambda a, b, i: a.roll(2, 1),
    "tril": lambda a, b, i: (a.tril(), a.triu(1)),
    "repeat": lambda a, b, i: (a.repeat(2, 1), a.repeat_interleave(2, 0)),
    "views": lambda a, b, i: (
        a.view(24),
        a.t(),
        a.reshape(3, 8),
        a.t().reshape(-1),
        a.permute(1, 0),
        a.unsqueeze(1),
        a.expand(2, 4, 6),
        a.unfold(1, 2, 2),
    ),
    "split": lambda a, b, i: (*a.split(3, 1), *a.chunk(2), *a.unbind(), *torch.tensor_split(a, 3)),
    "clone": lambda a, b, i: (a.clone(), a.t().clone(), a.t().contiguous()),
    "to": lambda a, b, i: (a.to(torch.float32), a.long(), a.bool(), a.to(torch.bfloat16, copy=True)),
    "like": lambda a, b, i: (torch.zeros_like(a), torch.ones_like(a), torch.full_like(a, 3)),
    "new": lambda a, b, i: (a.new_zeros(2), a.new_full((2, 2), 5), a.new_tensor([1, 2])),
    "pad": lambda a, b, i: F.pad(a, (1, 1, 0, 1)),
    "clamp": lambda a, b, i: a.clamp(0, 1),
    "numbers": lambda a, b, i: (a.sum().item(), a.tolist(), bool((a == a).all()), torch.equal(a, b), a.shape, a.stride()),
    "abs": lambda a, b, i: (a.abs(), -a, a**2),
    "one_hot": lambda a, b, i: F.one_hot(i, 4),
    "remainder": lambda a, b, i: (i % 3, i.fmod(3), i & 1, i << 1, i // 2, torch.remainder(a, 2), 2**i),
    "isin": lambda a, b, i: torch.isin(a, b),
    "unique": lambda a, b, i: i.unique(return_counts=True),
    "bincount": lambda a, b, i: i.flatten().bincount(),
}
ON_FLOATS = {
    "mm": lambda a, b, i: (
        a @ b.t(),
        torch.addmm(a[:, :4], a, b.t()),
        torch.bmm(a[None], b.t()[None]),
        a @ b[0],
        torch.einsum("ij,kj->ik", a, b),
    ),
    "linear": lambda a, b, i: F.linear(a, b, a[0, :4]),
    "div": lambda a, b, i: (a / 3, a // 2, a / (b + 9)),
    "exp": lambda a, b, i: (a.exp(), a.abs().log(), a.abs().sqrt(), a.abs().rsqrt(), a.tanh(), a.sigmoid(), a.sin()),
    "mean": lambda a, b, i: (a.mean(), a.mean(1), a.var(1), a.std()),
    "norms": lambda a, b, i: (a.norm(), torch.linalg.vector_norm(a, dim=1), a.norm(dim=0)),
    "softmax": lambda a, b, i: (a.softmax(-1), a.log_softmax(0), a.logsumexp(1)),
    "activations": lambda a, b, i: (F.gelu(a), F.gelu(a, approximate="tanh"), F.silu(a), F.relu(a), F.softplus(a)),
    "layer_norm": lambda a, b, i: F.layer_norm(a, (6,), a[0], b[0], 1e-5),
    "rms_norm": lambda a, b, i: F.rms_norm(a, (6,), a[0], 1e-5),
    "embedding": lambda a, b, i: F.embedding(i, a),
    "cross_entropy": lambda a, b, i: (
        F.cross_entropy(a, i[:, 0]),
        F.cross_entropy(a, i[:, 0] * 0 - 100, ignore_index=-100, reduction="sum"),
    ),
    "lerp": lambda a, b, i: a.lerp(b, 0.3),
    "isfinite": lambda a, b, i: (a.isfinite(), a.isnan(), (a / 0).nan_to_num()),
    "addcmul": lambda a, b, i: (a.addcmul(a, b, value=2), a.addcdiv(a, b + 9)),
    "foreach": lambda a, b, i: (
        *torch._foreach_add([a, b], 1),
        *torch._foreach_mul([a, b], [b, a]),
        *torch._foreach_norm([a, b]),
        *torch._foreach_sqrt([a.abs(), b.abs()]),
    ),
}


def outs(a, b, i):
    small, wrong = torch.empty(0, dtype=a.dtype, device=a.device), torch.zeros(4, 6, dtype=a.dtype, device=a.device)
    grown = torch.add(a, b, out=small)
    torch.mul(a, b, out=wrong[:, :])
    torch.add(a[:, :3], 1, out=wrong[:, ::2])
    assert grown is small
    return small, wrong, small.shape


def in_place(a, b, i):
    x, y = a.clone(), a.t().clone().t()
    x.add_(b).mul_(2)
    y[1] = b[0]
    y[:, 2] += 1
    y[y > 1] = 0
    y[i[:, 0] % 4, 1] = 5
    x[1:3].copy_(b[1:3])
    x.t()[0].zero_()
    x.view(-1)[3:5].fill_(7)
    z = torch.zeros_like(a)
    z.scatter_(1, i, b)
    z.index_add_(0, i[0, :4], b)
    z.index_put_((i[:, 0],), b, accumulate=True)
    z.index_copy_(0, i[:1, 0], b[:1])
    w = b.clone()
    w.t_()
    w.unsqueeze_(0)
    w.resize_(2, 3)
    w.clamp_(min=0)
    v = a.clone()
    v.masked_fill_(v > 0, 1)
    v.data = v.data[:2]
    torch._foreach_add_([x, y], [a, b])
    torch._foreach_copy_([z], [a])
    x.swapaxes_(0, 1)
    return x, y, z, w, v, x.is_contiguous(), w.shape


CASES = [(name, f, ALL) for name, f in EVERYWHERE.items()] + [(name, f, FLOATS) for name, f in ON_FLOATS.items()]
CASES += [("out", outs, ALL), ("in place", in_place, ALL)]


LAYOUTS = ("contiguous", "offset", "transposed", "strided")
NO_VIEW = ("views", "in place")  # torch itself refuses some views of what is transposed or strided
LAID_OUT = [(layout, *case) for layout in LAYOUTS for case in CASES if case[0] not in NO_VIEW or layout in ("contiguous", "offset")]


@pytest.mark.parametrize(("layout", "name", "function", "dtypes"), LAID_OUT, ids=[f"{c[1]}-{c[0]}" for c in LAID_OUT])
def test_results_are_the_cpus_to_the_bit(layout, name, function, dtypes):
    for dtype in dtypes or (*FLOATS, *INTEGERS):
        shape = {"transposed": (6, 4), "strided": (8, 12), "offset": (6, 6)}.get(layout, (4, 6))
        whole = [(torch.randn(shape) * 3).to(dtype) for _ in range(2)]

        def laid(tensor):
            return {"transposed": tensor.t, "strided": lambda: tensor[::2, ::2], "offset": lambda: tensor[2:]}.get(layout, lambda: tensor)()

        i = torch.randint(4, (4, 6))
        expected = function(laid(whole[0]), laid(whole[1]), i)
        inputs = [t.to("neuron") for t in whole]
        found = function(laid(inputs[0]), laid(inputs[1]), i.to("neuron"))
        expected, found = ((r,) if isinstance(r, torch.Tensor) else tuple(r) for r in (expected, found))
        assert len(expected) == len(found)
        for e, f in zip(expected, found, strict=True):
            if isinstance(e, torch.Tensor):
                assert f.device.type == "neuron"
                assert (f.dtype, f.shape, f.stride(), f.storage_offset()) == (e.dtype, e.shape, e.stride(), e.storage_offset())
                assert torch.equal(f.cpu().nan_to_num(), e.nan_to_num())
            else:
                assert e == f
        for before, after in zip(whole, inputs, strict=True):
            assert torch.equal(after.cpu(), before)


def test_gradients_are_the_cpus_to_the_bit():
    def loss(table, weight, i):
        x = F.embedding(i, table)
        x = F.layer_norm(F.gelu(x @ weight) + x, (6,))
        return F.cross_entropy(x.reshape(-1, 6)[i.flatten() > 0], i[i > 0])

    table, weight, i = torch.randn(4, 6), torch.randn(6, 6), torch.randint(4, (3, 5))
    gradients = []
    for device in ("cpu", "neuron"):
        leaves = [t.detach().clone().to(device).requires_grad_() for t in (table, weight)]
        loss(*leaves, i.to(device)).backward()
        gradients.append([p.grad.cpu() for p in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dim", [16, 64])
@pytest.mark.parametrize("kind", ["causal", "grouped", "full", "mask"])
def test_attention_is_that_of_products_and_a_softmax(dim, kind):
    heads = 2 if kind == "grouped" else 4
    q, k, v = torch.randn(2, 4, 8, dim), torch.randn(2, heads, 8, dim), torch.randn(2, heads, 8, dim)
    options = {"attn_mask": torch.rand(8, 8) > 0.3} if kind == "mask" else {"is_causal": kind != "full", "enable_gqa": heads == 2}
    results = []
    for device in ("cpu", "neuron"):
        leaves = [t.detach().clone().to(device).requires_grad_() for t in (q, k, v)]
        here = {name: on_device(x) if device == "neuron" else x for name, x in options.items()}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            y = F.scaled_dot_product_attention(*leaves, **here)
        y.square().mean().backward()
        results.append([y.detach().cpu(), *(p.grad.cpu() for p in leaves)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    fused = "aten::scaled_dot_product_attention" in RECORD.operations
    for name in RECORD.operations:
        assert torch._C._dispatch_get_all_op_names().count(name)  # a name that torch knows
    assert fused == (dim == 64 and kind in ("causal", "grouped"))


def test_views_share_memory_and_its_count(empty):
    x = torch.zeros(1000, device="neuron")
    assert RECORD.allocated_bytes == 4000
    y = x[10:]
    del x
    gc.collect()
    y.fill_(1)
    z = y.view(-1, 2).t().detach()
    z[0, 0] = 5
    assert y[0].item() == 5
    assert RECORD.allocated_bytes == 4000
    del y, z
    assert RECORD.allocated_bytes == 0
    assert RECORD.peak_bytes >= 4000


def test_memory_is_that_of_live_storages(empty):
    import torch_neuronx

    kept = [torch.empty(256, 1024, device="neuron") for _ in range(4)]
    assert RECORD.allocated_bytes == torch.accelerator.memory_allocated() == torch.neuron.memory_allocated() == 4 << 20
    kept.pop()
    gc.collect()
    assert torch_neuronx.memory_stats()["allocated_bytes.all.current"] == 3 << 20
    assert torch_neuronx.memory_stats()["allocated_bytes.all.peak"] == torch.accelerator.max_memory_allocated() == 4 << 20
    torch.accelerator.reset_peak_memory_stats()
    assert RECORD.peak_bytes == 3 << 20
    assert torch.accelerator.get_memory_info() == ((24 << 30) - (3 << 20), 24 << 30)
    storage = kept[0].untyped_storage()
    storage.resize_(0)
    assert storage.size() == 0
    assert RECORD.allocated_bytes == 2 << 20
    storage.resize_(1 << 20)
    assert storage.size() == storage.nbytes() == 1 << 20
    assert RECORD.allocated_bytes == 3 << 20


def test_the_backward_pass_gives_memory_back(empty):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).to("neuron")
    gc.collect()
    weights = RECORD.allocated_bytes
    assert weights == 4 * 4 * (64 * 64 + 64)
    loss = model(torch.randn(32, 64).to("neuron")).sum()
    assert RECORD.allocated_bytes >= weights + 4 * 32 * 64 * 4
    loss.backward()
    del loss
    model.zero_grad()
    gc.collect()
    assert RECORD.allocated_bytes == weights


def test_what_ran_is_counted():
    a = torch.randn(3, 3).to("neuron")
    RECORD.clear()
    for n in (1, 2, 3):
        _ = a[:n] @ a
        _ = a[:n] @ a
        _ = a.t()
    assert RECORD.operations["aten::mm"] == 6
    assert len(RECORD.eager_kernels["aten::mm"]) == 3
    assert (torch.Size((2, 3)), torch.float32, torch.Size((3, 3)), torch.float32) in RECORD.eager_kernels["aten::mm"]
    assert not {"aten::as_strided", "aten::view", "aten::t"} & RECORD.eager_kernels.keys()


# What the hardware refuses

REFUSALS = {
    "a made float64": (lambda d: torch.zeros(2, dtype=torch.float64, device="neuron"), TypeError, "float64 on neuron"),
    "a float64 moved": (lambda d: torch.zeros(2, dtype=torch.float64).to("neuron"), TypeError, "float64 on neuron"),
    "a cast": (lambda d: d.double(), TypeError, "float64 on neuron"),
    "a float64 sum": (lambda d: d.sum(dtype=torch.float64), TypeError, "float64 on neuron"),
    "mixed devices": (lambda d: d + d.cpu(), RuntimeError, r"same device.*neuron:0 and cpu.*aten::add"),
    "a mixed product": (lambda d: d.cpu() @ d, RuntimeError, r"same device.*aten::mm"),
    "an index there for a tensor here": (lambda d: d.cpu()[torch.tensor([1], device="neuron")], RuntimeError, "same device"),
    "pinned memory": (lambda d: torch.zeros(2).pin_memory(), RuntimeError, "pin_memory"),
    "pinned memory made": (lambda d: torch.zeros(2, pin_memory=True), NotImplementedError, "PinnedMemory"),
    "numpy": (lambda d: d.numpy(), TypeError, "neuron:0"),
    "a fused optimizer": (lambda d: fused_step(d), NotImplementedError, "_fused_adamw_.*leave the optimizer's fused=True out"),
    "data of a meta tensor": (lambda d: torch.empty(2, device="meta").to("neuron"), NotImplementedError, "meta"),
}


def fused_step(d):
    p = nn.Parameter(d)
    p.grad = torch.ones_like(d)
    torch.optim.AdamW([p], fused=True).step()


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case):
    act, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        act(torch.randn(4, 4).to("neuron"))


def test_what_looks_like_it_but_may_be():
    d = torch.randn(4).to("neuron")
    assert (d * torch.tensor(2.0, dtype=torch.float64)).dtype == torch.float32
    assert d.to("cpu", torch.float64).dtype == torch.float64
    assert torch.zeros(2, dtype=torch.float64).to("neuron", torch.float32).dtype == torch.float32
    assert d[torch.tensor([1, 2])].shape == (2,)
    assert "neuron:0" in repr(d)


@pytest.mark.parametrize("name", ["topk", "aten::topk", "aten::logsumexp", "scaled_dot_product_attention"])
def test_an_unsupported_operation(name):
    import torch_neuronx

    d = torch.randn(1, 1, 4, 4).to("neuron")
    act = {
        "logsumexp": lambda: d.logsumexp(0),
        "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(d, d, d),
    }.get(name.removeprefix("aten::"), lambda: d.topk(2))
    whole = f"aten::{name.removeprefix('aten::')}"
    act()
    assert not RECORD.fallbacks
    install([name], strict=False)
    act()
    act()
    assert RECORD.fallbacks == {whole: 2}
    assert torch_neuronx.get_fallback_ops() == [whole]
    torch_neuronx.clear_op_tracking()
    assert torch_neuronx.get_fallback_ops() == []
    install([name], strict=True)
    with pytest.raises(NotImplementedError, match=f"{whole} is not implemented for device neuron"):
        act()
    install()
    act()


def test_strictness_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION", "1")
    assert install(["topk"]).strict
    with pytest.raises(NotImplementedError, match="topk"):
        torch.randn(4, device="neuron").topk(2)
    monkeypatch.delenv("TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION")
    assert not install(["topk"]).strict
