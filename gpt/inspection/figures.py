"""Figures of a prepared source: lengths, packing, the share that is learned, frequent tokens and classes.

Lengths are those of all training documents; what needs the ids themselves is counted on at most COUNTED tokens, evenly spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpt.data.encoded import IGNORE_LABEL
from gpt.inspection.visible import in_one_line, special_ids

if TYPE_CHECKING:
    from gpt.data.prepare import Corpus
    from gpt.data.shards import Split, TokenArray

COUNTED = 1 << 24  # ids: a second's work, and three digits of every share
_BLOCK = 1 << 14
_FREQUENT = 20


@dataclass(frozen=True)
class Packing:
    """How examples fill the rows of a batch."""

    efficiency: float
    """Share of the places that hold a token."""
    rows: int
    examples_per_row: float


@dataclass(frozen=True)
class FrequentToken:
    """A token that occurs often."""

    id: int
    text: str
    count: int
    share: float
    """Of the tokens that were counted."""


@dataclass(frozen=True)
class PartFigures:
    """One source: its share of the training windows, and what both sides of its split hold."""

    name: str
    weight: float
    documents: int
    tokens: int
    held_out_documents: int
    held_out_tokens: int


@dataclass(frozen=True)
class Figures:
    """Of the training side of a corpus."""

    parts: list[PartFigures]
    lengths: np.ndarray
    """(D,) int64: tokens of each document or example."""
    tokens: int
    bytes_per_token: float
    learned: float
    """Share of the tokens that is learned."""
    packing: Packing | None
    """None where text is cut without gaps."""
    classes: list[tuple[str, int]]
    """How often each class is learned; most frequent first."""
    frequent: list[FrequentToken]
    counted: int
    """How many tokens the counts and shares are of."""


def corpus_figures(corpus: Corpus, context_length: int, packed: bool) -> Figures:
    """Figures of a corpus.

    Args:
        corpus: as `prepare_corpus` returns it.
        context_length: places of a row.
        packed: whether several examples share a row.
    """
    splits = [part.train for part in corpus.parts]
    lengths = np.concatenate([np.diff(np.asarray(split.documents).astype(np.int64)) for split in splits])
    tokens = sum(len(split.tokens) for split in splits)
    ids = np.zeros(corpus.tokenizer.vocab_size, dtype=np.int64)
    classes = np.zeros(len(corpus.classes), dtype=np.int64)
    learned = 0
    for split in splits:
        for start, length in _blocks(len(split.tokens), COUNTED * len(split.tokens) // max(1, tokens)):
            ids += np.bincount(_window(split.tokens, start, length), minlength=len(ids))
            if split.labels is None:
                learned += length
                continue
            labels = _window(split.labels, start, length)
            labels = labels[labels != IGNORE_LABEL]
            learned += len(labels)
            if len(classes):
                classes += np.bincount(labels, minlength=len(classes))
    counted = int(ids.sum())
    named = sorted(((name, int(count)) for name, count in zip(corpus.classes, classes, strict=True)), key=lambda pair: -pair[1])
    parts = [
        PartFigures(
            part.name, part.weight, _documents(part.train), len(part.train.tokens), _documents(part.held_out), len(part.held_out.tokens)
        )
        for part in corpus.parts
    ]
    return Figures(
        parts=parts,
        lengths=lengths,
        tokens=tokens,
        bytes_per_token=float(ids @ corpus.tokenizer.byte_lengths()) / max(1, counted),
        learned=learned / max(1, counted),
        packing=None if corpus.kind == "text" else _packing(lengths, context_length, packed, 2 if corpus.kind == "preference" else 1),
        classes=named,
        frequent=_frequent(corpus, ids, counted),
        counted=counted,
    )


def _documents(split: Split) -> int:
    return len(split.documents) - 1


def _blocks(total: int, limit: int) -> list[tuple[int, int]]:
    """Start and length of the stretches to count: all that there is, or about `limit` tokens evenly spread."""
    starts = range(0, total, _BLOCK)
    if total > limit:
        starts = np.linspace(0, total - _BLOCK, max(1, limit // _BLOCK)).astype(np.int64).tolist() if total > _BLOCK else [0]
    return [(start, min(_BLOCK, total - start)) for start in starts]


def _window(array: TokenArray, start: int, length: int) -> np.ndarray:
    return array.windows(np.array([start]), length)[0]


def _packing(lengths: np.ndarray, context_length: int, packed: bool, together: int) -> Packing:
    """`together`: so many examples, one after another, lie at the same place of as many rows."""
    from gpt.data.packing import best_fit, efficiency

    fitting = np.minimum(lengths[lengths > 0], context_length)
    widths = fitting.reshape(-1, together).max(1)
    packs = best_fit(widths, context_length) if packed else [np.array([i]) for i in range(len(widths))]
    rows = [together * pack + second for pack in packs for second in range(together)]
    return Packing(efficiency(fitting, rows, context_length), len(rows), len(fitting) / max(1, len(rows)))


def _frequent(corpus: Corpus, counts: np.ndarray, counted: int) -> list[FrequentToken]:
    order = [int(index) for index in np.argsort(-counts, kind="stable")[:_FREQUENT] if counts[index]]
    special, pieces = special_ids(corpus.tokenizer), corpus.tokenizer.pieces(order)
    return [
        FrequentToken(index, f"⟦{piece.decode()}⟧" if index in special else in_one_line(piece), int(counts[index]), counts[index] / counted)
        for index, piece in zip(order, pieces, strict=True)
    ]
