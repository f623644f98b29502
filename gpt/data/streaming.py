"""Batches of text that is read and cut into ids while training: nothing is kept on disk, and where a stream stands is small.

Shapes: B sequences of the global batch, T context_length. A stream's documents stand one after another, as in a prepared text, and are cut
into windows whose last token is the first of the next. BLOCK windows at a time are shuffled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from gpt.data.batches import Batch, share_of_rank
from gpt.data.encoded import Encoded
from gpt.data.mixture import BLOCK, Shares
from gpt.data.shards import Split, TokenArray
from gpt.errors import UserError

if TYPE_CHECKING:
    from gpt.data.sources import Row

_ROWS, _CHARACTERS = 64, 1 << 18  # that are encoded at a time, at most; all but a single row


class Stream(Protocol):
    """Rows that know where they stand (`gpt.data.sources.RowStream`)."""

    def __next__(self) -> Row:
        """The next row."""
        ...

    def __iter__(self) -> Iterator[Row]:
        """Itself."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; where it stands, behind the last row given."""
        ...


@dataclass(frozen=True)
class StreamedSource:
    """A source that is read as it comes."""

    name: str
    open_rows: Callable[[dict[str, Any] | None], Stream]
    """From the beginning, or behind where the state of another stream was taken."""
    encode: Callable[[Sequence[Row]], Sequence[Encoded]]
    """Documents in order, each with its end-of-text token, as for the shards."""
    is_held_out: Callable[[str], bool]
    """By the key of a document."""
    weight: float = 1.0


@dataclass(frozen=True)
class _Piece:
    """The ids of the documents that are encoded together."""

    ids: np.ndarray
    begins: np.ndarray  # bool: whether a document begins at each of them
    epoch: int
    state: dict[str, Any] | None  # of the rows, before the first of them; None: the beginning


@dataclass(frozen=True)
class _Window:
    ids: np.ndarray  # (T + 1,)
    begins: np.ndarray  # (T + 1,) bool


def _documents(source: StreamedSource, rows: Sequence[Row], held_out: bool) -> Iterator[tuple[np.ndarray, bool]]:
    """Ids of each document of one side, and whether it begins there or goes on."""
    for document in source.encode(rows):
        side = source.is_held_out(document.held_out_key) if document.held_out is None else document.held_out
        if side == held_out and len(document.ids):
            yield document.ids, not document.continues


def _read(stream: Stream) -> list[Row]:
    """The next rows to encode; none: the end."""
    rows, characters = [], 0
    for row in islice(stream, _ROWS):
        rows.append(row)
        characters += len(row.values.get("text") or "")
        if characters >= _CHARACTERS:
            break
    return rows


class _Windows:
    """The windows of a source in the order of its text, again and again.

    Args:
        source: what is read.
        context_length: T.
        needed: tokens that the source must have, lest it be read over and over for a single batch.
        place: of another, where to go on.
    """

    def __init__(self, source: StreamedSource, context_length: int, needed: int, place: dict[str, Any] | None = None) -> None:
        self._source, self._context_length, self._needed = source, context_length, needed
        place = place or {"epoch": 0, "rows": None, "skip": 0}
        self._epoch, self._state, self._skip = place["epoch"], place["rows"], place["skip"]
        self._piece = _Piece(np.empty(0, np.uint32), np.empty(0, bool), self._epoch, self._state)
        self._stream = source.open_rows(self._state)
        self._whole_pass = self._state is None
        self._tokens = 0  # of this pass

    def place(self) -> dict[str, Any]:
        """Where the next window begins; JSON-able. `skip` is the number of tokens of the rows' ids that lie before it."""
        return {"epoch": self._piece.epoch, "rows": self._piece.state, "skip": self._skip}

    def next(self) -> _Window:
        """The next window.

        Raises:
            UserError: the source has too few tokens, or cannot be read.
        """
        ids, begins, missing = [], [], self._context_length + 1
        while missing:
            if self._skip >= len(self._piece.ids):
                self._skip -= len(self._piece.ids)
                self._piece = self._next_piece()
            here = slice(self._skip, self._skip + missing)
            ids.append(self._piece.ids[here])
            begins.append(self._piece.begins[here])
            missing -= len(ids[-1])
            self._skip += len(ids[-1])
        self._skip -= 1  # the last token is the next window's first
        return _Window(np.concatenate(ids), np.concatenate(begins))

    def _next_piece(self) -> _Piece:
        while True:
            epoch, state = self._epoch, self._state
            rows = _read(self._stream)
            if not rows:
                self._begin_again()
                continue
            self._state = self._stream.state_dict()
            documents = list(_documents(self._source, rows, held_out=False))
            if documents:
                ids = np.concatenate([ids for ids, _ in documents])
                begins = np.zeros(len(ids), dtype=bool)
                first = np.cumsum([0, *(len(ids) for ids, _ in documents)])[:-1]
                begins[first] = [begins_here for _, begins_here in documents]
                self._tokens += len(ids)
                return _Piece(ids, begins, epoch, state)

    def _begin_again(self) -> None:
        if self._whole_pass and self._tokens < self._needed:
            raise UserError(
                f"data: the training text of {self._source.name} has {self._tokens} tokens, fewer than the {self._needed} that one batch "
                "takes; give more text, or set train.batch_tokens lower"
            )
        self._epoch, self._state, self._whole_pass, self._tokens = self._epoch + 1, None, True, 0
        self._stream = self._source.open_rows(None)


class _Shuffled:
    """Windows of a source, shuffled block by block; the next block is read while one is handed out.

    Its state is where the block begins and how many of it are gone: the block is read again from there.
    """

    def __init__(self, source: StreamedSource, context_length: int, needed: int, seed: tuple[int, ...]) -> None:
        self._source, self._context_length, self._needed, self._seed = source, context_length, needed, seed
        self.load_state_dict({"block": 0, "given": 0, "place": None})

    def state_dict(self) -> dict[str, Any]:
        return {"block": self._block, "given": self._given, "place": self._place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._block, self._given, self._place = state["block"], state["given"], state["place"]
        self._windows: _Windows | None = None  # nothing is read before it is wanted
        self._now: list[_Window] = []
        self._later: list[_Window] = []

    @property
    def epoch(self) -> int:
        return self._place["epoch"] if self._place else 0

    def next(self) -> _Window:
        if self._windows is None:
            self._windows = _Windows(self._source, self._context_length, self._needed, self._place)
            self._now = [self._windows.next() for _ in range(BLOCK)]
            self._later_place = self._windows.place()
            self._later = [self._windows.next() for _ in range(self._given)]
            self._order = self._shuffle()
        window = self._now[self._order[self._given]]
        self._later.append(self._windows.next())
        self._given += 1
        if self._given == BLOCK:
            self._now, self._later = self._later, []
            self._block, self._given, self._place = self._block + 1, 0, self._later_place
            self._later_place = self._windows.place()
            self._order = self._shuffle()
        return window

    def _shuffle(self) -> np.ndarray:
        return np.random.default_rng((*self._seed, self._block)).permutation(BLOCK)


class StreamingBatches:
    """Batches of streams, in the order of their steps.

    All ranks read the whole of every stream and keep their part of each batch, so a run can go on with another number of ranks.

    Args:
        sources: one, or several that are mixed by their weights.
        context_length: T.
        sequences: B, of the global batch.
        seed: of the order.
        document_mask: whether rows say which document each token is of.
    """

    windows = 0
    """Not known."""
    tokens_per_epoch = 0
    """Not known."""

    def __init__(
        self, sources: Sequence[StreamedSource], context_length: int, sequences: int, seed: int, document_mask: bool = False
    ) -> None:
        self.context_length, self.sequences, self.document_mask = context_length, sequences, document_mask
        self._shares = Shares([source.weight for source in sources], seed)
        self._parts: list[_Shuffled] = []
        for number, source in enumerate(sources):
            rows = -(-sequences * int(self._shares.counts[number]) // BLOCK)  # of a batch, on average
            self._parts.append(_Shuffled(source, context_length, rows * context_length + 1, (seed, number)))
        self._next_step = 0

    @property
    def epoch(self) -> int:
        """How often the source that is furthest behind has been read to its end."""
        return min(part.epoch for part in self._parts)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Rank's part of the global batch `step`; steps that are left out are read and dropped.

        Raises:
            ValueError: the stream is past this step, or `world` does not divide B.
            UserError: a source has too few tokens, or cannot be read.
        """
        if step < self._next_step:
            raise ValueError(f"step {step} is past: this stream goes on at {self._next_step}; load the state of that step to go back")
        each = share_of_rank(self.sequences, world)
        for _ in range(self._next_step, step):
            self._draw()
        return self._made(self._draw()[rank * each : (rank + 1) * each])

    def _draw(self) -> list[_Window]:
        first = self._next_step * self.sequences
        parts, _ = self._shares.locate(np.arange(first, first + self.sequences))
        self._next_step += 1
        return [self._parts[part].next() for part in parts]

    def _made(self, windows: list[_Window]) -> Batch:
        rows = torch.from_numpy(np.stack([window.ids for window in windows]).astype(np.int64))
        documents = None
        if self.document_mask:
            borders = np.stack([window.begins for window in windows])[:, :-1]
            borders[:, 0] = False
            documents = torch.from_numpy(borders.cumsum(1, dtype=np.int64))
        return Batch(rows[:, :-1], rows[:, 1:], documents)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, behind the batch given last; JSON-able, without any text."""
        return {"step": self._next_step, "parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stood.

        Raises:
            ValueError: it had another number of sources.
        """
        if len(state["parts"]) != len(self._parts):
            raise ValueError(f"the state is of {len(state['parts'])} sources, and there are {len(self._parts)}")
        self._next_step = state["step"]
        for part, its_state in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(its_state)


def collect_held_out(source: StreamedSource, limit: int) -> Split:
    """The first held-out documents of a source, up to `limit` targets, which training never sees.

    Raises:
        UserError: no document is held out.
    """
    ids, begins, tokens, rows_read = [np.empty(0, np.uint32)], [], 0, 0
    stream = source.open_rows(None)
    while tokens <= limit and (rows := _read(stream)):
        rows_read += len(rows)
        for document, begins_here in _documents(source, rows, held_out=True):
            begins += [tokens] if begins_here else []
            ids.append(document)
            tokens += len(document)
    if not tokens:
        raise UserError(f"data.holdout: none of the {rows_read} documents of {source.name} is held out; set a larger share")
    text = np.concatenate(ids)[: limit + 1]
    return Split(TokenArray([text]), np.array([*(b for b in begins if b < len(text)), len(text)], dtype=np.uint64), None)
