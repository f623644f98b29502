"""Batches as a pure function of (seed, step), whatever the number of ranks: to resume a run is to go on counting.

Shapes: B sequences of the global batch, n rows, T context_length. Rows are windows of a text, or packs of examples; both are numbered,
and every epoch has them in an order of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from gpt.data.batches import Batch, Rows, join, share_of_rank
from gpt.data.encoded import IGNORE_LABEL
from gpt.data.mixture import Mixture
from gpt.data.packing import best_fit
from gpt.data.shards import Split, TokenArray
from gpt.errors import UserError

if TYPE_CHECKING:
    from gpt.data.config import DataConfig
    from gpt.data.prepare import Corpus


def take(array: TokenArray, places: np.ndarray) -> np.ndarray:
    """The ids at `places`, int64 in the shape of `places`."""
    if len(array.shards) == 1:
        return np.asarray(array.shards[0])[places].astype(np.int64)
    shards = np.searchsorted(array.starts, places, side="right") - 1
    found = np.empty(places.shape, dtype=np.int64)
    for number in np.unique(shards):
        here = shards == number
        found[here] = np.asarray(array.shards[number])[places[here] - array.starts[number]]
    return found


def take_windows(array: TokenArray, starts: np.ndarray, length: int) -> np.ndarray:
    """(n, length) int64: the ids from each start on."""
    within = np.arange(length)
    shards = np.searchsorted(array.starts, starts, side="right") - 1
    crossing = starts + length > array.starts[shards + 1]
    rows = np.empty((len(starts), length), dtype=np.int64)
    for number in np.unique(shards):
        here = (shards == number) & ~crossing
        rows[here] = np.asarray(array.shards[number])[(starts[here] - array.starts[number])[:, None] + within]
    if crossing.any():
        rows[crossing] = take(array, starts[crossing][:, None] + within)
    return rows


def _in_order(samples: np.ndarray, windows: int, order: Callable[[int], np.ndarray]) -> np.ndarray:
    """(n,) int64: what stands at each sample number, where `order(epoch)` lists the `windows` rows of an epoch."""
    epochs, places = np.divmod(samples, windows)
    found = np.empty(len(samples), dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        found[here] = order(int(epoch))[places[here]]
    return found


class TextWindows:
    """Windows of a text, each seen once an epoch, in an order that the seed decides.

    Every epoch has its own permutation and its own offset of the window grid, so that borders fall elsewhere.

    Args:
        split: the text, of more than T tokens.
        context_length: T.
        seed: of the order.
        document_mask: whether rows say which document each token is of.
    """

    def __init__(self, split: Split, context_length: int, seed: tuple[int, ...] = (0,), document_mask: bool = False) -> None:
        self.split, self.context_length, self.seed, self.document_mask = split, context_length, seed, document_mask
        tokens = len(split.tokens)
        self.windows = max(1, (tokens - 1) // context_length - 1)  # one less than fit, which leaves room for the offset
        self.slack = tokens - 1 - self.windows * context_length
        self.enough = self.slack >= 0  # for one window
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    @property
    def tokens_per_epoch(self) -> int:
        """Targets of one epoch."""
        return self.windows * self.context_length

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """(windows,) int64: where each window of this epoch starts."""
        first, *rest = self.seed
        generator = np.random.default_rng((first, epoch, *rest))
        offset = generator.integers(min(self.slack, self.context_length - 1) + 1)
        return generator.permutation(self.windows) * self.context_length + offset

    def starts(self, samples: np.ndarray) -> np.ndarray:
        """(n,) int64: where the windows of these sample numbers start in the text."""
        return _in_order(samples, self.windows, self._order)

    def rows(self, samples: np.ndarray) -> Batch:
        """The windows of these sample numbers."""
        return self.make(self.starts(samples))

    def held_out(self, limit: int | None) -> np.ndarray:
        """Where windows that follow each other start, evenly thinned to at most `limit` tokens of targets."""
        return held_out_windows(self.split.tokens, self.context_length, limit)

    def make(self, starts: np.ndarray) -> Batch:
        """The windows that start at these places of the text; targets one place ahead."""
        rows = torch.from_numpy(take_windows(self.split.tokens, starts, self.context_length + 1))
        documents = torch.from_numpy(self._documents(starts)) if self.document_mask else None
        return Batch(rows[:, :-1], rows[:, 1:], documents)

    def _documents(self, starts: np.ndarray) -> np.ndarray:
        """(n, T) int64: the number of each token's document within its window."""
        borders, T = self.split.documents, self.context_length
        # Sought in the borders' own dtype: of a mixture searchsorted would make floats, of every border.
        first, last = (np.searchsorted(borders, s.astype(borders.dtype), side="right") for s in (starts, starts + T - 1))
        inside = np.asarray(borders[_ranges(first, last - first)]).astype(np.int64)  # where documents begin within the windows
        begins = np.zeros((len(starts), T), dtype=np.int64)
        row = np.repeat(np.arange(len(starts)), last - first)
        begins[row, inside - starts[row]] = 1
        return begins.cumsum(1)


class ExampleRows:
    """Packs of examples, each seen once an epoch, in an order that the seed decides; filled up with padding.

    Args:
        split: the examples, with labels.
        context_length: T.
        seed: of the order.
        shifted: whether a token's target is the label of the next one (language modelling) or its own (classes).
        packed: several examples a row, or one.
        paired: examples 2i and 2i + 1 belong together: rows 2k hold the first of some pairs, rows 2k + 1 the second of the same, as
            documents of the same numbers. The order keeps such rows side by side.
        everywhere: of texts with a class: every token's target is that of the last one.

    Raises:
        UserError: an example is longer than T.
    """

    def __init__(
        self,
        split: Split,
        context_length: int,
        seed: tuple[int, ...] = (0,),
        shifted: bool = True,
        packed: bool = True,
        paired: bool = False,
        everywhere: bool = False,
    ) -> None:
        assert split.labels is not None
        self.tokens, self.labels, self.everywhere = split.tokens, split.labels, everywhere
        self.context_length, self.seed, self.shifted = context_length, seed, shifted
        self.together = 2 if paired else 1
        borders = np.asarray(split.documents).astype(np.int64)
        self.example_starts, self.lengths = borders[:-1], np.diff(borders)
        if (longest := int(self.lengths.max(initial=0))) > context_length:
            raise UserError(f"data: an example has {longest} tokens, more than model.context_length={context_length}; set it higher")
        widths = self.lengths.reshape(-1, self.together).max(1)  # of a pair, the longer one's
        packs = best_fit(widths, context_length) if packed else list(np.arange(len(widths))[:, None])
        if paired:
            packs = [2 * pack + second for pack in packs for second in (0, 1)]
        self.most_in_a_row = max(map(len, packs), default=0)
        self.windows = len(packs)
        self.enough = bool(packs)
        self._members = np.concatenate(packs) if packs else np.empty(0, dtype=np.int64)  # the packs' examples, one pack after another
        self._pack_starts = np.cumsum([0, *map(len, packs)])
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    @property
    def tokens_per_epoch(self) -> int:
        """Targets of one epoch that are learned."""
        if self.everywhere:
            return int(self.lengths.sum())
        learned = sum(int(np.count_nonzero(np.asarray(shard) != IGNORE_LABEL)) for shard in self.labels.shards)
        if self.shifted:  # nothing stands before an example's first token that it could be the target of
            learned -= int(np.count_nonzero(take(self.labels, self.example_starts) != IGNORE_LABEL))
        return learned

    def _epoch_order(self, epoch: int) -> np.ndarray:
        first, *rest = self.seed
        order = np.random.default_rng((first, epoch, *rest)).permutation(self.windows // self.together)
        return self._each_of(order)

    def _each_of(self, groups: np.ndarray) -> np.ndarray:
        """The rows of groups that stay together."""
        return (groups[:, None] * self.together + np.arange(self.together)).flatten()

    def rows(self, samples: np.ndarray) -> Batch:
        """The packs of these sample numbers."""
        return self.make(_in_order(samples, self.windows, self._order))

    def held_out(self, limit: int | None) -> np.ndarray:
        """Numbers of packs, evenly thinned to at most `limit` places."""
        groups = self.windows // self.together
        keep = groups if limit is None else max(1, min(groups, limit // (self.context_length * self.together)))
        return self._each_of(np.linspace(0, groups - 1, keep).round().astype(np.int64))

    def make(self, packs: np.ndarray) -> Batch:
        """The packs of these numbers."""
        n, T = len(packs), self.context_length
        counts = np.diff(self._pack_starts)[packs]  # examples of each row
        members = self._members[_ranges(self._pack_starts[packs], counts)]
        row = np.repeat(np.arange(n), counts)  # of each example
        lengths = self.lengths[members]
        before = np.cumsum(lengths) - lengths  # tokens of all examples before each one
        row_start = np.searchsorted(row, np.arange(n))  # first example of each row
        to = row * T + before - before[row_start][row]  # where each example goes in the flat rows
        source, places = _ranges(self.example_starts[members], lengths), _ranges(to, lengths)
        tokens, targets = np.zeros(n * T, dtype=np.int64), np.full(n * T, IGNORE_LABEL, dtype=np.int64)
        documents = np.repeat(counts, T)  # padding is numbered after the examples
        tokens[places] = take(self.tokens, source)
        documents[places] = np.repeat(np.arange(len(members)) - row_start[row], lengths)
        labels = take(self.labels, source)
        if self.shifted:
            labels = np.append(labels[1:], IGNORE_LABEL)
            labels[before + lengths - 1] = IGNORE_LABEL  # behind an example's last token stands another example
        elif self.everywhere:
            labels = np.repeat(labels[before + lengths - 1], lengths)
        targets[places] = labels
        made, learned, documents_of = (torch.from_numpy(x.reshape(n, T)) for x in (tokens, targets, documents))
        return Batch(made, learned, documents_of, torch.from_numpy(packs))


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... start + length - 1 of each, one after another."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)


class RowBatches:
    """Batches of numbered rows; they run on across epochs.

    Args:
        rows: what there is.
        sequences: B, of the global batch.
    """

    def __init__(self, rows: Rows, sequences: int) -> None:
        self._rows, self.sequences = rows, sequences
        self.windows, self.tokens_per_epoch = rows.windows, rows.tokens_per_epoch

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Rank's part of the global batch `step`, a pure function of its arguments and the seed.

        Raises:
            ValueError: `world` does not divide B.
        """
        each = share_of_rank(self.sequences, world)
        first = step * self.sequences + rank * each
        return self._rows.rows(np.arange(first, first + each))


def build_batches(corpus: Corpus, data: DataConfig, context_length: int, sequences: int, seed: int, everywhere: bool = False) -> RowBatches:
    """What a run trains on.

    Args:
        corpus: the prepared data, one part or a mixture.
        data: its settings.
        context_length: T.
        sequences: B, of the global batch.
        seed: of the order.
        everywhere: of texts with a class, every token is a place to tell it from what stands up to there, not only the last.

    Raises:
        UserError: a part is too small for a row, text is mixed with examples, or a pair would be torn apart.
    """
    parts: list[TextWindows | ExampleRows] = []
    for number, part in enumerate(corpus.parts):
        own_seed = (seed,) if len(corpus.parts) == 1 else (seed, number + 1)
        parts.append(_rows(corpus, part.train, data, context_length, own_seed, everywhere and corpus.kind == "text_label"))
        if not parts[-1].enough:
            raise UserError(_too_little(f"the training part of {part.name}", parts[-1]))
    weights = [part.weight for part in corpus.parts]
    together = 2 if corpus.kind == "preference" else 1
    if sequences % together:
        raise UserError(
            f"train.batch_tokens: a batch of {sequences} rows is no whole pairs, which rows of preference come in; take an even number"
        )
    return RowBatches(parts[0] if len(parts) == 1 else Mixture(parts, weights, seed, together), sequences)


def held_out_batches(corpus: Corpus, data: DataConfig, context_length: int, batch: int, limit: int | None) -> Iterator[Batch]:
    """What a run is validated on: every part's rows one after another, always the same.

    Args:
        corpus, data, context_length: as for `build_batches`.
        batch: rows of each batch; the last one is filled up with rows that have no targets.
        limit: most tokens in all, evenly spread over every part; None: all there are.

    Raises:
        UserError: nothing is held out, or less than a row of it.
    """
    parts = _held_out_parts(corpus, data, context_length)
    if not parts[0].enough:
        raise UserError(_too_little("the held-out part", parts[0]))
    every = [part.held_out(None) for part in parts]
    total = sum(map(len, every))
    if limit is not None:
        every = [part.held_out(limit * len(rows) // total) for part, rows in zip(parts, every, strict=True)]
    chosen = [(part, int(row)) for part, rows in zip(parts, every, strict=True) for row in rows]
    before = dict(zip(parts, np.cumsum([0, *(part.windows for part in parts)]).tolist(), strict=False))
    return (_together(chosen[first : first + batch], batch, before) for first in range(0, len(chosen), batch))


def count_held_out(corpus: Corpus, data: DataConfig, context_length: int) -> int:
    """How many rows a run is validated on at most, of whose numbers each is below that."""
    return sum(part.windows for part in _held_out_parts(corpus, data, context_length))


def examples_in_a_row(corpus: Corpus, data: DataConfig, context_length: int) -> int:
    """The most examples that one row holds, to train on or held out."""
    splits = [split for part in corpus.parts for split in (part.train, part.held_out)]
    found = (_rows(corpus, split, data, context_length, (0,)) for split in splits)
    return max(rows.most_in_a_row for rows in found if isinstance(rows, ExampleRows))


def _held_out_parts(corpus: Corpus, data: DataConfig, context_length: int) -> list[TextWindows | ExampleRows]:
    parts = [_rows(corpus, part.held_out, data, context_length, (0,)) for part in corpus.parts]
    return [part for part in parts if part.enough] or parts[:1]


def held_out_windows(tokens: TokenArray, context_length: int, limit: int | None = None) -> np.ndarray:
    """(N,) starts of windows that follow each other, evenly thinned to at most `limit` tokens of targets."""
    windows = (len(tokens) - 1) // context_length
    keep = windows if limit is None else max(1, min(windows, limit // context_length))
    return np.linspace(0, windows - 1, keep).round().astype(np.int64) * context_length


def _rows(
    corpus: Corpus, split: Split, data: DataConfig, context_length: int, seed: tuple[int, ...], everywhere: bool = False
) -> TextWindows | ExampleRows:
    texts = [part.name for part in corpus.parts if part.train.labels is None]
    examples = [part.name for part in corpus.parts if part.train.labels is not None]
    if texts and examples:
        raise UserError(
            f"data.parts: {texts[0]} is plain text and {examples[0]} holds examples, which cannot be mixed; take one of them out"
        )
    if split.labels is None:
        return TextWindows(split, context_length, seed, data.document_mask)
    shifted, paired = corpus.kind in ("language_model", "preference"), corpus.kind == "preference"
    return ExampleRows(split, context_length, seed, shifted, data.packing == "best_fit", paired, everywhere)


def _too_little(what: str, rows: TextWindows | ExampleRows) -> str:
    if isinstance(rows, TextWindows):
        length = rows.context_length
        return f"data: {what} has {len(rows.split.tokens)} tokens, fewer than model.context_length={length} and one more; give more text"
    return f"data: {what} has no examples; give more, or another data.holdout"


def _together(chosen: list[tuple[TextWindows | ExampleRows, int]], batch: int, before: dict[TextWindows | ExampleRows, int]) -> Batch:
    """Rows of one part or of several, and rows of padding up to `batch`; `before`: how many rows come before each part's."""
    made = []
    for part in dict.fromkeys(part for part, _ in chosen):
        rows = part.make(np.array([row for of, row in chosen if of is part]))
        made.append(rows if rows.numbers is None else replace(rows, numbers=rows.numbers + before[part]))
    if missing := batch - len(chosen):
        nothing = torch.zeros(missing, made[0].tokens.shape[1], dtype=torch.int64)
        documents, numbers = (None if made[0].documents is None else nothing), torch.full((missing,), -1)
        made.append(Batch(nothing, torch.full_like(nothing, IGNORE_LABEL), documents, None if made[0].numbers is None else numbers))
    return made[0] if len(made) == 1 else join(made)
