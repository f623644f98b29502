"""Rows of preference: two examples of each, of which both are there or neither, and which stay side by side in every batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt.data.config import DataConfig, FieldNames, TokenizerConfig
from gpt.data.encoded import IGNORE_LABEL, Encoded
from gpt.data.examples import ExampleEncoder, ExampleSettings, recognise_format
from gpt.data.loader import ExampleRows, RowBatches, build_batches, held_out_batches
from gpt.data.mixture import Mixture
from gpt.data.prepare import prepare_corpus
from gpt.data.shards import Split, TokenArray
from gpt.data.sources import Row
from gpt.data.tokenizer_training import byte_tokenizer
from gpt.errors import UserError
from gpt.inspection.figures import corpus_figures
from tests.training.finetuning import write_rows

PROMPT, CHOSEN, REJECTED = "2 plus 2 is ", "4.", "five"
CHAT = [{"role": "user", "content": "hello"}]


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save(made / "tokenizer.json")
    return made


def encode(folder: Path, values: dict[str, Any], **settings: Any) -> list[Encoded]:
    settings = {"context_length": 64} | settings
    row = Row("rows.jsonl:1", "/x/rows.jsonl, line 1", values)
    return ExampleEncoder(str(folder), ExampleSettings(**settings), "preference", [])([row])


def learned(example: Encoded) -> str:
    assert example.labels is not None
    return byte_tokenizer().decode(example.labels[example.labels != IGNORE_LABEL].tolist())


def text(example: Encoded) -> str:
    return byte_tokenizer().decode(example.ids.tolist())


def test_each_completion_is_learned_after_the_prompt_and_ends(folder):
    pair = encode(folder, {"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED})
    end = byte_tokenizer().decode([byte_tokenizer().end_of_text])
    assert [text(example) for example in pair] == [PROMPT + CHOSEN + end, PROMPT + REJECTED + end]
    assert [learned(example) for example in pair] == [CHOSEN + end, REJECTED + end]
    assert [example.held_out_key for example in pair] == ["rows.jsonl:1"] * 2


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": CHAT, "chosen": say("hi"), "rejected": say("go away")},
        {"chosen": [*CHAT, *say("hi")], "rejected": [*CHAT, *say("go away")]},
        {"prompt": "hello", "chosen": [*CHAT, *say("hi")], "rejected": [*CHAT, *say("go away")]},
    ],
)
def test_of_conversations_what_both_begin_with_is_the_prompt(folder, values):
    pair = encode(folder, values)
    assert ["hi" in learned(pair[0]), "go away" in learned(pair[1])] == [True, True]
    assert not any("hello" in learned(example) for example in pair)
    prompts = [text(example).removesuffix(learned(example)) for example in pair]
    assert prompts[0] == prompts[1]
    assert "hello" in prompts[0]


def test_of_texts_without_a_prompt_it_is_what_both_begin_with_up_to_a_blank(folder):
    pair = encode(folder, {"chosen": "H: hello A: hi", "rejected": "H: hello A: go away"})
    assert [learned(example).removesuffix("<|endoftext|>") for example in pair] == [" hi", " go away"]


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({"prompt": PROMPT, "chosen": CHOSEN, "rejected": CHOSEN}, "dropped_no_difference"),
        ({"prompt": PROMPT, "chosen": "", "rejected": " "}, "dropped_no_target"),
        ({"chosen": [*CHAT, *say("hi")], "rejected": [*CHAT, *say("hi")]}, "dropped_no_difference"),
        ({"prompt": CHAT, "chosen": say("hi"), "rejected": say(" ")}, "dropped_no_target"),
        ({"prompt": "x" * 62, "chosen": "a" * 90 + "b", "rejected": "a" * 90 + "c"}, "dropped_no_difference"),  # where they are cut
    ],
)
def test_a_pair_that_teaches_nothing_is_left_out_whole_and_counted(folder, values, count):
    (dropped,) = encode(folder, values)
    assert dropped.counts == {count: 1}
    assert not len(dropped.ids)


def test_of_a_pair_that_is_too_long_both_lose_the_same_of_their_prompt(folder):
    values = {"prompt": "".join(chr(97 + i % 26) for i in range(60)), "chosen": "X" * 20, "rejected": "Y" * 5}
    pair = encode(folder, values)
    assert [learned(example).removesuffix("<|endoftext|>") for example in pair] == ["X" * 20, "Y" * 5]
    cut = 60 + 20 + 1 - 64
    assert all(text(example).startswith(values["prompt"][cut:]) for example in pair)
    assert [example.counts for example in pair] == [{"truncated": 1}, {}]
    (dropped,) = encode(folder, values, too_long="drop")
    assert dropped.counts == {"dropped_too_long": 1}


def test_of_completions_longer_than_a_row_a_quarter_is_left_to_the_prompt(folder):
    pair = encode(folder, {"prompt": "p" * 100, "chosen": "X" * 100, "rejected": "Y" * 5})
    assert text(pair[0]) == "p" * 16 + "X" * 48
    assert text(pair[1]).startswith("p" * 16 + "Y" * 5)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"prompt": PROMPT, "chosen": CHOSEN}, r"rows of preference need chosen and rejected, and this one has prompt, chosen; .*"),
        ({"prompt": 3, "chosen": CHOSEN, "rejected": REJECTED}, r"prompt must be text .*, not 3"),
        ({"prompt": PROMPT, "chosen": say("hi"), "rejected": "x"}, r"chosen must be text \(or a list of messages, as its counterpart .*"),
        ({"chosen": say("hi"), "rejected": say("no")}, r"chosen and rejected begin with different messages; they must answer the same .*"),
    ],
)
def test_a_row_that_is_none_is_named_by_its_place(folder, values, said):
    with pytest.raises(UserError, match=f"^/x/rows.jsonl, line 1: {said}$"):
        encode(folder, values)


def test_the_format_is_recognised_and_its_fields_can_have_other_names(folder):
    row = Row("a", "a", {"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED})
    assert recognise_format([row], "auto") == "preference"
    assert FieldNames(chosen="yes").chosen == "yes"


def test_settings_of_other_formats_are_refused(folder):
    for name, value in (("loss_on", "completion"), ("too_long", "split")):
        with pytest.raises(UserError, match=f"{name}={value} is .*for rows of"):
            encode(folder, {"chosen": "a", "rejected": "b"}, **{name: value})


def pairs_of(lengths: list[tuple[int, int]], context_length: int = 16, packed: bool = True, seed: int = 0) -> ExampleRows:
    """Pairs whose tokens say which pair they are of, 10 and on: even numbers the chosen ones, odd the rejected."""
    flat = [length for pair in lengths for length in pair]
    ids = np.repeat(np.arange(10, 10 + len(flat)), flat).astype(np.uint32)
    labels = ids.astype(np.int32)
    borders = np.cumsum([0, *flat]).astype(np.uint64)
    split = Split(TokenArray([ids]), borders, TokenArray([labels]))
    return ExampleRows(split, context_length, (seed,), packed=packed, paired=True)


def documents_of(batch, row: int) -> list[int]:
    """The example in each document of a row, by its tokens."""
    tokens, documents = batch.tokens[row].numpy(), batch.documents[row].numpy()
    there = tokens >= 10
    found = []
    for number in range(documents[there].max() + 1):
        (example,) = set(tokens[there & (documents == number)].tolist())
        found.append(example - 10)
    return found


LENGTHS = [(2 + i % 7, 2 + (3 * i) % 11) for i in range(40)]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_pairs_stay_side_by_side_in_every_order_and_on_every_rank(packed, world):
    rows = pairs_of(LENGTHS, packed=packed, seed=7)
    assert rows.windows % 2 == 0
    assert (rows.windows < 2 * len(LENGTHS)) == packed
    batches, seen = RowBatches(rows, 12), []
    for step in range(-(-rows.windows // 12)):
        for rank in range(world):
            batch = batches.batch(step, rank, world)
            for first in range(0, 12 // world, 2):
                chosen, rejected = documents_of(batch, first), documents_of(batch, first + 1)
                assert [example + 1 for example in chosen] == rejected
                assert all(example % 2 == 0 for example in chosen)
                assert batch.numbers[first] + 1 == batch.numbers[first + 1]
                seen += chosen
    assert set(seen[: len(LENGTHS)]) <= {2 * i for i in range(len(LENGTHS))}
    assert {2 * i for i in range(len(LENGTHS))} <= set(seen)  # an epoch has all


def test_an_order_of_one_epoch_is_not_that_of_the_next():
    rows = pairs_of(LENGTHS)
    first, second = (rows.rows(np.arange(rows.windows) + epoch * rows.windows).numbers for epoch in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist())
    assert first.tolist() != second.tolist()


def test_a_mixture_keeps_them_together():
    parts = [pairs_of(LENGTHS, seed=1), pairs_of(LENGTHS[:9], seed=2)]
    batches = RowBatches(Mixture(parts, [1.0, 2.0], 5, together=2), 8)
    for step in range(12):
        batch = batches.batch(step)
        for first in range(0, 8, 2):
            assert [example + 1 for example in documents_of(batch, first)] == documents_of(batch, first + 1)


@pytest.mark.parametrize("limit", [None, 4 * 64])
def test_what_is_held_out_is_whole_pairs(folder, tmp_path, limit):
    rows = [{"prompt": f"{i}: ", "chosen": "a" * (i % 9), "rejected": "b" * (i % 30)} for i in range(1, 200)]
    data = DataConfig("jsonl", [str(write_rows(tmp_path / "rows.jsonl", rows))], holdout=0.5, cache_dir=str(tmp_path / "cache"))
    corpus = prepare_corpus(data, TokenizerConfig("byte"), 64, lambda _: None, ExampleSettings(context_length=64))
    assert corpus.kind == "preference"
    packing = corpus_figures(corpus, 64, packed=True).packing
    assert packing is not None
    assert packing.rows == build_batches(corpus, data, 64, 2, 0).windows
    count = 0
    for batch in held_out_batches(corpus, data, 64, 6, limit):
        assert len(batch.tokens) == 6
        real = int((batch.numbers >= 0).sum())
        assert real % 2 == 0
        for first in range(0, real, 2):
            assert batch.numbers[first] % 2 == 0
            assert batch.numbers[first] + 1 == batch.numbers[first + 1]
        count += real
    assert count == 4 if limit else count > 4
    with pytest.raises(UserError, match="a batch of 3 rows is no whole pairs"):
        build_batches(corpus, data, 64, 3, 0)
