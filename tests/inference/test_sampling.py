import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpt.inference.sampling import filtered_probabilities, next_token


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """One row in fp64, a token at a time."""
    z = logits.astype(np.float64) / temperature
    if 0 < top_k < len(z):
        kth = sorted(z, reverse=True)[top_k - 1]
        z = np.where(z >= kth, z, -np.inf)
    probabilities = softmax(z)
    kept, total = np.full(len(z), -np.inf), 0.0
    for token in sorted(range(len(z)), key=lambda i: (-z[i], i)):
        if top_p < 1:
            assume(abs(total - top_p) > 1e-4)  # fp32 and fp64 may disagree about what lies on the border
        if total < top_p:
            kept[token] = z[token]
        total += probabilities[token]
    return softmax(kept)


# Multiples of 1/64, many of them equal: what ties in fp64 ties in fp32.
LOGITS = hnp.arrays(np.float32, st.integers(1, 12), elements=st.one_of(st.integers(-1280, 1280), st.integers(-2, 2)).map(lambda n: n / 64))


@given(logits=LOGITS, temperature=st.floats(0.05, 5), top_k=st.integers(0, 14), top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)))
def test_the_distribution_is_the_reference_s(logits, temperature, top_k, top_p):
    expected = reference(logits, temperature, top_k, top_p)
    # two rows: what is in one must not touch the other
    got = filtered_probabilities(torch.from_numpy(np.stack([logits, logits[::-1].copy()])), temperature, top_k, top_p)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got[0].numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(got.sum(-1).numpy(), 1, atol=1e-5)


def row(*logits: float, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> list[float]:
    return filtered_probabilities(torch.tensor([logits]), temperature, top_k, top_p)[0].tolist()


def test_nothing_set_is_the_softmax():
    assert row(1.0, 2.0, 3.0) == pytest.approx(softmax(np.array([1.0, 2.0, 3.0])))
    assert row(1.0, 2.0, 3.0, temperature=2.0) == pytest.approx(softmax(np.array([0.5, 1.0, 1.5])))


def test_top_k():
    assert row(1.0, 3.0, 2.0, top_k=1) == [0, 1, 0]
    assert [p > 0 for p in row(1.0, 3.0, 2.0, 0.0, top_k=2)] == [False, True, True, False]
    assert row(1.0, 3.0, 2.0, top_k=3) == row(1.0, 3.0, 2.0, top_k=99) == row(1.0, 3.0, 2.0)


def test_top_k_keeps_what_ties_with_the_last():
    assert row(1.0, 2.0, 2.0, 2.0, 0.0, top_k=2) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0])


def test_top_p_reaches_p_with_the_fewest():
    halves = [float(np.log(p)) for p in (0.5, 0.25, 0.125, 0.125)]
    assert row(*halves, top_p=0.4) == pytest.approx([1, 0, 0, 0])
    assert row(*halves, top_p=0.6) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert row(*halves[::-1], top_p=0.6) == pytest.approx([0, 0, 1 / 3, 2 / 3])
    assert row(*halves, top_p=0.9) == pytest.approx([0.5, 0.25, 0.125, 0.125])


def test_top_p_never_keeps_fewer_than_one():
    assert row(5.0, 1.0, 0.0, top_p=1e-9) == [1, 0, 0]


def test_top_p_takes_the_lower_ids_of_a_tie():
    probabilities = torch.zeros(1, 1000)  # long enough for a sort that is not stable to show it
    kept = filtered_probabilities(probabilities, 1.0, 0, 0.1005)[0] > 0
    assert kept[:101].all()
    assert not kept[101:].any()


def test_top_k_comes_before_top_p():
    # of the two that top_k leaves, the first has 0.62 > 0.6; of all three it would have 0.5
    assert row(*(float(np.log(p)) for p in (0.5, 0.3, 0.2)), top_k=2, top_p=0.6) == pytest.approx([1, 0, 0])


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-40, 1e-300])
def test_a_temperature_near_0_takes_the_likeliest(temperature):
    assert row(1.0, 3.0, 2.9, -50.0, temperature=temperature) == pytest.approx([0, 1, 0, 0])
    assert row(-1.0, -3.0, temperature=temperature, top_k=2, top_p=0.9) == pytest.approx([1, 0])


def test_logits_in_bf16_and_logits_that_exclude_a_token():
    got = filtered_probabilities(torch.tensor([[1.0, float("-inf"), 2.0]], dtype=torch.bfloat16), 1.0, 2, 0.99)[0]
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx([float(p) for p in softmax(np.array([1.0, -np.inf, 2.0]))])


class TestNextToken:
    def test_temperature_0_is_greedy(self):
        logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
        assert next_token(logits, 0, 0, 1.0, None).tolist() == [[1], [0]]
        assert next_token(logits, 0, 2, 0.5, None).tolist() == [[1], [0]]
        assert next_token(torch.zeros(20, 50), 0, 0, 1.0, None).tolist() == [[0]] * 20

    def test_draws_follow_the_distribution(self):
        logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
        generator = torch.Generator().manual_seed(0)
        draws = next_token(logits.expand(20_000, -1), 1.5, 3, 1.0, generator).flatten()
        shares = torch.bincount(draws, minlength=4) / len(draws)
        np.testing.assert_allclose(shares.numpy(), reference(logits[0].numpy(), 1.5, 3, 1.0), atol=0.015)
        assert shares[3] == 0

    def test_the_generator_decides(self):
        logits = torch.zeros(64, 50)
        first, second, other = (next_token(logits, 1.0, 0, 1.0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert first.shape == (64, 1)
        assert first.dtype == torch.int64
        assert torch.equal(first, second)
        assert not torch.equal(first, other)
