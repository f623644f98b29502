"""Small corpora made by hand, for the tests of what makes batches."""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
import torch

from gpt.data.batches import Batch
from gpt.data.config import DataConfig
from gpt.data.encoded import IGNORE_LABEL
from gpt.data.prepare import Corpus, Part
from gpt.data.shards import Index, Split, TokenArray
from gpt.data.tokenizer import Tokenizer


def in_shards(values: np.ndarray, shards: int = 2) -> TokenArray:
    """Shards of unlike sizes, none empty."""
    borders = sorted({len(values) * i * i // (shards * shards) for i in range(1, shards)} - {0, len(values)})
    return TokenArray(np.split(values, borders))


def text(tokens: int, documents: list[int] | None = None, shards: int = 2, first: int = 0) -> Split:
    """Ids that are their own places, `first` added; documents that begin at given places."""
    borders = np.array([*(documents or [0]), tokens], dtype=np.uint64)
    return Split(in_shards(np.arange(first, first + tokens, dtype=np.uint32), shards), borders, None)


def examples(lengths: list[int], shards: int = 1, learned_from: int = 1) -> Split:
    """Examples whose ids are 1000 * (number + 1) + place; labels are the ids, from place `learned_from` on."""
    ids = [1000 * (number + 1) + np.arange(length, dtype=np.uint32) for number, length in enumerate(lengths)]
    labels = [np.where(np.arange(len(i)) < learned_from, IGNORE_LABEL, i.astype(np.int64)).astype(np.int32) for i in ids]
    nothing = np.empty(0, np.uint32)
    return Split(
        in_shards(np.concatenate([nothing, *ids]), shards),
        np.cumsum([0, *lengths]).astype(np.uint64),
        in_shards(np.concatenate([nothing.astype(np.int32), *labels]), shards),
    )


def corpus(
    *train: Split,
    held_out: list[Split] | None = None,
    weights: list[float] | None = None,
    kind: Literal["text", "language_model", "text_label", "tokens_tags"] | None = None,
) -> Corpus:
    """A part for each split; what is held out is the same, unless given."""
    held_out, weights = held_out or list(train), weights or [1.0] * len(train)
    parts = [Part(f"part {n}", w, t, h, Index()) for n, (w, t, h) in enumerate(zip(weights, train, held_out, strict=True))]
    kind = kind or ("text" if train[0].labels is None else "language_model")
    return Corpus(cast(Tokenizer, None), parts, {}, kind, [])  # batches are made without the tokenizer


def settings(**changes: Any) -> DataConfig:
    return DataConfig(**changes)


def same(a: Batch, b: Batch) -> bool:
    """Whether two batches are equal in all."""
    if (a.documents is None) != (b.documents is None):
        return False
    pairs = [(a.tokens, b.tokens), (a.targets, b.targets)]
    pairs += [] if a.documents is None or b.documents is None else [(a.documents, b.documents)]
    return all(x.shape == y.shape and x.dtype == y.dtype == torch.int64 and torch.equal(x, y) for x, y in pairs)
