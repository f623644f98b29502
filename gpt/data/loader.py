"""Batches as a pure function of (seed, step): to resume a run is to go on counting.

Shapes: B sequences of a batch, T context_length.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gpt.data.shards import TokenArray


class TrainingBatches:
    """Windows of a token array, each seen once an epoch, in an order that the seed decides.

    Every epoch has its own permutation and its own offset of the window grid, so that borders fall elsewhere.

    Args:
        tokens: the training ids.
        context_length: T.
        sequences: B, of the global batch.
        seed: of the order.
    """

    def __init__(self, tokens: TokenArray, context_length: int, sequences: int, seed: int) -> None:
        self.tokens, self.context_length, self.sequences, self.seed = tokens, context_length, sequences, seed
        self.windows = max(1, (len(tokens) - 1) // context_length - 1)  # one less than fit, which leaves room for the offset
        self.slack = len(tokens) - 1 - self.windows * context_length
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    @property
    def tokens_per_epoch(self) -> int:
        """Targets of one epoch."""
        return self.windows * self.context_length

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """(windows,) int64: where each window of this epoch starts."""
        generator = np.random.default_rng((self.seed, epoch))
        offset = generator.integers(min(self.slack, self.context_length - 1) + 1)
        return generator.permutation(self.windows) * self.context_length + offset

    def starts(self, step: int) -> np.ndarray:
        """(B,) int64: where the windows of batch `step` start in the token array; batches run across epochs."""
        samples = np.arange(step * self.sequences, (step + 1) * self.sequences)
        return np.array([self._order(int(s) // self.windows)[s % self.windows] for s in samples])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """tokens, targets: (B, T) int64 each, targets one place ahead."""
        rows = torch.from_numpy(self.tokens.windows(self.starts(step), self.context_length + 1))
        return rows[:, :-1], rows[:, 1:]


def held_out_windows(tokens: TokenArray, context_length: int, limit: int | None = None) -> np.ndarray:
    """(N,) starts of windows that follow each other, evenly thinned to at most `limit` tokens of targets."""
    windows = (len(tokens) - 1) // context_length
    keep = windows if limit is None else max(1, min(windows, limit // context_length))
    return np.linspace(0, windows - 1, keep).round().astype(np.int64) * context_length
