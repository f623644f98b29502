"""Best-fit packing: every example once, no pack over its capacity, as full as the definition says, fast."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpt.data.packing import best_fit, efficiency


def one_by_one(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing by its definition: look at every pack for every example."""
    packs: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [p for p in packs if sum(p) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            packs.append([length])
    return packs


CASES = st.integers(1, 40).flatmap(lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=60), st.just(capacity)))


@given(CASES)
@example(([3, 3, 2, 2, 2, 6, 6, 1], 8))
@example(([5, 5, 5, 2, 2, 2, 2, 2, 1], 10))
def test_the_packs_are_those_of_the_definition(case):
    lengths, capacity = case
    packs = best_fit(np.array(lengths, dtype=np.uint32), capacity)
    assert sorted(i for p in packs for i in p.tolist()) == list(range(len(lengths)))
    made = [[lengths[i] for i in p.tolist()] for p in packs]
    assert all(0 < sum(p) <= capacity for p in made)
    # Packs with the same room are as good as each other: which of them is taken decides who shares a pack, not how full packs become.
    assert sorted(sum(p) for p in made) == sorted(sum(p) for p in one_by_one(lengths, capacity))


@given(CASES)
def test_the_same_lengths_give_the_same_packs(case):
    lengths, capacity = case
    first, second = (best_fit(np.array(lengths, dtype=np.int64), capacity) for _ in range(2))
    assert [p.tolist() for p in first] == [p.tolist() for p in second]


def test_an_example_goes_into_the_fullest_pack_with_room():
    packs = best_fit(np.array([7, 6, 2, 3]), 10)  # 3 makes the pack of 7 full; 2 goes to 6
    assert [p.tolist() for p in packs] == [[0, 3], [1, 2]]


@pytest.mark.parametrize("lengths", [[0, 3], [3, 11]])
def test_a_length_that_no_pack_holds_is_refused(lengths):
    with pytest.raises(ValueError, match="a pack holds examples of 1 to 10"):
        best_fit(np.array(lengths), 10)


def test_nothing_to_pack():
    assert best_fit(np.array([], dtype=np.int64), 10) == []
    assert efficiency(np.array([], dtype=np.int64), [], 10) == 1.0


def test_efficiency_is_the_share_of_places_in_use():
    lengths = np.array([6, 6, 4, 1])
    packs = best_fit(lengths, 10)
    assert len(packs) == 2
    assert efficiency(lengths, packs, 10) == 17 / 20


@pytest.mark.parametrize("capacity", [512, 32768])
def test_a_million_examples_take_seconds_and_leave_little_empty(capacity):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.5, 1.0, 1_000_000), 1, capacity).astype(np.int64)
    started = time.perf_counter()
    packs = best_fit(lengths, capacity)
    assert time.perf_counter() - started < 15  # takes about 1
    assert np.array_equal(np.sort(np.concatenate(packs)), np.arange(len(lengths)))
    assert max(int(lengths[p].sum()) for p in packs) <= capacity
    assert efficiency(lengths, packs, capacity) > 0.999
