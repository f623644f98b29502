import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpora import same

from gpt.data.batches import join
from gpt.data.config import SourceConfig, TokenizerConfig
from gpt.data.encoded import Encoded
from gpt.data.encoding import TextEncoder
from gpt.data.mixture import BLOCK, Shares
from gpt.data.sources import ReadReport, Row, open_source
from gpt.data.streaming import StreamedSource, StreamingBatches, collect_held_out
from gpt.data.survey import HoldOut
from gpt.data.tokenizer_training import make_tokenizer
from gpt.errors import UserError

T = 5
SHARE = 0.2


def is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.md5(name.encode()).digest()[:8], "big") / 2**64 < SHARE


class ListStream:
    """Rows of a list, whose state is the number of rows given."""

    def __init__(self, rows: Sequence[Row], state: dict[str, Any] | None) -> None:
        self.rows, self.given = rows, state["given"] if state else 0

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        if self.given == len(self.rows):
            raise StopIteration
        self.given += 1
        return self.rows[self.given - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}


def encode(rows: Sequence[Row]) -> list[Encoded]:
    """A text is its own ids; a later piece goes on with the text before."""
    return [
        Encoded(row.name, row.name, np.array(row.values["text"].split(), dtype=np.uint32), None, 0, continues=row.piece > 0) for row in rows
    ]


def rows_of(lengths: Sequence[int], first: int = 0, held_out: bool = True) -> list[Row]:
    """Documents whose ids count on from one training document to the next; those held out have ids over a million."""
    rows, position = [], first
    for number, length in enumerate(lengths):
        name = f"document {number}"
        start = 1_000_000 + 1000 * number
        if not (is_held_out(name) and held_out):
            start, position = position, position + length
        rows.append(Row(name, name, {"text": " ".join(map(str, range(start, start + length)))}))
    return rows


def source(rows: Sequence[Row], name: str = "list", weight: float = 1.0, held_out: bool = True) -> StreamedSource:
    return StreamedSource(name, lambda state: ListStream(rows, state), encode, is_held_out if held_out else lambda key: False, weight)


LENGTHS = np.random.default_rng(1).integers(1, 40, 400).tolist()
SOURCE = source(rows_of(LENGTHS))
TRAINING = sum(length for number, length in enumerate(LENGTHS) if not is_held_out(f"document {number}"))


def test_windows_are_those_of_the_documents_one_after_another():
    batches = StreamingBatches([SOURCE], T, 64, seed=1)
    found = torch.cat([batches.batch(step).tokens for step in range(3 * BLOCK // 64)])
    assert TRAINING * 2 < len(found) * T < TRAINING * 3  # the text was read more than twice
    for block in range(3):
        expected = (np.arange(block * BLOCK, (block + 1) * BLOCK)[:, None] * T + np.arange(T)) % TRAINING
        windows = found[block * BLOCK : (block + 1) * BLOCK].tolist()
        assert sorted(windows) == sorted(expected.tolist())
        assert windows != expected.tolist()  # but shuffled
    assert batches.epoch == 2


def test_targets_are_one_place_ahead():
    batch = StreamingBatches([SOURCE], T, 64, seed=1).batch(0)
    assert batch.tokens.shape == (64, T)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert torch.equal(batch.targets, (batch.tokens + 1) % TRAINING)
    assert batch.documents is None


@pytest.mark.parametrize("tokens", [BLOCK * T // 8 - 1, BLOCK * T // 8, 999, BLOCK * T, BLOCK * T + 1])
def test_epochs_are_counted(tokens):
    text = source(rows_of([7] * (tokens // 7) + [tokens % 7], held_out=False), held_out=False)
    batches = StreamingBatches([text], T, 64, seed=1)
    for block in range(1, 4):
        for step in range((block - 1) * BLOCK // 64, block * BLOCK // 64):
            batches.batch(step)
        assert batches.epoch == block * BLOCK * T // tokens  # of the block that comes next, whose beginning is known
        other = StreamingBatches([text], T, 64, seed=1)
        other.load_state_dict(batches.state_dict())
        batches = other


def test_seeds_differ():
    one, same_seed, other = (StreamingBatches([SOURCE], T, 64, seed=s).batch(0) for s in (1, 1, 2))
    assert same(one, same_seed)
    assert not same(one, other)


def test_documents_are_numbered():
    batches = StreamingBatches([SOURCE], T, 64, seed=1, document_mask=True)
    lengths = [length for number, length in enumerate(LENGTHS) if not is_held_out(f"document {number}")]
    of = np.repeat(np.arange(len(lengths)), lengths)
    for step in range(4):
        batch = batches.batch(step)
        expected = of[batch.tokens.numpy()]
        assert batch.documents is not None
        assert batch.documents.dtype == torch.int64
        assert np.array_equal(batch.documents.numpy(), expected - expected[:, :1])


def test_pieces_of_a_document_are_one():
    rows = [Row("a", "a", {"text": "1 2 3"}), Row("a", "a", {"text": "4 5"}, piece=1), Row("b", "b", {"text": "6 7 8 9"})]
    batch = StreamingBatches([source(rows, held_out=False)], 8, 1, seed=1, document_mask=True).batch(0)
    assert batch.documents is not None
    numbers = dict(zip(batch.tokens[0].tolist(), batch.documents[0].tolist(), strict=True))
    assert numbers[1] == numbers[2] == numbers[3] == numbers[4] == numbers[5] != numbers[6] == numbers[7]


MIXED = [SOURCE, source(rows_of([30] * 20, first=10_000), weight=3), source(rows_of([3] * 200, first=20_000), weight=0.5)]


@given(data=st.data())
@settings(max_examples=25)
def test_a_stream_goes_on_exactly_where_it_stood(data):
    sources = data.draw(st.sampled_from([[SOURCE], MIXED]))
    sequences = data.draw(st.sampled_from([1, 12, 96]))
    steps = data.draw(st.integers(0, 3 * BLOCK // sequences))
    one = StreamingBatches(sources, T, sequences, seed=3, document_mask=True)
    for step in range(steps):
        one.batch(step)
    state = json.dumps(one.state_dict())
    assert len(state) < 1000
    other = StreamingBatches(sources, T, sequences, seed=3, document_mask=True)
    other.load_state_dict(json.loads(state))
    assert json.dumps(other.state_dict()) == state
    for step in range(steps, steps + data.draw(st.integers(1, 2 * BLOCK // sequences))):
        assert same(one.batch(step), other.batch(step))
    assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(world):
    whole = StreamingBatches(MIXED, T, 12, seed=3, document_mask=True)
    ranks = [StreamingBatches(MIXED, T, 12, seed=3, document_mask=True) for _ in range(world)]
    for step in range(100):
        assert same(join([batches.batch(step, rank, world) for rank, batches in enumerate(ranks)]), whole.batch(step))
    state = whole.state_dict()
    assert all(batches.state_dict() == state for batches in ranks)
    alone = StreamingBatches(MIXED, T, 12, seed=3, document_mask=True)
    alone.load_state_dict(ranks[1].state_dict())  # goes on with another number of ranks
    assert same(alone.batch(100), whole.batch(100))
    with pytest.raises(ValueError, match="5 ranks cannot share the 12"):
        alone.batch(101, 0, 5)


def test_steps_only_rise():
    batches = StreamingBatches([SOURCE], T, 8, seed=1)
    third = [batches.batch(step) for step in range(4)][3]
    for step in (3, 0):
        with pytest.raises(ValueError, match=f"step {step} is past: this stream goes on at 4; load the state"):
            batches.batch(step)
    ahead = StreamingBatches([SOURCE], T, 8, seed=1)
    assert same(ahead.batch(3), third)
    with pytest.raises(ValueError, match="the state is of 1 sources, and there are 3"):
        StreamingBatches(MIXED, T, 8, seed=1).load_state_dict(batches.state_dict())


def test_sources_are_mixed_by_their_weights():
    batches = StreamingBatches(MIXED, T, 64, seed=1)
    first = torch.cat([batches.batch(step).tokens[:, 0] for step in range(BLOCK // 64)]).numpy()
    counts = [int(((low <= first) & (first < low + 10_000)).sum()) for low in (0, 10_000, 20_000)]
    assert counts == Shares([1, 3, 0.5], 1).counts.tolist()


@pytest.mark.parametrize("lengths", [[], [0, 0], [T * 8]])
def test_too_little_text(lengths):
    rows = rows_of(lengths, held_out=False)
    tokens = sum(lengths)
    with pytest.raises(UserError, match=f"^data: the training text of list has {tokens} tokens, fewer than the 41 that one batch"):
        StreamingBatches([source(rows, held_out=False)], T, 8, seed=1).batch(0)


def test_a_text_of_one_batch_is_enough():
    batches = StreamingBatches([source(rows_of([T * 8 + 1], held_out=False), held_out=False)], T, 8, seed=1)
    assert batches.batch(0).tokens.max() <= 40


def test_what_reading_raises_comes_through():
    def broken(state: dict[str, Any] | None) -> ListStream:
        raise UserError("rows.jsonl, line 3: no")

    with pytest.raises(UserError, match="line 3"):
        StreamingBatches([StreamedSource("x", broken, encode, is_held_out)], T, 8, seed=1).batch(0)


class TestHeldOut:
    def test_never_trained_on(self):
        batches = StreamingBatches([SOURCE], T, 64, seed=1)
        assert max(int(batches.batch(step).targets.max()) for step in range(100)) < 1_000_000

    def test_the_first_documents_up_to_a_limit(self):
        held_out = [row for row in rows_of(LENGTHS) if is_held_out(row.name)]
        ids = np.concatenate([document.ids for document in encode(held_out)])
        for limit in (1, 50, 300):
            split = collect_held_out(SOURCE, limit)
            assert np.array_equal(split.tokens.shards[0], ids[: limit + 1])
            assert len(split.tokens) == limit + 1  # as many targets
            lengths = np.diff(split.documents.astype(np.int64))
            assert lengths.min() > 0
            assert lengths[:-1].tolist() == [len(document.ids) for document in encode(held_out)][: len(lengths) - 1]
            assert split.labels is None
        assert len(collect_held_out(SOURCE, 10**9).tokens) == len(ids)

    def test_what_the_encoder_says_comes_before_the_rule(self):
        def ends(rows: Sequence[Row]) -> list[Encoded]:
            """The end of every text is held out."""
            return [
                Encoded(d.name, d.held_out_key, d.ids[part], None, 0, held_out=held_out)
                for d in encode(rows) for part, held_out in ((slice(-1), False), (slice(-1, None), True))
            ]  # fmt: skip

        rows = rows_of([4] * 10, held_out=False)
        cut = StreamedSource("x", lambda state: ListStream(rows, state), ends, is_held_out)
        assert collect_held_out(cut, 100).tokens.shards[0].tolist() == list(range(3, 40, 4))
        trained = StreamingBatches([cut], T, 4, seed=1).batch(0).tokens
        assert not (trained % 4 == 3).any()

    def test_none(self):
        with pytest.raises(UserError, match=r"^data\.holdout: none of the 3 documents of list is held out; set a larger share"):
            collect_held_out(source(rows_of([3, 3, 3], held_out=False), held_out=False), 100)


def test_files_cut_into_ids_as_they_are_read(corpus, tmp_path):
    """With the real reader and encoder: the windows of a pass hold the ids of every training file, each behind its end-of-text token."""
    tokenizer = make_tokenizer(TokenizerConfig(name="byte"), [])
    tokenizer.save(tmp_path / "tokenizer.json")
    files = open_source(SourceConfig(source="text", paths=[str(corpus)]), "auto")
    hold_out = HoldOut(SHARE, within=False, border=SHARE)
    encoder = TextEncoder(str(tmp_path), "", hold_out)
    text = StreamedSource(files.name, lambda state: files.rows(ReadReport(), state), encoder, hold_out)
    expected = {True: [], False: []}
    for row in files.rows(ReadReport()):
        expected[is_held_out(row.name)].append([tokenizer.end_of_text, *tokenizer.encode(row.values["text"])])
    held_out = collect_held_out(text, 10**9)
    assert 0 < len(expected[True]) < len(expected[False])
    assert held_out.tokens.shards[0].tolist() == [i for ids in expected[True] for i in ids]
    assert len(held_out.documents) == len(expected[True]) + 1
    ids = [i for document in expected[False] for i in document]
    length = len(ids) // BLOCK + 1  # so that the first block of windows holds the whole text and a little more
    one = StreamingBatches([text], length, 64, seed=1, document_mask=True)
    windows = []
    for step in range(BLOCK // 64):
        if step == 5:  # resumed
            other = StreamingBatches([text], length, 64, seed=1, document_mask=True)
            other.load_state_dict(json.loads(json.dumps(one.state_dict())))
            one = other
        windows += one.batch(step).tokens.tolist()
    again = [(ids + ids)[start : start + length] for start in range(0, length * BLOCK, length)]
    assert sorted(windows) == sorted(again)
