"""Documents packed into one row: none sees another, and each is learned as if it stood alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import GPT, GPTConfig
from gpt.model.attention import KVCache, document_places
from gpt.model.loss import IGNORE, LinearCrossEntropy

T = 40
RMS = {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False}
SHAPES = {
    "learned": {},
    "sinusoidal": {"positions": "sinusoidal"},
    "none": {"positions": "none"},
    "rotary": {"positions": "rotary"},
    "part-rotary-parallel": {"positions": "rotary", "rope_fraction": 0.5, "parallel_residual": True},
    "grouped": {**RMS, "n_kv_head": 2},
    "qk-norm-one-kv-head": {**RMS, "qk_norm": True, "n_kv_head": 1, "head_dim": 12},
}


def small(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{"vocab_size": 53, "context_length": T, "n_layer": 2, "n_head": 4, "d_model": 32} | changes))
    with torch.no_grad():
        for p in model.parameters():  # far from the initial values, where every part matters
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture(scope="module", params=SHAPES)
def model(request) -> GPT:
    return small(**SHAPES[request.param])


def numbers(*rows: list[int]) -> torch.Tensor:
    """Lengths of each row's documents -> (B, T), what is left of a row being one more."""
    whole = [[*lengths, T - sum(lengths)] for lengths in rows]
    return torch.stack([torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)) for lengths in whole])


def lengths_of_rows(rows: int, generator: torch.Generator) -> list[list[int]]:
    """Documents of random lengths, some of one token, which leave room at the end of a row or do not."""
    found = []
    for _ in range(rows):
        lengths, left = [], T
        while left and len(lengths) < 6:
            lengths.append(int(torch.randint(1, min(left, 17) + 1, (1,), generator=generator)))
            left -= lengths[-1]
        found.append(lengths)
    return found


def test_places_and_mask():
    places, mask = document_places(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 3]]), torch.float32)
    assert places.tolist() == [[0, 1, 0, 1, 2], [0, 0, 0, 1, 0]]
    assert places.dtype == torch.int64
    assert mask.shape == (2, 1, 5, 5)
    assert set(mask.unique().tolist()) == {0.0, float("-inf")}
    seen = [[(query == 0).nonzero().flatten().tolist() for query in row[0]] for row in mask]
    assert seen == [[[0], [0, 1], [2], [2, 3], [2, 3, 4]], [[0], [1], [2], [2, 3], [4]]]


def check_that_no_document_moves_another(model: GPT, documents: torch.Tensor) -> None:
    tokens = torch.randint(53, documents.shape)
    before = model(tokens, documents=documents)
    for number in range(int(documents.max()) + 1):
        here = documents == number
        after = model(torch.where(here, (tokens + 7) % 53, tokens), documents=documents)
        assert (after - before)[~here].abs().max() == 0
        assert (after - before)[here].abs().amax(-1).min() > 1e-3  # all of it moves, its first token too


@pytest.mark.parametrize("gradients", [False, True])  # two ways of attention
def test_no_document_moves_another(model, gradients):
    with torch.set_grad_enabled(gradients):
        check_that_no_document_moves_another(model, numbers([13, 1, 20], [5, 30]))


def test_within_a_document_nothing_leaks_from_the_future(model):
    documents, tokens = numbers([10, 20]), torch.randint(53, (1, T))
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 53
    with torch.no_grad():
        moved = (model(tokens, documents=documents) - model(changed, documents=documents)).abs().amax(-1)[0]
    assert moved[:15].max() == 0
    assert moved[15:30].min() > 0
    assert moved[30:].max() == 0


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=10).filter(lambda lengths: sum(lengths) < T), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_a_document_is_read_as_if_it_stood_alone(model, lengths, seed):
    tokens = torch.randint(53, (1, T), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        packed = model(tokens, documents=numbers(lengths))
        alone = [model(piece) for piece in tokens.split([*lengths, T - sum(lengths)], dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=2e-5, rtol=1e-4)


def test_one_document_a_row_is_as_without_documents(model):
    tokens = torch.randint(53, (2, T))
    torch.testing.assert_close(model(tokens, documents=torch.zeros_like(tokens)), model(tokens), atol=1e-5, rtol=1e-5)


def check_packed_loss(model: GPT, seed: int) -> None:
    """Sums of losses and their gradients: of packed rows, and of the same documents one by one."""
    generator = torch.Generator().manual_seed(seed)
    rows = lengths_of_rows(3, generator)
    tokens = torch.randint(53, (3, T), generator=generator)
    documents = numbers(*rows)
    targets = torch.full_like(tokens, IGNORE)
    targets[:, :-1] = torch.where(documents[:, 1:] == documents[:, :-1], tokens[:, 1:], IGNORE)
    for row, lengths in enumerate(rows):
        targets[row, sum(lengths) :] = IGNORE  # padding
    loss = LinearCrossEntropy()

    def gradients(total: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        total.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    packed = loss(model.hidden_states(tokens, documents=documents), model.head.weight, targets)
    packed_gradients = gradients(packed)
    unpacked = torch.zeros(())
    with torch.compiler.set_stance("force_eager"):
        for row, lengths in enumerate(rows):
            for piece in tokens[row, : sum(lengths)].split(lengths):
                if len(piece) > 1:
                    unpacked = unpacked + F.cross_entropy(model(piece[None, :-1])[0], piece[1:], reduction="sum")
        unpacked_gradients = gradients(unpacked)
    assert packed.item() == pytest.approx(unpacked.item(), rel=1e-5)
    assert packed_gradients.keys() == unpacked_gradients.keys()
    for name, gradient in unpacked_gradients.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(packed_gradients[name], gradient, atol=1e-5 * scale, rtol=1e-5, msg=name)


@pytest.mark.parametrize("seed", range(4))
def test_packed_loss_and_gradients_are_those_of_the_documents(model, seed):
    check_packed_loss(model, seed)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["learned", "part-rotary-parallel", "qk-norm-one-kv-head"])
def test_compiled_block_by_block(shape):
    model = small(**SHAPES[shape])
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True)
    for seed in range(3):
        check_packed_loss(model, seed)
    documents = numbers([13, 1, 20], [5, 30], [40])
    check_that_no_document_moves_another(model, documents)
    with torch.autocast("cpu", torch.bfloat16):
        check_that_no_document_moves_another(model, documents)


@pytest.mark.slow
def test_compiled_as_one_graph():
    model = small(**SHAPES["qk-norm-one-kv-head"])
    tokens, documents = torch.randint(53, (2, T)), numbers([13, 1, 20], [5, 30])
    whole = torch.compile(model, dynamic=False, fullgraph=True)
    torch.testing.assert_close(whole(tokens, documents=documents), model(tokens, documents=documents), atol=2e-5, rtol=1e-4)
    other = numbers([1, 1, 1], [39])
    expected = model(tokens, documents=other)
    with torch.compiler.set_stance("fail_on_recompile"):  # other borders, the same shapes
        torch.testing.assert_close(whole(tokens, documents=other), expected, atol=2e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert whole(tokens, documents=documents).dtype == torch.bfloat16


def test_in_bf16():
    model = small(**SHAPES["qk-norm-one-kv-head"])
    with torch.autocast("cpu", torch.bfloat16):
        check_that_no_document_moves_another(model, numbers([13, 1, 20], [5, 30]))
    check_that_no_document_moves_another(model.to(torch.bfloat16), numbers([13, 1, 20], [5, 30]))


def test_dropout_in_packed_rows():
    model = small(**SHAPES["grouped"], dropout=0.2)
    tokens, documents = torch.randint(53, (2, T)), numbers([13, 1, 20], [5, 30])
    logits = model(tokens, documents=documents)
    logits.square().mean().backward()
    assert logits.isfinite().all()
    assert not torch.equal(logits, model(tokens, documents=documents))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.manual_seed(1)
    before = model(tokens, documents=documents)
    torch.manual_seed(1)
    after = model(torch.where(documents == 0, (tokens + 7) % 53, tokens), documents=documents)
    assert (after - before)[documents != 0].abs().max() == 0


def test_a_cache_and_documents_are_refused(model):
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"KV cache .* documents"):
        model(tokens, KVCache(model.config, 1, 8), tokens)
