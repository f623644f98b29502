import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_corpora import corpus, examples, settings, text

from gpt.data.loader import build_batches
from gpt.data.mixture import BLOCK, Shares, apportion
from gpt.errors import UserError

weights = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9)


class TestApportion:
    @given(weights, st.integers(9, 2000))
    def test_all_places_go_and_every_part_has_one(self, weights, places):
        counts = apportion(weights, places)
        exact = np.array(weights) / sum(weights) * places
        assert counts.sum() == places
        assert counts.min() >= 1
        over = counts - np.maximum(exact, 1)
        assert over.max() < 1 + 1e-6  # none has a place too many ...
        if exact.min() >= 1:
            assert np.abs(counts - exact).max() < 1 + 1e-6  # ... nor one too few, but for the sake of one that would have none

    def test_largest_remainders_come_first(self):
        assert apportion([1, 1, 1], 10).tolist() == [4, 3, 3]
        assert apportion([5.5, 3.4, 1.1], 10).tolist() == [6, 3, 1]
        assert apportion([2, 6], 1024).tolist() == [256, 768]
        assert apportion([1e-9, 1], 1024).tolist() == [1, 1023]
        assert apportion([1e308, 1e308], 4).tolist() == [2, 2]

    def test_more_parts_than_places(self):
        with pytest.raises(UserError, match=r"^data\.parts: 5 parts are more than a mixture can have \(4\)"):
            apportion([1] * 5, 4)


class TestShares:
    @given(weights, st.integers(0, 2**32 - 1), st.integers(0, 3 * BLOCK), st.integers(1, 2 * BLOCK))
    def test_every_part_is_counted_through_without_a_gap(self, weights, seed, first, count):
        shares = Shares(weights, seed)
        parts, numbers = shares.locate(np.arange(first + count))
        for part in range(len(weights)):
            assert np.array_equal(numbers[parts == part], np.arange((parts == part).sum()))
        some = shares.locate(np.arange(first, first + count))  # asked for by themselves they are the same
        assert np.array_equal(some[0], parts[first:])
        assert np.array_equal(some[1], numbers[first:])

    def test_a_block_has_each_parts_share_and_an_order_of_its_own(self):
        shares = Shares([3, 1], seed=1)
        blocks = [shares.locate(np.arange(b * BLOCK, (b + 1) * BLOCK))[0] for b in (0, 1, 1000)]
        assert all(np.bincount(b).tolist() == [768, 256] for b in blocks)
        assert not np.array_equal(blocks[0], blocks[1])
        assert not np.array_equal(blocks[0], Shares([3, 1], seed=2).locate(np.arange(BLOCK))[0])
        assert np.bincount(blocks[0][:128]).tolist() != [128]  # mixed well: not one part after the other
        assert shares.locate(np.array([10**12]))[1][0] < 10**12


class TestMixture:
    def test_rows_come_by_weight_and_small_parts_more_often(self):
        parts = corpus(text(8 * 1001, first=0), text(8 * 101, first=100_000), weights=[1, 3])
        batches = build_batches(parts, settings(), 8, 64, seed=1)
        assert batches.windows == 999 + 99
        assert batches.tokens_per_epoch == 8 * batches.windows
        starts = np.concatenate([batches.batch(step).tokens[:, 0].numpy() for step in range(2 * BLOCK // 64)])
        assert (starts >= 100_000).sum() == 2 * BLOCK * 3 // 4
        small, large = starts[starts >= 100_000], starts[starts < 100_000]
        assert len(np.unique(large)) == len(large) == 512  # within its first epoch
        for number in range(len(small) // 99):  # each epoch of the small part has each of its windows once, in another order
            assert len(np.unique(small[99 * number : 99 * (number + 1)])) == 99
        assert small[:99].tolist() != small[99:198].tolist()

    def test_parts_of_equal_size_have_orders_of_their_own(self):
        batches = build_batches(corpus(text(8 * 200), text(8 * 200, first=100_000)), settings(), 8, 64, seed=1)
        starts = np.concatenate([batches.batch(step).tokens[:, 0].numpy() for step in range(5)])
        one, other = starts[starts < 100_000], starts[starts >= 100_000] - 100_000
        n = min(len(one), len(other))
        assert one[:n].tolist() != other[:n].tolist()

    def test_of_examples(self):
        batches = build_batches(corpus(examples([9] * 30), examples([3, 4] * 20), weights=[1, 1]), settings(), 16, 32, seed=1)
        assert batches.windows == 30 + 9  # four or five to a row
        assert batches.tokens_per_epoch == pytest.approx(39 * (8 + (20 * 2 + 20 * 3) / 9) / 2, abs=1)
        batch = batches.batch(0)
        assert batch.documents is not None
        assert set(batch.documents.max(1).values.tolist()) >= {1, 3}  # padding included
