"""What data hands to training and to validation: a batch, and where batches come from.

Shapes: B sequences of the global batch, n rows, T context_length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows to train on or to score."""

    tokens: Tensor
    """(B, T) int64."""
    targets: Tensor
    """(B, T) int64: what follows each token, or its class; IGNORE_LABEL where nothing is learned."""
    documents: Tensor | None
    """(B, T) int64: number of the document within the row, rising from 0, padding being one of its own; None: each row is one document."""
    numbers: Tensor | None = None
    """(B,) int64, on the host: which row of the data each is, the same in every epoch, -1: padding; None: rows are cut anew in each."""


class Batches(Protocol):
    """What a trainer draws from."""

    @property
    def tokens_per_epoch(self) -> int:
        """Targets of an epoch that are learned, about; for text exactly. 0: not known (a stream)."""
        ...

    @property
    def windows(self) -> int:
        """Rows of an epoch. 0: not known (a stream)."""
        ...

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Rank's rows, rank * B / world and on, of the global batch `step`."""
        ...


class Rows(Protocol):
    """Numbered rows, epoch after epoch, each in an order of its own."""

    @property
    def tokens_per_epoch(self) -> int:
        """Targets of an epoch that are learned, about."""
        ...

    @property
    def windows(self) -> int:
        """Rows of an epoch."""
        ...

    def rows(self, samples: np.ndarray) -> Batch:
        """(n,) sample numbers, counted from the first row of the first epoch -> n rows."""
        ...


def share_of_rank(sequences: int, world: int) -> int:
    """Rows of each rank.

    Raises:
        ValueError: `world` does not divide them.
    """
    if sequences % world:
        raise ValueError(f"{world} ranks cannot share the {sequences} sequences of a batch evenly")
    return sequences // world


def join(batches: Sequence[Batch]) -> Batch:
    """The rows of several batches, all with documents or all without, one after another."""
    documents = [batch.documents for batch in batches if batch.documents is not None]
    numbers = [batch.numbers for batch in batches if batch.numbers is not None]
    assert len(documents) in (0, len(batches))
    tokens, targets = torch.cat([b.tokens for b in batches]), torch.cat([b.targets for b in batches])
    all_numbered = len(numbers) == len(batches)
    return Batch(tokens, targets, torch.cat(documents) if documents else None, torch.cat(numbers) if all_numbered else None)


def reorder(batch: Batch, order: np.ndarray) -> Batch:
    """Row i of the new batch is row order[i] of the old one."""
    index = torch.from_numpy(order)
    documents, numbers = (None if t is None else t[index] for t in (batch.documents, batch.numbers))
    return Batch(batch.tokens[index], batch.targets[index], documents, numbers)
