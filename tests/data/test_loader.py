import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from small_corpora import corpus, examples, in_shards, same, settings, text

from gpt.data.batches import join
from gpt.data.encoded import IGNORE_LABEL
from gpt.data.loader import ExampleRows, RowBatches, TextWindows, build_batches, held_out_batches, held_out_windows, take, take_windows
from gpt.data.packing import best_fit
from gpt.data.shards import Split, TokenArray
from gpt.errors import UserError


def batches_of(count: int, context_length: int, sequences: int, seed: int) -> RowBatches:
    return build_batches(corpus(text(count)), settings(), context_length, sequences, seed)


def starts(batches: RowBatches, step: int) -> list[int]:
    return batches.batch(step).tokens[:, 0].tolist()  # ids are places


def epoch(batches: RowBatches, number: int) -> list[int]:
    """Where the windows of an epoch start, in their order."""
    last = (number + 1) * batches.windows
    found = [start for step in range(-(-last // batches.sequences)) for start in starts(batches, step)]
    return found[number * batches.windows : last]


@given(st.data())
def test_ids_are_taken_across_shards(data):
    values = np.random.default_rng(0).integers(0, 60_000, data.draw(st.integers(1, 60))).astype(np.uint16)
    array = in_shards(values, data.draw(st.integers(1, 5)))
    places = np.array(data.draw(st.lists(st.integers(0, len(values) - 1), max_size=12)), dtype=np.int64)
    found = take(array, places.reshape(-1, 1))
    assert found.dtype == np.int64
    assert np.array_equal(found, values[places].reshape(-1, 1))
    length = data.draw(st.integers(1, len(values)))
    starts = np.array(data.draw(st.lists(st.integers(0, len(values) - length), max_size=6)), dtype=np.int64)
    windows = take_windows(array, starts, length)
    assert windows.dtype == np.int64
    assert windows.tolist() == [values[start : start + length].tolist() for start in starts]


class TestText:
    def test_targets_are_one_place_ahead(self):
        batch = batches_of(100, 8, 3, seed=1).batch(2)
        assert batch.tokens.shape == batch.targets.shape == (3, 8)
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert torch.equal(batch.targets, batch.tokens + 1)
        assert batch.documents is None

    @given(
        count=st.integers(2, 400), context_length=st.integers(1, 60), sequences=st.integers(1, 12),
        seed=st.integers(0, 2**32 - 1), step=st.integers(0, 10**7),
    )  # fmt: skip
    def test_the_order_is_the_one_that_runs_have_always_had(self, count, context_length, sequences, seed, step):
        """Written out once more, for golden losses and the runs of earlier versions rest on it."""
        context_length = min(context_length, count - 1)
        windows = max(1, (count - 1) // context_length - 1)
        slack = count - 1 - windows * context_length
        expected = []
        for sample in range(step * sequences, (step + 1) * sequences):
            generator = np.random.default_rng((seed, sample // windows))
            offset = generator.integers(min(slack, context_length - 1) + 1)
            expected.append((generator.permutation(windows) * context_length + offset)[sample % windows])
        assert starts(batches_of(count, context_length, sequences, seed), step) == expected

    @given(
        count=st.integers(9, 400), context_length=st.integers(1, 8), sequences=st.integers(1, 12),
        seed=st.integers(0, 2**32 - 1), number=st.integers(0, 3),
    )  # fmt: skip
    def test_an_epoch_has_every_window_once(self, count, context_length, sequences, seed, number):
        batches = batches_of(count, context_length, sequences, seed)
        found = epoch(batches, number)
        offset = min(found)
        assert sorted(found) == [offset + i * context_length for i in range(batches.windows)]
        assert offset >= 0
        assert max(found) + context_length + 1 <= count
        assert count - 1 - batches.tokens_per_epoch < 2 * context_length  # little is left out
        assert batches.tokens_per_epoch == len(found) * context_length

    @given(
        count=st.integers(2, 300), context_length=st.integers(1, 299), sequences=st.integers(1, 40),
        step=st.integers(0, 10**9), seed=st.integers(0, 2**32 - 1),
    )  # fmt: skip
    def test_nothing_is_ever_out_of_range(self, count, context_length, sequences, step, seed):
        context_length = min(context_length, count - 1)
        batch = batches_of(count, context_length, sequences, seed).batch(step)
        assert batch.tokens.shape == (sequences, context_length)
        assert torch.equal(batch.targets, batch.tokens + 1)
        assert batch.tokens.min() >= 0
        assert batch.targets.max() < count

    def test_a_batch_may_run_across_epochs(self):
        batches = batches_of(8 * 11 + 1, 8, 4, seed=3)
        assert batches.windows == 10
        assert starts(batches, 2) == epoch(batches, 0)[8:] + epoch(batches, 1)[:2]  # samples 8 to 11

    def test_seeds_and_epochs_differ_in_order_and_in_where_windows_begin(self):
        batches = batches_of(8 * 101, 8, 4, seed=3)
        epochs = [epoch(batches, number) for number in range(8)]
        assert len({tuple(e) for e in epochs}) == 8
        assert len({min(e) for e in epochs}) > 2  # the offset of the grid
        assert epochs[0] != sorted(epochs[0])
        assert epoch(batches_of(8 * 101, 8, 4, seed=4), 0) != epochs[0]
        assert epoch(batches_of(8 * 101, 8, 1, seed=3), 0) == epochs[0]  # whatever the size of the batch

    def test_a_corpus_of_one_window(self):
        batches = batches_of(9, 8, 3, seed=0)
        for step in (0, 1, 7):
            batch = batches.batch(step)
            assert batch.tokens.tolist() == [list(range(8))] * 3
            assert batch.targets.tolist() == [list(range(1, 9))] * 3

    @given(cuts=st.sets(st.integers(1, 119), max_size=30), seed=st.integers(0, 99), shards=st.integers(1, 3))
    def test_documents_are_numbered_from_their_borders(self, cuts, seed, shards):
        borders = [0, *sorted(cuts)]
        batches = build_batches(corpus(text(120, borders, shards)), settings(document_mask=True), 16, 4, seed)
        plain = build_batches(corpus(text(120, borders, shards)), settings(), 16, 4, seed)
        for step in range(4):
            batch = batches.batch(step)
            assert torch.equal(batch.tokens, plain.batch(step).tokens)
            assert torch.equal(batch.targets, batch.tokens + 1)
            assert batch.documents is not None
            assert batch.documents.dtype == torch.int64
            for places, numbers in zip(batch.tokens.tolist(), batch.documents.tolist(), strict=True):
                of = [sum(border <= place for border in borders) for place in places]
                assert numbers == [number - of[0] for number in of]

    def test_too_little_text(self):
        with pytest.raises(UserError, match=r"^data: the training part of part 0 has 8 tokens, fewer than model\.context_length=8 and one"):
            batches_of(8, 8, 2, seed=0)
        with pytest.raises(UserError, match=r"^data: the held-out part has 5 tokens, fewer than"):
            held_out_batches(corpus(text(90), held_out=[text(5)]), settings(), 8, 2, None)


CORPORA = {
    "text": corpus(text(300, [0, 7, 9, 100, 220])),
    "examples": corpus(examples([3, 9, 16, 1, 1, 7, 5, 12, 2, 2, 8, 4, 4, 6])),
    "mixture": corpus(text(300, [0, 50]), text(90, [0, 3, 60], first=5000), weights=[1, 2.5]),
    "mixture of examples": corpus(examples([3, 9, 16, 1]), examples([5, 5, 5, 4]), weights=[3, 1]),
}


@pytest.mark.parametrize("name", CORPORA)
class TestPure:
    def build(self, name: str, seed: int = 5) -> RowBatches:
        return build_batches(CORPORA[name], settings(document_mask=True), 16, 12, seed)

    def test_a_batch_depends_on_seed_and_step_alone(self, name):
        forwards = [self.build(name).batch(step) for step in range(30)]
        one = self.build(name)
        for step in [29, 0, 17, 3, 17, 28, 1]:  # across epochs, back and forth
            assert same(forwards[step], one.batch(step))
        assert any(not same(forwards[step], self.build(name, 6).batch(step)) for step in range(3))

    @given(step=st.integers(0, 10**8), world=st.sampled_from([1, 2, 3, 4, 6, 12]), seed=st.integers(0, 2**32 - 1))
    @hypothesis_settings(max_examples=25)
    def test_the_global_batch_is_the_same_on_any_number_of_ranks(self, name, step, world, seed):
        whole = self.build(name, seed).batch(step)
        parts = [self.build(name, seed).batch(step, rank, world) for rank in reversed(range(world))]
        assert same(join(parts[::-1]), whole)

    def test_ranks_that_cannot_share_a_batch(self, name):
        with pytest.raises(ValueError, match="5 ranks cannot share the 12 sequences"):
            self.build(name).batch(0, 0, 5)


def test_every_token_of_a_text_can_be_told_its_class():
    lengths = [3, 9, 16, 1, 7]
    plain = examples(lengths)
    labels = np.full(sum(lengths), IGNORE_LABEL, np.int32)
    labels[np.cumsum(lengths) - 1] = range(5)
    made = corpus(Split(plain.tokens, plain.documents, TokenArray([labels])), kind="text_label")
    batches = build_batches(made, settings(), 16, 3, 1, everywhere=True)
    learned = batches.batch(0).targets
    assert [int((learned == number).sum()) for number in range(5)] == lengths
    assert torch.equal(learned >= 0, batches.batch(0).tokens > 0)
    assert batches.tokens_per_epoch == sum(lengths)
    usual = build_batches(made, settings(), 16, 3, 1).batch(0)
    (held_out,) = held_out_batches(made, settings(), 16, 3, None)
    for at_last in (usual.targets, held_out.targets):
        assert sorted(at_last[at_last >= 0].tolist()) == list(range(5))
    assert torch.equal(usual.tokens, batches.batch(0).tokens)


class TestExamples:
    LENGTHS = (3, 9, 16, 1, 1, 7, 5, 12, 2, 2, 8, 4, 4, 6)

    def read(self, batch, shifted: bool = True) -> list[list[int]]:
        """The examples of each row by their numbers, after a look at every place."""
        assert batch.documents is not None
        rows = []
        for tokens, targets, documents in zip(batch.tokens.tolist(), batch.targets.tolist(), batch.documents.tolist(), strict=True):
            found, place = [], 0
            while place < len(tokens) and tokens[place]:
                number = tokens[place] // 1000 - 1
                length = self.LENGTHS[number]
                ids = [1000 * (number + 1) + i for i in range(length)]
                labels = [IGNORE_LABEL, *ids[1:]]
                assert tokens[place : place + length] == ids
                assert targets[place : place + length] == ([*labels[1:], IGNORE_LABEL] if shifted else labels)
                assert set(documents[place : place + length]) == {len(found)}
                found.append(number)
                place += length
            assert set(tokens[place:]) <= {0}
            assert set(targets[place:]) <= {IGNORE_LABEL}
            assert set(documents[place:]) <= {len(found)}
            rows.append(found)
        return rows

    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize("kind", ["language_model", "text_label", "tokens_tags"])
    def test_every_example_is_there_once_an_epoch(self, kind, shards):
        split = examples(list(self.LENGTHS), shards)
        batches = build_batches(corpus(split, kind=kind), settings(), 16, 1, seed=2)
        packs = best_fit(np.array(self.LENGTHS), 16)
        assert batches.windows == len(packs) < len(self.LENGTHS)
        orders = []
        for number in range(2):
            steps = range(number * batches.windows, (number + 1) * batches.windows)
            rows = [row for step in steps for row in self.read(batches.batch(step), kind == "language_model")]
            assert sorted(map(sorted, rows)) == sorted(sorted(p.tolist()) for p in packs)
            orders.append(rows)
        assert orders[0] != orders[1]
        assert batches.tokens_per_epoch == sum(self.LENGTHS) - len(self.LENGTHS)

    def test_one_a_row(self):
        batches = build_batches(corpus(examples(list(self.LENGTHS))), settings(packing="none"), 16, 7, seed=2)
        assert batches.windows == len(self.LENGTHS)
        rows = self.read(batches.batch(0)) + self.read(batches.batch(1))
        assert sorted(rows) == [[number] for number in range(len(self.LENGTHS))]

    def test_targets_learned_are_counted(self):
        for shifted in (True, False):
            rows = ExampleRows(examples(list(self.LENGTHS), learned_from=0), 16, shifted=shifted)
            learned = (rows.make(np.arange(rows.windows)).targets != IGNORE_LABEL).sum().item()
            assert rows.tokens_per_epoch == learned == sum(self.LENGTHS) - shifted * len(self.LENGTHS)

    def test_fewer_packs_than_a_batch_has_rows(self):
        batches = build_batches(corpus(examples([9, 9, 9])), settings(), 16, 8, seed=0)
        assert batches.windows == 3
        numbers = (batches.batch(0).tokens[:, 0] // 1000).tolist()
        assert sorted(numbers[:3]) == sorted(numbers[3:6]) == [1, 2, 3]
        assert batches.batch(0).tokens.shape == (8, 16)

    def test_what_cannot_be(self):
        with pytest.raises(UserError, match=r"an example has 17 tokens, more than model\.context_length=16"):
            build_batches(corpus(examples([3, 17])), settings(), 16, 8, seed=0)
        with pytest.raises(UserError, match="the training part of part 0 has no examples"):
            build_batches(corpus(examples([])), settings(), 16, 8, seed=0)
        with pytest.raises(UserError, match="the held-out part has no examples"):
            held_out_batches(corpus(examples([3]), held_out=[examples([])]), settings(), 16, 8, None)


class TestHeldOut:
    @given(count=st.integers(2, 500), context_length=st.integers(1, 20), limit=st.one_of(st.none(), st.integers(1, 600)))
    def test_windows_follow_each_other_and_stay_within(self, count, context_length, limit):
        context_length = min(context_length, count - 1)
        starts = held_out_windows(in_shards(np.arange(count)), context_length, limit).tolist()
        most = (count - 1) // context_length
        assert len(starts) == most if limit is None else len(starts) == max(1, min(most, limit // context_length))
        assert len(set(starts)) == len(starts)
        assert starts == sorted(starts)
        assert all(s % context_length == 0 for s in starts)
        assert starts[0] >= 0
        assert starts[-1] + context_length + 1 <= count

    @given(
        count=st.integers(9, 500), batch=st.integers(1, 7), limit=st.one_of(st.none(), st.integers(1, 600)), documents=st.booleans()
    )  # fmt: skip
    def test_batches_are_those_windows_filled_up_with_nothing(self, count, batch, limit, documents):
        split = text(count, [0, 5])
        found = list(held_out_batches(corpus(split), settings(document_mask=documents), 8, batch, limit))
        assert all(b.tokens.shape == b.targets.shape == (batch, 8) for b in found)
        together = join(found)
        expected = held_out_windows(split.tokens, 8, limit).tolist()
        n = len(expected)
        assert together.tokens[:n, 0].tolist() == expected
        assert torch.equal(together.targets[:n], together.tokens[:n] + 1)
        assert len(together.tokens) - n < batch
        assert (together.targets[n:] == IGNORE_LABEL).all()
        assert (together.documents is not None) == documents

    def test_without_a_limit_every_token_but_the_rest_is_a_target_once(self):
        for count, expected in ((45, [0, 10, 20, 30]), (41, [0, 10, 20, 30]), (40, [0, 10, 20])):
            assert held_out_windows(in_shards(np.arange(count)), 10).tolist() == expected

    @pytest.mark.parametrize("limit", [10, 30, 99])
    def test_a_limit_thins_evenly(self, limit):
        starts = held_out_windows(in_shards(np.arange(1001)), 10, limit)
        assert len(starts) == limit // 10
        assert starts[0] == 0
        if len(starts) > 1:
            gaps = np.diff(starts)
            assert gaps.max() - gaps.min() <= 10
            assert starts[-1] == 990

    def test_of_a_mixture_come_one_part_after_the_other_in_proportion(self):
        parts = corpus(text(801), text(401, first=5000), text(6), held_out=[text(801), text(401, first=5000), text(6)])
        whole = join(list(held_out_batches(parts, settings(), 8, 7, None)))
        learned = whole.tokens[(whole.targets != IGNORE_LABEL).any(1)]
        assert learned[:, 0].tolist() == [*range(0, 800, 8), *range(5000, 5400, 8)]  # of the third part there is not a whole window
        thin = join(list(held_out_batches(parts, settings(), 8, 4, 8 * 30)))
        learned = thin.tokens[(thin.targets != IGNORE_LABEL).any(1)]
        assert (learned[:, 0] < 5000).tolist() == [True] * 20 + [False] * 10

    def test_of_examples_are_whole_packs(self):
        split = examples([9, 9, 9, 16, 3])
        found = join(list(held_out_batches(corpus(split), settings(), 16, 3, None)))
        assert len(found.tokens) == 6
        learned = found.targets[found.targets != IGNORE_LABEL].tolist()
        assert sorted(learned) == sorted(1000 * (n + 1) + i for n, length in enumerate([9, 9, 9, 16, 3]) for i in range(1, length))
        assert len(join(list(held_out_batches(corpus(split), settings(), 16, 1, 32))).tokens) == 2


def test_text_and_examples_cannot_be_mixed():
    mixed = corpus(text(300), examples([9, 9]))
    for make in (lambda: build_batches(mixed, settings(), 16, 2, 0), lambda: held_out_batches(mixed, settings(), 16, 2, None)):
        with pytest.raises(UserError, match=r"^data\.parts: part 0 is plain text and part 1 holds examples"):
            make()


def test_making_a_batch_takes_next_to_no_time():
    split = text(3_000_000, list(range(0, 3_000_000, 700)))
    batches = RowBatches(TextWindows(split, 256, document_mask=True), 16)
    seconds = []
    for step in range(50):
        started = time.perf_counter()
        batches.batch(step)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.002  # 0.0001 on an idle machine
