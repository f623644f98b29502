"""Token ids in, token ids out: the cache, batches, samples, limits and windows that slide, each against the plain way of doing it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from inference_models import GREEDY, SHAPES, VOCAB, alone, prompt_of, random_model, rows_of, scripted

from gpt.data.tokenizer_training import byte_tokenizer
from gpt.errors import UserError
from gpt.inference.decode import Speed, generate_tokens
from gpt.inference.sampling import Sampling, next_token, penalise, uniform_numbers
from gpt.model.transformer import GPT

CONTEXT = 24
SAMPLED = Sampling(temperature=1.3, top_k=40, top_p=0.95, min_p=0.001, repetition_penalty=1.2, seed=7)
LENGTHS = (1, 9, 4, 9, 2)
PROMPTS = [prompt_of(length, start) for start, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def model(request: pytest.FixtureRequest) -> GPT:
    return random_model(request.param, context_length=CONTEXT)


@torch.no_grad()
def plainly(
    model: GPT, prompt: Sequence[int], max_tokens: int, sampling: Sampling, sample: int = 0, slide: bool = False, first: Sequence[int] = ()
) -> list[int]:
    """The whole text anew for every token; when it is longer than the context, from the second half of what that held."""
    limit = model.config.context_length
    numbers = uniform_numbers(sampling, sample + 1, max_tokens, torch.device("cpu"))[sample]
    text, window = list(prompt), list(prompt)
    for number in numbers:
        if slide and len(window) > limit:
            window = window[-(limit // 2) :]
        logits = model(torch.tensor([window]))[:, -1]
        if first and len(text) == len(prompt):
            logits = torch.full_like(logits, -math.inf).index_copy(1, torch.tensor(first), logits[:, first])
        seen = torch.zeros(1, VOCAB, dtype=torch.bool)
        seen[0, text] = True
        token = int(next_token(penalise(logits, sampling.repetition_penalty, seen), sampling, number.view(1, 1)))
        text.append(token)
        window.append(token)
    return text[len(prompt) :]


def test_the_script_is_followed():
    ids = byte_tokenizer().encode("aaab, aaa")
    assert alone(scripted(ids, 257, 3), [7, 7, 7], len(ids)) == ids


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("prompt_length", [1, 2, 9])
def test_the_cache_changes_nothing(model, prompt_length, sampling):
    prompt = prompt_of(prompt_length)
    made = alone(model, prompt, CONTEXT - prompt_length, sampling)
    assert made == plainly(model, prompt, CONTEXT - prompt_length, sampling)
    assert len(set(made)) > 2


class TestBatches:
    @pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
    def test_each_prompt_is_continued_as_if_alone(self, model, sampling):
        rows = rows_of(list(generate_tokens(model, PROMPTS, 15, sampling)))
        assert rows == [alone(model, prompt, 15, sampling) for prompt in PROMPTS]
        assert len({tuple(row) for row in rows}) == len(rows)

    def test_each_sample_of_each_prompt_is_as_if_alone(self, model):
        rows = rows_of(list(generate_tokens(model, PROMPTS, 8, SAMPLED, n=3)))
        assert rows == [plainly(model, prompt, 8, SAMPLED, sample) for prompt in PROMPTS for sample in range(3)]
        assert len({tuple(row) for row in rows}) == len(rows)

    def test_a_sample_does_not_depend_on_how_many_there_are(self, model):
        few, many = (rows_of(list(generate_tokens(model, [[5, 6]], 10, SAMPLED, n=n))) for n in (2, 6))
        assert few == many[:2]
        assert len({tuple(row) for row in many}) == 6

    def test_rows_that_end_give_none_and_disturb_no_other(self, model):
        free = rows_of(list(generate_tokens(model, PROMPTS, 15, SAMPLED)))
        stop = {free[0][3], free[2][7]}
        rows = rows_of(list(generate_tokens(model, PROMPTS, 15, SAMPLED, frozenset(stop))))
        ends = [next((i for i, token in enumerate(row) if token in stop), 15) for row in free]
        assert len({*ends}) > 1
        expected = [row[:end] + [None] * (15 - end) for row, end in zip(free, ends, strict=True)]
        assert rows == [row[: max(ends)] for row in expected]

    def test_it_is_over_when_all_rows_have_ended(self, model):
        first = {row[0] for row in rows_of(list(generate_tokens(model, PROMPTS, 1, GREEDY)))}
        assert list(generate_tokens(model, PROMPTS, 15, GREEDY, frozenset(first))) == []

    def test_the_first_token_can_be_confined_prompt_by_prompt(self, model):
        rows = rows_of(list(generate_tokens(model, PROMPTS[:3], 5, SAMPLED, n=4, first=[[7], [], [8, 9]])))
        assert {row[0] for row in rows[:4]} == {7}
        assert {row[0] for row in rows[8:]} <= {8, 9}
        expected = [(prompt, allowed, sample) for prompt, allowed in zip(PROMPTS, ([7], [], [8, 9]), strict=False) for sample in range(4)]
        assert rows == [plainly(model, prompt, 5, SAMPLED, sample, first=allowed) for prompt, allowed, sample in expected]


class TestRandomness:
    def test_the_seed_decides(self):
        model = random_model("llama", context_length=CONTEXT)

        def draw(seed: int | None) -> list[int]:
            return alone(model, [1, 2], 20, Sampling(temperature=2.0, seed=seed))

        torch.manual_seed(1)
        first = draw(3)
        torch.manual_seed(2)
        assert draw(3) == first
        assert draw(4) != first
        assert draw(None) != draw(None)

    def test_more_tokens_begin_like_fewer(self):
        model = random_model("llama", context_length=CONTEXT)
        assert alone(model, [1], 20, SAMPLED)[:5] == alone(model, [1], 5, SAMPLED)


class TestLimits:
    @pytest.mark.parametrize("max_tokens", [0, 1, 5])
    def test_max_tokens(self, model, max_tokens):
        assert len(alone(model, [1, 2], max_tokens, SAMPLED)) == max_tokens

    @pytest.mark.parametrize("prompt_length", [1, 10, CONTEXT - 1])
    def test_the_context_can_be_filled_to_its_last_token(self, model, prompt_length):
        assert len(alone(model, [3] * prompt_length, CONTEXT - prompt_length, SAMPLED)) == CONTEXT - prompt_length

    @pytest.mark.parametrize(
        ("lengths", "max_tokens", "says"),
        [
            (
                [20],
                5,
                r"^prompt: its 20 tokens and max_tokens=5 exceed the model's context of 24; set max_tokens to at most 4, or overflow=",
            ),
            ([3, 23], 2, r"^prompt 2: its 23 tokens and max_tokens=2 exceed .* set max_tokens to at most 1, or overflow="),
            ([24], 1, r"^prompt: its 24 tokens .* shorten it, or overflow=slide"),
            ([1000], 5, r"^prompt: its 1000 tokens .* shorten it, or overflow=slide"),
            ([0], 5, r"^prompt: no tokens"),
            ([2, 0], 5, r"^prompt 2: no tokens"),
        ],
    )
    def test_what_does_not_fit_is_refused_before_anything_is_read(self, lengths, max_tokens, says):
        model = random_model("gpt2", context_length=CONTEXT)
        model.embeddings.register_forward_hook(lambda *_: pytest.fail("it was read"))
        with pytest.raises(UserError, match=says) as error:
            generate_tokens(model, [[3] * length for length in lengths], max_tokens)
        assert "\n" not in str(error.value)

    def test_each_token_costs_one_pass_and_comes_at_once(self, model):
        lengths: list[tuple[int, ...]] = []
        hook = model.embeddings.register_forward_hook(lambda module, inputs, output: lengths.append(tuple(inputs[0].shape)))
        try:
            tokens = generate_tokens(model, [[1, 2, 3]], 10, SAMPLED, n=2)
            next(tokens)
            assert lengths == [(1, 3)]  # a prompt is read once for all its samples
            next(tokens)
            assert lengths == [(1, 3), (2, 1)]
            assert len(list(tokens)) == 8
            assert len(lengths) == 10  # the last token is not read
        finally:
            hook.remove()

    def test_no_gradient_is_kept_and_the_mode_outside_stays(self, model):
        kept: list[bool] = []
        hook = model.embeddings.register_forward_hook(lambda module, inputs, output: kept.append(output.requires_grad))
        try:
            tokens = generate_tokens(model, [[1]], 3, SAMPLED)
            for _ in range(3):
                next(tokens)
                assert torch.is_grad_enabled()
            assert kept == [False] * 3
            assert model(torch.tensor([[1]])).requires_grad
        finally:
            hook.remove()


class TestSliding:
    @pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
    @pytest.mark.parametrize("prompt_length", [1, 10, CONTEXT - 1, CONTEXT, CONTEXT + 1, 60])
    def test_it_goes_on_for_several_contexts(self, model, prompt_length, sampling):
        prompt = prompt_of(prompt_length)
        made = alone(model, prompt, 4 * CONTEXT, sampling, overflow="slide")
        assert made == plainly(model, prompt, 4 * CONTEXT, sampling, slide=True)

    @pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
    def test_each_row_of_a_batch_slides_as_if_alone(self, model, sampling):
        prompts = [prompt_of(length, start) for start, length in enumerate((2, 20, CONTEXT, 50))]
        rows = rows_of(list(generate_tokens(model, prompts, 3 * CONTEXT, sampling, overflow="slide", n=2)))
        assert rows == [plainly(model, prompt, 3 * CONTEXT, sampling, sample, slide=True) for prompt in prompts for sample in range(2)]

    def test_what_fits_is_the_same_either_way(self, model):
        assert alone(model, [1, 2], CONTEXT - 2, SAMPLED, overflow="slide") == alone(model, [1, 2], CONTEXT - 2, SAMPLED)

    @pytest.mark.parametrize("context_length", [1, 2, 3])
    def test_the_smallest_contexts(self, context_length):
        model = random_model("llama", context_length=context_length)
        made = alone(model, [1, 2, 3, 4], 20, overflow="slide")
        assert len(made) == 20
        if context_length > 1:
            assert made == plainly(model, [1, 2, 3, 4], 20, GREEDY, slide=True)

    def test_a_window_is_read_in_one_pass_and_only_when_it_is_full(self):
        model = random_model("llama", context_length=CONTEXT)
        lengths: list[int] = []
        model.embeddings.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
        alone(model, [1, 2, 3], 40, overflow="slide")
        half = CONTEXT // 2
        assert [length for length in lengths if length > 1] == [3, *[half] * math.ceil((40 - (CONTEXT - 3 + 1)) / (half + 1))]


class TestSpeed:
    def test_it_counts_what_was_read_and_written(self):
        model = random_model("llama", context_length=CONTEXT)
        speed = Speed()
        list(generate_tokens(model, [[1, 2, 3], [4]], 5, SAMPLED, n=2, speed=speed))
        assert (speed.prompt_tokens, speed.tokens) == (4, 16)
        assert 0 < speed.prompt_seconds < 60
        assert 0 < speed.seconds < 60
        text = Speed(prompt_tokens=30, prompt_seconds=0.5, tokens=100, seconds=4.0).described()
        assert text == "prompt: 30 tokens in 0.50 s (60 tokens/s); then 100 tokens in 4.00 s (25.0 tokens/s)"

    def test_nothing_written(self):
        assert Speed(prompt_tokens=1).described() == "prompt: 1 tokens in 0.00 s; then 0 tokens in 0.00 s"
