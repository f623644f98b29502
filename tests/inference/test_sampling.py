"""The distribution under every filter is that of `transformers`' own processors, in its order; tokens are drawn exactly from it."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpt.inference import sampling as sampling_module
from gpt.inference.sampling import Sampling, filtered_probabilities, next_token, penalise, uniform_numbers

PLAIN = Sampling(temperature=1.0)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def ours(logits: torch.Tensor, sampling: Sampling, text: torch.Tensor) -> torch.Tensor:
    seen = torch.zeros(logits.shape, dtype=torch.bool).scatter_(1, text, True)
    return filtered_probabilities(penalise(logits, sampling.repetition_penalty, seen), sampling)


@pytest.fixture(scope="module")
def generator() -> transformers.PreTrainedModel:
    """Any model: it is asked only for the processors that `generate` would apply."""
    return transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(vocab_size=5, n_positions=4, n_embd=4, n_layer=1, n_head=1)
    )


def theirs(generator, logits: torch.Tensor, sampling: Sampling, text: torch.Tensor) -> torch.Tensor:
    settings = transformers.GenerationConfig(
        do_sample=True, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p,
        min_p=sampling.min_p or None, repetition_penalty=sampling.repetition_penalty,
    )  # fmt: skip
    chain = generator._get_logits_processor(settings, input_ids_seq_length=text.shape[1])
    return chain(text, logits.clone()).softmax(-1)


FILTERS = {"top_k": [0, 1, 7, 2000], "top_p": [1.0, 0.001, 0.6, 0.95], "min_p": [0.0, 0.05, 0.5], "repetition_penalty": [1.0, 1.3, 0.7]}
COMBINATIONS = [
    Sampling(temperature, **dict(zip(FILTERS, values, strict=True)))
    for temperature, *values in itertools.product([0.5, 1.0, 1.7], *FILTERS.values())
]
VOCABULARIES = {"one": (1, 1.0), "tiny": (5, 2.0), "middling": (300, 2.0), "large and peaked": (3000, 4.0), "large and flat": (3000, 0.02)}


def test_the_order_is_the_one_in_which_generate_applies_them(generator):
    settings = transformers.GenerationConfig(do_sample=True, temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=2.0)
    names = [type(step).__name__ for step in generator._get_logits_processor(settings, input_ids_seq_length=1)]
    known = ["RepetitionPenaltyLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"]
    assert names == known


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_every_combination_gives_the_distribution_of_transformers(generator, vocabulary):
    size, spread = VOCABULARIES[vocabulary]
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(3, size, generator=random) * spread
    text = torch.randint(size, (3, 9), generator=random)
    for sampling in COMBINATIONS:
        expected, got = theirs(generator, logits, sampling, text), ours(logits, sampling, text)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4, msg=lambda m, s=sampling: f"{s}\n{m}")
        assert torch.equal(got > 0, expected > 0), sampling


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_with_ties_as_many_are_kept_as_transformers_keeps(generator, vocabulary):
    """Which of several equally likely tokens stay is for top-p to choose, and `transformers` leaves it to an unstable sort."""
    size, spread = VOCABULARIES[vocabulary]
    logits = (torch.randn(3, size, generator=torch.Generator().manual_seed(1)) * max(spread, 0.4) * 2).round() / 2
    text = torch.zeros(3, 1, dtype=torch.int64)
    for sampling in COMBINATIONS:
        if sampling.repetition_penalty != 1:
            continue
        expected, got = theirs(generator, logits, sampling, text), ours(logits, sampling, text)
        torch.testing.assert_close(got.sort(-1).values, expected.sort(-1).values, atol=1e-6, rtol=1e-4)


def test_both_ways_of_the_nucleus_are_taken(monkeypatch):
    """Few of many tokens are found among the first 1024; a flat distribution takes the sort of all."""
    sorts: list[int] = []
    original = torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda self, *args, **kwargs: sorts.append(1) or original(self, *args, **kwargs))
    assert sampling_module._PROBED == 1024
    peaked = filtered_probabilities(torch.randn(1, 3000) * 4, dataclasses.replace(PLAIN, top_p=0.9))
    assert not sorts
    assert (peaked > 0).sum() < 1024
    flat = filtered_probabilities(torch.randn(1, 3000) * 0.02, dataclasses.replace(PLAIN, top_p=0.9))
    assert sorts
    assert (flat > 0).sum() > 2600


# By hand


def row(*logits: float, **changes) -> list[float]:
    return filtered_probabilities(torch.tensor([logits]), dataclasses.replace(PLAIN, **changes))[0].tolist()


def reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
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
        if total < top_p and probabilities[token] >= min_p * probabilities.max():
            kept[token] = z[token]
        total += probabilities[token]
        if min_p:
            assume(abs(probabilities[token] - min_p * probabilities.max()) > 1e-4 * probabilities.max())
    return softmax(kept)


# Multiples of 1/64, many of them equal: what ties in fp64 ties in fp32.
LOGITS = hnp.arrays(np.float32, st.integers(1, 12), elements=st.one_of(st.integers(-1280, 1280), st.integers(-2, 2)).map(lambda n: n / 64))


@given(
    logits=LOGITS,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 14),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.999)),
)
def test_the_distribution_is_the_reference_s(logits, temperature, top_k, top_p, min_p):
    expected = reference(logits, temperature, top_k, top_p, min_p)
    # two rows: what is in one must not touch the other
    both = torch.from_numpy(np.stack([logits, logits[::-1].copy()]))
    got = filtered_probabilities(both, Sampling(temperature, top_k, top_p, min_p))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got[0].numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(got.sum(-1).numpy(), 1, atol=1e-5)


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


@pytest.mark.parametrize(("size", "top_p", "kept"), [(1000, 0.1005, 101), (5000, 0.1001, 501), (5000, 0.5001, 2501)])
def test_top_p_takes_the_lower_ids_of_a_tie(size, top_p, kept):
    got = filtered_probabilities(torch.zeros(1, size), dataclasses.replace(PLAIN, top_p=top_p))[0] > 0
    assert got[:kept].all()
    assert not got[kept:].any()


def test_top_k_comes_before_top_p():
    # of the two that top_k leaves, the first has 0.62 > 0.6; of all three it would have 0.5
    assert row(*(float(np.log(p)) for p in (0.5, 0.3, 0.2)), top_k=2, top_p=0.6) == pytest.approx([1, 0, 0])


def test_min_p():
    thirds = [float(np.log(p)) for p in (0.6, 0.3, 0.1)]
    assert row(*thirds, min_p=0.4) == pytest.approx([2 / 3, 1 / 3, 0])
    assert row(*thirds, min_p=0.6) == pytest.approx([1, 0, 0])
    assert row(*thirds, min_p=1.0) == pytest.approx([1, 0, 0])


def test_the_penalty_lowers_what_was_said_whatever_its_sign():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, float("-inf")]])
    seen = torch.tensor([[True, True, False, False, True]])
    assert penalise(logits, 2.0, seen).tolist() == [[1.0, -4.0, 2.0, -2.0, float("-inf")]]
    assert logits[0, 0] == 2.0


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-40, 1e-300])
def test_a_temperature_near_0_takes_the_likeliest(temperature):
    assert row(1.0, 3.0, 2.9, -50.0, temperature=temperature) == pytest.approx([0, 1, 0, 0])
    assert row(-1.0, -3.0, temperature=temperature, top_k=2, top_p=0.9, min_p=0.1) == pytest.approx([1, 0])


def test_logits_in_bf16_and_logits_that_exclude_a_token():
    logits = torch.tensor([[1.0, float("-inf"), 2.0]], dtype=torch.bfloat16)
    got = filtered_probabilities(logits, Sampling(1.0, 2, 0.99, 0.01))[0]
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx([float(p) for p in softmax(np.array([1.0, -np.inf, 2.0]))])


# Drawing


class TestNextToken:
    def test_temperature_0_is_greedy_and_needs_no_numbers(self):
        logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
        for sampling in (Sampling(temperature=0), Sampling(temperature=0, top_k=2, top_p=0.5, min_p=0.5)):
            assert next_token(logits, sampling, torch.full((2, 1), float("nan"))).tolist() == [[1], [0]]
        assert next_token(torch.zeros(20, 50), Sampling(temperature=0), torch.rand(20, 1)).tolist() == [[0]] * 20

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @given(
        logits=LOGITS,
        sampling=st.builds(Sampling, st.floats(0.1, 3), st.integers(0, 5), st.sampled_from([0.3, 0.9, 1.0]), st.sampled_from([0.0, 0.1])),
        number=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1e-300, 1 - 2**-53, 1 - 2**-24])),
    )
    def test_it_is_the_first_whose_share_of_the_whole_exceeds_the_number(self, dtype, logits, sampling, number):
        uniform = torch.tensor([[number]], dtype=dtype)
        rows = torch.from_numpy(logits)[None]
        token = next_token(rows, sampling, uniform)
        assert (token.shape, token.dtype) == ((1, 1), torch.int64)
        index = int(token)
        probabilities = filtered_probabilities(rows, sampling)[0].double().tolist()
        assert probabilities[index] > 0
        rounding = 1e-12 if dtype == torch.float64 else 1e-6
        total = sum(probabilities)
        assert sum(probabilities[:index]) / total <= number + rounding
        assert number <= sum(probabilities[: index + 1]) / total + rounding

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("number", [0.0, 1.0 - 2**-53, 1.0 - 2**-24])
    def test_the_ends_never_give_what_is_impossible(self, dtype, number):
        impossible = float("-inf")
        logits = torch.tensor([[impossible, impossible, 1.0, 0.5, impossible, 2.0, impossible, -1e4]])
        token = int(next_token(logits, PLAIN, torch.tensor([[number]], dtype=dtype)))
        assert token == (2 if number == 0 else 5)

    def test_exact_borders(self):
        logits = torch.log(torch.tensor([[0.25, 0.25, 0.5]]))
        numbers = torch.tensor([[0.0], [0.2499], [0.2501], [0.4999], [0.5001], [0.9999]], dtype=torch.float64)
        assert next_token(logits.expand(6, -1), PLAIN, numbers).flatten().tolist() == [0, 0, 1, 1, 2, 2]

    def test_evenly_spread_numbers_give_every_token_its_share(self):
        logits = torch.randn(1, 400, generator=torch.Generator().manual_seed(0)) * 3
        sampling = Sampling(1.5, 200, 0.97)
        numbers = (torch.arange(20_000, dtype=torch.float64)[:, None] + 0.5) / 20_000
        drawn = torch.bincount(next_token(logits.expand(20_000, -1), sampling, numbers).flatten(), minlength=400) / 20_000
        torch.testing.assert_close(drawn, filtered_probabilities(logits, sampling)[0], atol=1.01 / 20_000, rtol=0)


class TestUniformNumbers:
    CPU = torch.device("cpu")

    def test_a_stream_for_each_sample_that_their_number_and_length_do_not_change(self):
        few, many = (uniform_numbers(Sampling(seed=5), samples, length, self.CPU) for samples, length in ((2, 30), (5, 100)))
        assert torch.equal(few, many[:2, :30])
        assert len({tuple(stream) for stream in many.tolist()}) == 5
        assert (few.dtype, few.shape) == (torch.float64, (2, 30))
        assert 0 <= many.min() < 0.05
        assert 0.95 < many.max() < 1

    def test_the_seed_decides_and_none_is_another_each_time(self):
        draw = [uniform_numbers(Sampling(seed=seed), 1, 9, self.CPU).tolist() for seed in (1, 1, 2, None, None)]
        assert draw[0] == draw[1] != draw[2]
        assert draw[3] != draw[4]

    def test_torchs_own_generator_is_left_alone(self):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        uniform_numbers(Sampling(seed=None), 2, 3, self.CPU)
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_largest_seed(self):
        assert uniform_numbers(Sampling(seed=2**32 - 1), 3, 2, self.CPU).shape == (3, 2)
