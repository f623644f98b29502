"""Several sources by weight: which of them a sample comes from, in closed form, so that a mixture too is a function of (seed, step).

Samples come in blocks; in every block each part has its share of the places, and the block's own shuffle says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from gpt.data.batches import Batch, Rows, join, reorder
from gpt.errors import UserError

BLOCK = 1024  # samples
_SHUFFLE = 0x6D6978  # sets the generators of blocks apart from those of the parts' epochs


def apportion(weights: Sequence[float], places: int) -> np.ndarray:
    """(P,) int64: how many of `places` each weight gets, by largest remainders; at least 1, so that no part is never seen.

    Raises:
        UserError: more weights than places.
    """
    if len(weights) > places:
        raise UserError(f"data.parts: {len(weights)} parts are more than a mixture can have ({places}); join some of them")
    exact = np.array(weights, dtype=np.float64) / max(weights)  # first by the largest, which keeps the sum finite
    exact *= places / exact.sum()
    counts = np.maximum(1, np.floor(exact)).astype(np.int64)
    while (missing := places - int(counts.sum())) != 0:  # lets one place go, or takes one, where that is least wrong
        behind = exact - counts
        counts[np.argmax(behind) if missing > 0 else np.argmin(np.where(counts > 1, behind, np.inf))] += np.sign(missing)
    return counts


class Shares:
    """Which part each sample of a mixture is drawn from.

    Args:
        weights: of the parts, each greater than 0.
        seed: of the order.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.seed = seed
        self.counts = apportion(weights, BLOCK)
        self._block = lru_cache(maxsize=4)(self._shuffled)

    def _shuffled(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(BLOCK,) int64 each: the part of every place of a block, and how many places before it are that part's."""
        parts = np.random.default_rng((self.seed, block, _SHUFFLE)).permutation(np.repeat(np.arange(len(self.counts)), self.counts))
        before = np.empty(BLOCK, dtype=np.int64)
        before[np.argsort(parts, kind="stable")] = np.concatenate([np.arange(count) for count in self.counts])
        return parts, before

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) sample numbers of the mixture -> (n,) their parts, and (n,) their sample numbers within the parts, int64 each."""
        blocks, places = np.divmod(samples, BLOCK)
        parts, numbers = np.empty(len(samples), dtype=np.int64), np.empty(len(samples), dtype=np.int64)
        for block in np.unique(blocks):
            here = blocks == block
            of, before = self._block(int(block))
            parts[here] = of[places[here]]
            numbers[here] = block * self.counts[parts[here]] + before[places[here]]
        return parts, numbers


class Mixture:
    """Rows of several parts; each part goes through epochs of its own, the small ones more often.

    Args:
        parts: all with documents or all without.
        weights: how often rows come from each.
        seed: of the order.
        together: so many rows, one after another, that always come from one part: 2 for pairs.
    """

    def __init__(self, parts: Sequence[Rows], weights: Sequence[float], seed: int, together: int = 1) -> None:
        self._parts, self._shares, self._together = parts, Shares(weights, seed), together
        self.windows = sum(part.windows for part in parts)  # an epoch: as many rows as the parts have together
        self._before = np.cumsum([0, *(part.windows for part in parts)])  # rows of all parts before each one

    @property
    def tokens_per_epoch(self) -> int:
        """Targets of an epoch that are learned, about."""
        shares = self._shares.counts / BLOCK
        return round(self.windows * sum(s * p.tokens_per_epoch / p.windows for s, p in zip(shares, self._parts, strict=True)))

    def rows(self, samples: np.ndarray) -> Batch:
        """The rows of these sample numbers."""
        parts, numbers = self._shares.locate(samples // self._together)
        numbers = numbers * self._together + samples % self._together
        by_part = np.argsort(parts, kind="stable")
        made = [self._numbered(part, numbers[parts == part]) for part in np.unique(parts)]
        return reorder(join(made), np.argsort(by_part))

    def _numbered(self, part: int, samples: np.ndarray) -> Batch:
        rows = self._parts[part].rows(samples)
        return rows if rows.numbers is None else replace(rows, numbers=rows.numbers + int(self._before[part]))
