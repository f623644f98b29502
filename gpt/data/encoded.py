"""What a document or an example becomes on its way into the shards: ids, labels and counts.

Encoders (text: data/encoding.py, examples: data/examples.py) make it, in worker processes that never load torch;
data/shards.py stores it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from gpt.data.sources import Row

IGNORE_LABEL = -100  # nothing is learned at such a token; the value that torch's cross entropy leaves out


@dataclass
class Encoded:
    """One document or example: `ids` (N,) uint32, `labels` (N,) int32 or None (every token is learned).

    Attributes:
        bytes: UTF-8 bytes that the learned tokens stand for.
        held_out_key: whose hash decides the side of the split, unless `held_out` does.
        counts: added to the manifest's counts ({"truncated": 1}); may stand on an Encoded without ids: a row that was dropped.
        continues: more of the document before, whose text came in pieces.
    """

    name: str
    held_out_key: str
    ids: np.ndarray
    labels: np.ndarray | None
    bytes: int
    counts: dict[str, int] = field(default_factory=dict)
    held_out: bool | None = None
    continues: bool = False


class Encoder(Protocol):
    """Makes ids of rows; picklable, sent to every worker process once."""

    def __call__(self, rows: Sequence[Row]) -> list[Encoded]:
        """In the order of the rows; a row may give none (dropped) or several (split)."""
        ...
