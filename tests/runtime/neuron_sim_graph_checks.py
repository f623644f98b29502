"""torch.compile(backend="neuron") on the simulated device; run in a process of its own by test_neuron_sim.py."""

import copy
import gc
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gpt.model.config import GPTConfig
from gpt.model.loss import LinearCrossEntropy
from gpt.model.objective import NextTokenLoss
from gpt.model.transformer import GPT
from gpt.runtime.neuron_sim import install
from gpt.runtime.parallel import _keep_products

RECORD = install()
OPTIONS = {"backend": "neuron", "dynamic": False, "fullgraph": True}


@pytest.fixture(autouse=True)
def fresh():
    install()
    torch.compiler.reset()
    torch.manual_seed(0)
    RECORD.clear()
    yield
    torch.compiler.set_stance("default")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + F.gelu(self.up(self.norm(x)))


def kinds():
    return [(g.kind, g.function, g.cause) for g in RECORD.graphs]


def test_one_graph_for_each_pass_of_all_layers():
    layers = nn.ModuleList(Layer() for _ in range(3))
    reference = copy.deepcopy(layers)
    layers.to("neuron")
    for layer in layers:
        layer.compile(**OPTIONS)
    x = torch.randn(4, 8, requires_grad=True)
    for _ in range(2):
        results = []
        for model, start in ((reference, x), (layers, x.to("neuron"))):
            y = start
            for layer in model:
                y = layer(y)
            y.square().sum().backward()
            results.append((y, [p.grad for p in model.parameters()]))
    (y, gradients), (found, found_gradients) = results
    assert torch.equal(found.cpu(), y)
    for expected, gradient in zip(gradients, found_gradients, strict=True):
        torch.testing.assert_close(gradient.cpu(), expected, atol=1e-6, rtol=1e-6)
    assert kinds() == [(kind, "Layer.forward", "first call of Layer.forward") for kind in ("forward", "backward")]
    forward = RECORD.graphs[0]
    assert forward.operations["aten::addmm"] == forward.operations["aten::native_layer_norm"] == forward.operations["aten::gelu"] == 1
    assert (4, 8) in forward.shapes
    assert len(forward.shapes) == len(forward.dtypes) == 5
    assert forward.scratch_bytes >= forward.output_bytes > 4 * 8 * 4
    assert "aten::addmm" not in RECORD.operations
    with torch.no_grad():
        layers[0](x.to("neuron"))
    assert [k[0] for k in kinds()] == ["forward", "backward", "inference"]
    assert kinds()[-1][2].startswith("Layer.forward again: ")
    assert "grad" in kinds()[-1][2].lower()


def test_another_shape_is_another_graph_and_says_so():
    step = torch.compile(lambda x: x * 2, **OPTIONS)
    for n in (2, 3, 2):
        step(torch.ones(n, 4, device="neuron"))
    first, second = RECORD.graphs
    assert (first.shapes, second.shapes) == (((2, 4),), ((3, 4),))
    assert "size mismatch at index 0. expected 2, actual 3" in second.cause


def test_a_second_graph_can_be_forbidden():
    step = torch.compile(lambda x: x * 2, **OPTIONS)
    step(torch.ones(2, device="neuron"))
    torch.compiler.set_stance("fail_on_recompile")
    step(torch.ones(2, device="neuron"))
    with pytest.raises(RuntimeError, match="recompile"):
        step(torch.ones(3, device="neuron"))


def shared(x):
    y = x.view(2, 8)
    return y, y[0], x, y + 1, x.t()


def changed(x):
    x.add_(1)
    x[0].mul_(2)
    return x.sum(), x[1:]


def made(x):
    return torch.arange(4, device=x.device) + x[0, 0], torch.full((2,), 3.0, device=x.device), torch.zeros_like(x), x.cpu() + 1


def constant(x):
    return x * TABLE, x + torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device)


TABLE = torch.randn(4).to("neuron")


@pytest.mark.parametrize("function", [shared, changed, made, constant])
@pytest.mark.parametrize("trained", [False, True])
def test_results_share_memory_as_they_do_in_eager_mode(function, trained):
    start = torch.randn(4, 4)
    compiled = torch.compile(function, **OPTIONS)
    for _ in range(2):
        outcomes = []
        for act in (function, compiled):
            leaf = start.to("neuron").requires_grad_(trained)
            x = leaf.clone() if trained else leaf
            results = act(x)
            shares = [r.device.type == "neuron" and r.untyped_storage()._cdata == x.untyped_storage()._cdata for r in results]
            outcomes.append(([r.detach().cpu() for r in results], x.detach().cpu(), shares, x._version, [r.stride() for r in results]))
        (values, after, shares, version, strides), (found, found_after, found_shares, found_version, found_strides) = outcomes
        assert all(torch.equal(a, b) for a, b in zip(values, found, strict=True))
        assert torch.equal(after, found_after)
        assert (shares, strides) == (found_shares, found_strides)
        assert version == 0 or found_version > 0


def test_a_buffer_is_written_in_place():
    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.zeros(4, 2))

        def forward(self, x, place):
            self.kept.index_copy_(0, place, x)
            return self.kept.sum()

    cache = Cache().to("neuron")
    where = cache.kept.untyped_storage()._cdata
    cache.compile(**OPTIONS)
    with torch.no_grad():
        for n in (1, 3):
            total = cache(torch.full((1, 2), float(n), device="neuron"), torch.tensor([n], device="neuron"))
    assert total.item() == 8
    assert cache.kept[:, 0].tolist() == [0, 1, 0, 3]
    assert cache.kept.untyped_storage()._cdata == where
    assert len(RECORD.graphs) == 1


REFUSALS = {
    "a size that depends on values": (
        lambda x: x.nonzero(),
        {},
        r"NCC_EMOD025: Dynamic shape is not supported: aten::nonzero in .* makes one",
    ),
    "dynamic=True": (lambda x: x + 1, {"dynamic": True}, r"NCC_EMOD025: Dynamic shape is not supported: an input of .*s\d.*dynamic=False"),
    "a cast to float64": (lambda x: x.double() + 1, {}, r"float64 is not supported: aten::_to_copy in .*neuron_sim_graph_checks.py:\d+"),
    "a float64 within": (lambda x: x.sum(dtype=torch.float64).float(), {}, r"float64 is not supported: aten::sum"),
    "an unsupported operation": (
        lambda x: x.topk(2).values * 2,
        {},
        r"aten::topk is not supported \(in .*neuron_sim_graph_checks.py:\d+\)",
    ),
    "mixed devices": (lambda x: x + torch.ones(4), {}, "device mismatch"),
    "a mode": (lambda x: x + 1, {"mode": "max-autotune", "fullgraph": False}, "takes mode='default'"),
    "options": (lambda x: x + 1, {"options": {"a": 1}, "fullgraph": False}, "no options"),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case, strict):
    install(["topk"], strict)
    function, options, message = REFUSALS[case]
    with pytest.raises(Exception, match=message):
        torch.compile(function, **(OPTIONS | options))(torch.randn(4, 4, device="neuron"))
    assert not RECORD.graphs
    assert not RECORD.fallbacks


def test_a_second_size_without_dynamic_false_is_refused():
    step = torch.compile(lambda x: x + 1, backend="neuron")
    step(torch.ones(2, 4, device="neuron"))
    with pytest.raises(Exception, match="NCC_EMOD025"):
        step(torch.ones(3, 4, device="neuron"))


def test_unsupported_attention_is_refused_whatever_its_parts():
    install(["scaled_dot_product_attention"])
    for dim in (16, 64):
        x = torch.randn(1, 1, 4, dim, device="neuron")
        with pytest.raises(Exception, match="aten::scaled_dot_product_attention is not supported"):
            torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), **OPTIONS)(x)


def checkpointed(block, how):
    inner, options = block.forward, {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)

    def forward(*args, **kwargs):
        return checkpoint(inner, *args, **options, **kwargs)

    block.forward = forward


MODELS = {
    "gpt2": {"n_head": 2, "d_model": 32},
    "flash": {"n_head": 2, "d_model": 128},
    "llama": {"n_head": 2, "n_kv_head": 1, "d_model": 128, "positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False},
    "full": {"n_head": 2, "d_model": 128},
    "selective": {"n_head": 2, "d_model": 128},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_gpt_is_that_of_the_cpu(name):
    reference = GPT(GPTConfig(vocab_size=50, context_length=16, n_layer=3, **MODELS[name]))
    reference.init_weights()
    model = copy.deepcopy(reference).to("neuron")
    model.tie()
    tokens = torch.randint(50, (4, 16))
    loss = LinearCrossEntropy()
    for block in model.blocks:
        if name in ("full", "selective"):
            checkpointed(block, name)
        block.compile(**OPTIONS)
    loss.compile_softmax(**OPTIONS)
    expected, found = NextTokenLoss(reference, LinearCrossEntropy()), NextTokenLoss(model, loss)
    for _ in range(2):
        sums = []
        for objective, here in ((expected, tokens), (found, tokens.to("neuron"))):
            objective.zero_grad()
            sums.append(objective(here, here) / tokens.numel())
            sums[-1].backward()
    torch.testing.assert_close(sums[1].cpu(), sums[0], atol=1e-6, rtol=1e-6)
    for (which, p), q in zip(reference.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad.cpu(), p.grad, atol=1e-6, rtol=1e-5, msg=which)
    assert [g.kind for g in RECORD.graphs] == ["forward", "inference", "backward"]  # all blocks, the loss's softmax, all blocks
    assert RECORD.graphs[1].function == "_nll_and_gradient"
    attention = "aten::scaled_dot_product_attention"
    assert (attention in RECORD.graphs[0].operations) == (name != "gpt2")
    assert ("aten::_scaled_dot_product_fused_attention_overrideable_backward" in RECORD.graphs[2].operations) == (name != "gpt2")


def test_checkpointing_keeps_less():
    kept = {}
    for how in ("none", "selective", "full"):
        torch.compiler.reset()
        RECORD.clear()
        block = GPT(GPTConfig(vocab_size=50, context_length=16, n_layer=1, n_head=2, d_model=128)).blocks[0].to("neuron")
        if how != "none":
            checkpointed(block, how)
        block.compile(**OPTIONS)
        x = torch.randn(4, 16, 128).to("neuron").requires_grad_()
        before = RECORD.allocated_bytes
        y = block(x, None)
        kept[how] = RECORD.allocated_bytes - before
        assert RECORD.graphs[0].output_bytes == kept[how]
        assert RECORD.peak_bytes >= before + RECORD.graphs[0].scratch_bytes
        y.sum().backward()
        size = x.nbytes
        del x, y, block
        gc.collect()
    assert kept["full"] == size
    assert kept["full"] < kept["selective"] < kept["none"]


def test_autocast_and_dropout_within():
    layer = Layer()
    layer.norm = nn.Dropout(0.5)
    reference, x = copy.deepcopy(layer), torch.randn(4, 8)
    layer.to("neuron").compile(**OPTIONS)
    with torch.autocast("neuron", torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        found = layer(x.to("neuron"))
        torch.manual_seed(1)
        expected = reference(x)
    assert found.dtype == torch.float32
    assert torch.equal(found.cpu(), expected)
    assert set(RECORD.graphs[0].dtypes) == {torch.float32}
    assert RECORD.graphs[0].operations["aten::_to_copy"] == 3


def test_dropout_is_drawn_again_as_it_was():
    block = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).to("neuron")
    results = []
    for compiled in (False, True):
        part = copy.deepcopy(block)
        checkpointed(part, "full")
        if compiled:
            part.compile(**OPTIONS)
        torch.manual_seed(2)
        y = part(torch.ones(4, 8, device="neuron"))
        torch.rand(3)
        y.sum().backward()
        results.append([y.detach(), *(p.grad for p in part.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_compiled_step_costs_little_more_than_on_the_cpu():
    reference = GPT(GPTConfig(vocab_size=50, context_length=64, n_layer=4, n_head=2, d_model=128))
    model = copy.deepcopy(reference).to("neuron")
    for block in model.blocks:
        block.compile(**OPTIONS)
    tokens = torch.randint(50, (4, 64))
    times = {}
    for name, m, here in (("cpu", reference, tokens), ("neuron", model, tokens.to("neuron"))):
        m.hidden_states(here).sum().backward()
        best = []
        for _ in range(5):
            started = time.process_time()
            m.hidden_states(here).sum().backward()
            best.append(time.process_time() - started)
        times[name] = min(best)
    assert times["neuron"] < 3 * times["cpu"], times
