import math

import pytest
import torch
import torch.nn.functional as F

from gpt import GPT, GPTConfig
from gpt.model.attention import KVCache, blockwise_causal_attention, causal_attention, document_places
from gpt.model.feedforward import GELUTanh
from gpt.model.positions import rotary_tables, rotate, sinusoidal_table

SHAPES = {
    "gpt2": {},
    "gpt2 without biases": {"bias": False, "tie_embeddings": False},
    "sinusoidal": {"positions": "sinusoidal", "embedding_scale": 8.0},
    "no positions": {"positions": "none", "activation": "gelu"},
    "llama": {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "n_kv_head": 2},
    "qwen3": {
        "positions": "rotary",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "qk_norm": True,
        "n_kv_head": 1,
        "head_dim": 24,
    },
    "neox": {"positions": "rotary", "rope_fraction": 0.25, "parallel_residual": True},
}


def small(**changes) -> GPT:
    torch.manual_seed(0)
    values = {"vocab_size": 97, "context_length": 24, "n_layer": 3, "n_head": 4, "d_model": 64} | changes
    model = GPT(GPTConfig(**values))
    with torch.no_grad():
        for p in model.parameters():  # far from the initial values, where every part matters
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture(params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def model(request) -> GPT:
    return small(**SHAPES[request.param])


def test_nothing_leaks_from_the_future(model):
    tokens = torch.randint(97, (2, 24))
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 97
    for context in (torch.no_grad, torch.enable_grad):  # two attention paths
        with context():
            before, after = model(tokens), model(changed)
        assert torch.equal(before[:, :15], after[:, :15])
        assert not torch.allclose(before[:, 15:], after[:, 15:], atol=1e-3)


def test_cache_equals_full_forward(model):
    model.eval()
    tokens = torch.randint(97, (2, 24))
    with torch.no_grad():
        full = model(tokens)
        for pieces in ([24], [10, 1, 1, 5, 7], [1] * 24):
            cache = KVCache(model.config, 2, 24)
            parts = [model(piece, cache) for piece in tokens.split(pieces, dim=1)]
            torch.testing.assert_close(torch.cat(parts, 1), full, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_cache_of_fixed_shapes_equals_the_growing_one(model):
    model.eval()
    tokens = torch.randint(97, (2, 20))
    full = model(tokens)
    for max_length in (20, 24):  # exactly full, and with room that nobody may see
        cache = KVCache(model.config, 2, max_length)
        model(tokens[:, :9], cache)
        for buffer in (*cache.keys, *cache.values):
            buffer[:, :, 9:] = 1e3  # what lies beyond what was read must not matter
        cache.fix_shapes()
        steps = [model(token, cache) for token in tokens[:, 9:].split(1, dim=1)]
        torch.testing.assert_close(torch.cat(steps, 1), full[:, 9:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed shapes"])
@torch.no_grad()
def test_padding_on_the_left_is_seen_by_nobody_and_shifts_no_position(model, fixed):
    model.eval()
    tokens = torch.randint(97, (3, 16))
    padding = torch.tensor([0, 5, 2])
    cache = KVCache(model.config, 3, 24, padding=padding)
    read = [model(tokens[:, :6], cache), model(tokens[:, 6:10], cache)]
    if fixed:
        cache.fix_shapes()
    read += [model(token, cache) for token in tokens[:, 10:].split(1, dim=1)]
    got = torch.cat(read, 1)
    for row, padded in enumerate(padding.tolist()):
        alone = model(tokens[row : row + 1, padded:])
        torch.testing.assert_close(got[row, padded:], alone[0], atol=2e-5, rtol=1e-4)
    assert got.isfinite().all()


class TestPlaces:
    CONFIG = GPTConfig(vocab_size=7, context_length=8, n_layer=1, n_head=1, d_model=4)

    def seen(self, mask: torch.Tensor) -> list[list[list[int]]]:
        """Row by row and query by query, the places that are seen."""
        assert set(mask.unique().tolist()) <= {0.0, -math.inf}
        return [[(query == 0).nonzero().flatten().tolist() for query in row[0]] for row in mask]

    def test_without_padding_only_a_later_chunk_needs_a_mask(self):
        cache = KVCache(self.CONFIG, 1, 8)
        assert cache.places(3) == (slice(0, 3), None)
        cache.advance(3)
        assert cache.places(1) == (slice(3, 4), None)
        places, mask = cache.places(2)
        assert places == slice(3, 5)
        assert self.seen(mask) == [[[0, 1, 2, 3], [0, 1, 2, 3, 4]]]

    def test_with_padding(self):
        cache = KVCache(self.CONFIG, 2, 8, padding=torch.tensor([0, 2]))
        places, mask = cache.places(3)
        assert places.tolist() == [[0, 1, 2], [0, 0, 0]]
        assert self.seen(mask) == [[[0], [0, 1], [0, 1, 2]], [[0], [1], [2]]]  # padding sees itself
        cache.advance(3)
        places, mask = cache.places(2)
        assert places.tolist() == [[3, 4], [1, 2]]
        assert self.seen(mask) == [[[0, 1, 2, 3], [0, 1, 2, 3, 4]], [[2, 3], [2, 3, 4]]]

    def test_of_fixed_shapes(self):
        for padding, places, seen in ((None, [3], [[[0, 1, 2, 3]]]), (torch.tensor([0, 2]), [[3], [1]], [[[0, 1, 2, 3]], [[2, 3]]])):
            cache = KVCache(self.CONFIG, 2, 8, padding=padding)
            cache.advance(3)
            cache.fix_shapes()
            found, mask = cache.places(1)
            assert (found.tolist(), self.seen(mask)) == (places, seen)
            assert mask.shape[-1] == 8
            cache.advance(1)
            assert cache.places(1)[0].tolist() == (torch.tensor(places) + 1).tolist()

    def test_repeated_rows_stand_next_to_one_another(self):
        cache = KVCache(self.CONFIG, 2, 8, padding=torch.tensor([0, 2]))
        cache.keys[0][1] = 5.0
        cache.repeat(3)
        assert cache.padding.tolist() == [0, 0, 0, 2, 2, 2]
        assert cache.keys[0].shape == cache.values[0].shape == (6, 1, 8, 4)
        assert cache.keys[0].amax((1, 2, 3)).tolist() == [0, 0, 0, 5, 5, 5]


def test_a_sequence_too_long_is_refused(model):
    with pytest.raises(ValueError, match="25 tokens do not fit context_length=24"):
        model(torch.zeros(1, 25, dtype=torch.long))


@torch.no_grad()
def test_more_than_a_cache_holds_is_refused(model):
    for padding in (None, torch.tensor([1])):
        cache = KVCache(model.config, 1, 10, padding=padding)
        model(torch.zeros(1, 9, dtype=torch.long), cache)
        with pytest.raises(ValueError, match="11 tokens do not fit a KV cache of 10"):
            model(torch.zeros(1, 2, dtype=torch.long), cache)
        model(torch.zeros(1, 1, dtype=torch.long), cache)
        with pytest.raises(ValueError, match="11 tokens do not fit"):
            model(torch.zeros(1, 1, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="a KV cache of 25 tokens exceeds context_length=24"):
        KVCache(model.config, 1, 25)


def test_gradients_reach_every_parameter(model):
    model(torch.randint(97, (2, 24))).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        if not name.endswith("k.bias"):  # a bias on the keys shifts all scores alike: its gradient is 0
            assert p.grad.abs().sum() > 0, name


def test_module_names_are_the_contract():
    names = dict(small(**SHAPES["qwen3"], tie_embeddings=False).named_modules())
    expected = "embeddings.tokens blocks.0.attention_norm blocks.0.attention.q blocks.0.attention.k blocks.0.attention.v "
    expected += "blocks.0.attention.out blocks.0.attention.q_norm blocks.0.attention.k_norm blocks.0.feedforward_norm "
    expected += "blocks.0.feedforward.up blocks.0.feedforward.gate blocks.0.feedforward.down final_norm head"
    assert set(expected.split()) <= names.keys()
    assert "embeddings.positions" in dict(small().named_modules())


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=5000, context_length=64, n_layer=8, n_head=4, d_model=256))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p) if "norm" in name and "weight" in name else torch.zeros_like(p)), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith(("out.weight", "down.weight")) else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
    loss = F.cross_entropy(model(torch.randint(5000, (4, 64))).flatten(0, 1), torch.randint(5000, (256,)))
    assert loss.item() == pytest.approx(math.log(5000), rel=0.02)


def test_built_on_meta_first_it_is_the_same_model():
    config = GPTConfig(vocab_size=50, context_length=16, n_layer=2, n_head=2, d_model=32, **SHAPES["neox"])
    direct = GPT(config)
    torch.manual_seed(3)
    direct.init_weights()
    torch.manual_seed(3)
    materialised = GPT.materialise(config)
    materialised.init_weights()
    tokens = torch.randint(50, (1, 16))
    assert torch.equal(direct(tokens), materialised(tokens))
    assert materialised.head.weight is materialised.embeddings.tokens.weight


def test_dropout_acts_only_in_training():
    model = small(dropout=0.3)
    tokens = torch.randint(97, (2, 24))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("length", [33, 128, 300])  # less than a block of queries, one, and two and a part
@pytest.mark.parametrize("masked", [False, True])
def test_blockwise_attention_and_its_gradients_are_those_of_the_fused_one(heads, length, masked):
    n_head, n_kv_head = heads
    shapes = [(2, n, length, 16) for n in (n_head, n_kv_head, n_kv_head)]
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mask = document_places(torch.randint(0, 3, (2, length)).sort(-1).values, torch.float32)[1] if masked else None
    gradient = torch.randn(2, n_head, length, 16)
    ours, fused = blockwise_causal_attention(*inputs, mask), causal_attention(*exact, mask=mask)
    ours.backward(gradient)
    fused.backward(gradient.double())
    torch.testing.assert_close(ours.double(), fused, atol=1e-5, rtol=1e-5)
    for x, y in zip(inputs, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-4, rtol=1e-5)


def test_blockwise_attention_in_bf16_is_as_close_as_the_fused_one():
    exact = [torch.randn(2, 3, 256, 32).bfloat16().double().requires_grad_() for _ in range(3)]
    gradient = torch.randn(2, 3, 256, 32).bfloat16()
    reference = causal_attention(*exact)
    reference.backward(gradient.double())

    def errors(attention):
        inputs = [x.detach().bfloat16().requires_grad_() for x in exact]
        y = attention(*inputs)
        y.backward(gradient)
        pairs = [(y, reference), *((x.grad, e.grad) for x, e in zip(inputs, exact, strict=True))]
        return [((ours.double() - exact).norm() / exact.norm()).item() for ours, exact in pairs]

    for blockwise, fused in zip(errors(blockwise_causal_attention), errors(causal_attention), strict=True):
        assert blockwise < max(2.5 * fused, 6e-3)


def test_compiled_gelu_is_gelu():
    x = torch.cat([torch.linspace(-12, 12, 1001), torch.tensor([-1e4, 1e4])])
    compiled = torch.compile(GELUTanh(), dynamic=False, backend="aot_eager")
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y, z = compiled(ours), torch.nn.functional.gelu(exact, approximate="tanh")
    y.sum().backward()
    z.sum().backward()
    torch.testing.assert_close(y.double(), z, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.grad.double(), exact.grad, atol=1e-6, rtol=1e-6)


def test_sinusoidal_table_is_the_papers_formula():
    table = sinusoidal_table(50, 7)
    for position in (0, 1, 17, 49):
        for i in range(7):
            angle = position / 10000 ** (2 * (i // 2) / 7)
            assert table[position, i].item() == pytest.approx(math.cos(angle) if i % 2 else math.sin(angle), abs=1e-6)


def test_rotation_depends_on_distance_alone():
    cos, sin = rotary_tables(64, 16, 10000.0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(at_q: int, at_k: int) -> float:
        return (rotate(q, cos[at_q : at_q + 1], sin[at_q : at_q + 1]) * rotate(k, cos[at_k : at_k + 1], sin[at_k : at_k + 1])).sum().item()

    assert score(5, 2) == pytest.approx(score(40, 37), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 4), abs=1e-3)
    torch.testing.assert_close(rotate(q, cos[9:10], sin[9:10]).norm(), q.norm())


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_gpt2_presets_have_the_published_size(preset, parameters):
    from gpt.compose import compose_run

    with torch.device("meta"):
        assert GPT(compose_run("pretrain", [f"model={preset}"]).model).num_parameters() == parameters


def test_flops_per_token_counts_matrix_products():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = small(**SHAPES["llama"])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not see into the CPU's fused kernel
        model(torch.randint(97, (2, 24))).sum().backward()
    assert model.flops_per_token() * 48 == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("shape", ["gpt2", "neox", "llama"])
def test_heads_that_do_not_fit_the_width_are_refused_where_stock_classes_refuse_them(shape):
    with pytest.raises(ValueError, match="d_model=66 is not divisible by n_head=4"):
        small(**SHAPES[shape], d_model=66, head_dim=16)
    assert small(**SHAPES["qwen3"] | {"d_model": 66}).config.stock_architecture() == "Qwen3"
