"""Which checkpoints stay."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.training.checkpoint_retention import Retention

RETENTIONS = st.builds(Retention, keep_last=st.integers(1, 4), keep_best=st.integers(0, 4), keep_every=st.sampled_from([0, 1, 3, 10]))
LOSSES = st.one_of(st.none(), st.sampled_from([1.0, 2.0]), st.floats(0, 10), st.just(math.nan), st.just(math.inf))


@given(RETENTIONS, st.lists(st.tuples(st.integers(1, 5), LOSSES, st.booleans()), max_size=30))
def test_over_a_whole_run(retention, saves):
    """Saves of growing steps, some of which are damaged after a while."""
    kept: dict[int, float | None] = {}
    damaged: set[int] = set()
    best_step, best, step = None, math.inf, 0
    for gap, loss, breaks in saves:
        step += gap
        kept[step] = loss
        if loss is not None and loss < best:
            best_step, best = step, loss
        before, broken = dict(kept), set(damaged)
        gone = retention.superseded(kept, damaged, step, best_step)
        assert gone == sorted(gone)
        for old in gone:
            kept.pop(old, None)
            damaged.discard(old)
        newest = sorted(before)[-retention.keep_last :]
        assert kept.keys() >= set(newest), "damaged ones do not take the place of whole ones"
        assert best_step is None or best_step in kept or best_step in damaged
        for each in {*before, *broken}:
            if retention.keep_every and each % retention.keep_every == 0:
                assert each in kept or each in damaged
        finite = sorted((value, each) for each, value in before.items() if value is not None and math.isfinite(value))
        assert {each for _, each in finite[: retention.keep_best]} <= kept.keys()
        reasons = len(newest) + retention.keep_best + 1 + len([s for s in kept if retention.keep_every and s % retention.keep_every == 0])
        assert len(kept) <= reasons
        assert all(s == best_step or (retention.keep_every and s % retention.keep_every == 0) for s in damaged)
        if breaks and len(kept) > 1:
            victim = min(kept)
            del kept[victim]
            damaged.add(victim)


@pytest.mark.parametrize(
    ("retention", "gone"),
    [
        (Retention(1, 0, 0), [10, 20, 40]),
        (Retention(2, 0, 0), [10, 20]),
        (Retention(1, 1, 0), [10, 20, 40]),
        (Retention(1, 2, 0), [20, 40]),
        (Retention(1, 0, 20), [10]),
        (Retention(9, 0, 0), []),
    ],
)
def test_by_example(retention, gone):
    """30 is the best of the run; 40 has a loss that is no number."""
    assert retention.superseded({10: 2.5, 20: None, 30: 2.0, 40: math.nan, 50: 3.0}, set(), 50, 30) == gone


def test_what_was_just_saved_stays_though_there_are_later_ones():
    assert Retention(2, 0, 0).superseded({10: None, 20: None, 30: None, 15: None}, {5}, 15, None) == [5, 10]
