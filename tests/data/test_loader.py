import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt.data.loader import TrainingBatches, held_out_windows
from gpt.data.shards import TokenArray


def array(count: int) -> TokenArray:
    """Ids that are their own places, in two shards."""
    ids = np.arange(count, dtype=np.uint32)
    return TokenArray([part for part in np.split(ids, [count // 3]) if len(part)])


def epoch(batches: TrainingBatches, number: int) -> list[int]:
    """Where the windows of an epoch start, in their order."""
    last = (number + 1) * batches.windows
    starts = np.concatenate([batches.starts(step) for step in range(-(-last // batches.sequences))])
    return starts[number * batches.windows : last].tolist()


def test_targets_are_one_place_ahead():
    batches = TrainingBatches(array(100), 8, 3, seed=1)
    tokens, targets = batches.batch(2)
    assert tokens.shape == targets.shape == (3, 8)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, tokens + 1)  # ids are places
    assert tokens[:, 0].tolist() == batches.starts(2).tolist()


def test_a_batch_depends_on_seed_and_step_alone():
    def batches(seed: int = 5) -> TrainingBatches:
        return TrainingBatches(array(200), 8, 4, seed)

    forwards = [batches().batch(step) for step in range(30)]
    one = batches()
    for step in [29, 0, 17, 3, 17, 28, 1]:  # across epochs, back and forth
        for expected, got in zip(forwards[step], one.batch(step), strict=True):
            assert torch.equal(expected, got)
    assert any(not torch.equal(forwards[step][0], batches(6).batch(step)[0]) for step in range(3))


@given(
    count=st.integers(9, 400),
    context_length=st.integers(1, 8),
    sequences=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
    number=st.integers(0, 3),
)
def test_an_epoch_has_every_window_once(count, context_length, sequences, seed, number):
    batches = TrainingBatches(array(count), context_length, sequences, seed)
    starts = epoch(batches, number)
    offset = min(starts)
    assert sorted(starts) == [offset + i * context_length for i in range(batches.windows)]
    assert offset >= 0
    assert max(starts) + context_length + 1 <= count
    assert count - 1 - batches.tokens_per_epoch < 2 * context_length  # little is left out
    assert batches.tokens_per_epoch == len(starts) * context_length


@given(
    count=st.integers(2, 300),
    context_length=st.integers(1, 299),
    sequences=st.integers(1, 40),
    step=st.integers(0, 10**9),
    seed=st.integers(0, 2**32 - 1),
)
def test_nothing_is_ever_out_of_range(count, context_length, sequences, step, seed):
    context_length = min(context_length, count - 1)
    tokens, targets = TrainingBatches(array(count), context_length, sequences, seed).batch(step)
    assert tokens.shape == (sequences, context_length)
    assert torch.equal(targets, tokens + 1)
    assert tokens.min() >= 0
    assert targets.max() < count


def test_a_batch_may_run_across_epochs():
    batches = TrainingBatches(array(8 * 11 + 1), 8, 4, seed=3)
    assert batches.windows == 10
    across = batches.starts(2).tolist()  # samples 8 to 11
    assert across == epoch(batches, 0)[8:] + epoch(batches, 1)[:2]


def test_seeds_and_epochs_differ_in_order_and_in_where_windows_begin():
    batches = TrainingBatches(array(8 * 101), 8, 4, seed=3)
    epochs = [epoch(batches, number) for number in range(8)]
    assert len({tuple(e) for e in epochs}) == 8
    assert len({min(e) for e in epochs}) > 2  # the offset of the grid
    assert epochs[0] != sorted(epochs[0])
    assert epoch(TrainingBatches(array(8 * 101), 8, 4, seed=4), 0) != epochs[0]
    assert epoch(TrainingBatches(array(8 * 101), 8, 1, seed=3), 0) == epochs[0]  # whatever the size of the batch


def test_a_corpus_of_one_window():
    batches = TrainingBatches(array(9), 8, 3, seed=0)
    for step in (0, 1, 7):
        tokens, targets = batches.batch(step)
        assert tokens.tolist() == [list(range(8))] * 3
        assert targets.tolist() == [list(range(1, 9))] * 3


class TestHeldOut:
    @given(count=st.integers(2, 500), context_length=st.integers(1, 20), limit=st.one_of(st.none(), st.integers(1, 600)))
    def test_windows_follow_each_other_and_stay_within(self, count, context_length, limit):
        context_length = min(context_length, count - 1)
        starts = held_out_windows(array(count), context_length, limit).tolist()
        most = (count - 1) // context_length
        assert len(starts) == most if limit is None else len(starts) == max(1, min(most, limit // context_length))
        assert len(set(starts)) == len(starts)
        assert starts == sorted(starts)
        assert all(s % context_length == 0 for s in starts)
        assert starts[0] >= 0
        assert starts[-1] + context_length + 1 <= count

    def test_without_a_limit_every_token_but_the_rest_is_a_target_once(self):
        assert held_out_windows(array(45), 10).tolist() == [0, 10, 20, 30]
        assert held_out_windows(array(41), 10).tolist() == [0, 10, 20, 30]
        assert held_out_windows(array(40), 10).tolist() == [0, 10, 20]

    @pytest.mark.parametrize("limit", [10, 30, 99])
    def test_a_limit_thins_evenly(self, limit):
        starts = held_out_windows(array(1001), 10, limit)
        assert len(starts) == limit // 10
        assert starts[0] == 0
        if len(starts) > 1:
            gaps = np.diff(starts)
            assert gaps.max() - gaps.min() <= 10
            assert starts[-1] == 990
