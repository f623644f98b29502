"""The examples that a fine-tuned model is measured on: made as for training, with the model's own tokenizer, kept in memory."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from gpt.commands import EvaluateConfig
from gpt.data.examples import ExampleEncoder, ExampleSettings, recognise_format
from gpt.data.loader import Batch, ExampleRows
from gpt.data.shards import Split, TokenArray
from gpt.data.sources import ReadReport, open_source
from gpt.data.survey import survey
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError

_ROWS = 256  # encoded at a time


@dataclass(frozen=True)
class EncodedExamples:
    """Examples as rows of ids.

    Attributes:
        rows: several examples each, none seeing another.
        format: as it was recognised.
        examples: how many.
        tokens: that are scored.
        bytes: UTF-8 bytes of those.
        counts: truncated, dropped_no_target and the like.
    """

    rows: ExampleRows
    format: str
    examples: int
    tokens: int
    bytes: int
    counts: Counter[str]

    def batches(self, batch: int) -> Iterator[Batch]:
        """All rows in order; the last batch may be smaller."""
        for first in range(0, self.rows.windows, batch):
            yield self.rows.make(np.arange(first, min(first + batch, self.rows.windows)))


def read_examples(config: EvaluateConfig, tokenizer: Tokenizer, context_length: int) -> tuple[EncodedExamples, ReadReport]:
    """Read the examples to measure on: all, or those that a run with this data holds out.

    Args:
        config: what to read, and how.
        tokenizer: the model's.
        context_length: most tokens of an example.

    Raises:
        UserError: rows that cannot be read, are no examples of text, or leave nothing to score.
    """
    data, report = config.data, ReadReport()
    source = open_source(data, data.on_error)
    hold_out = survey(source, data.holdout, 0, examples=True).hold_out if config.part == "held_out" else None
    first = list(islice(source.rows(ReadReport()), _ROWS))
    kind = recognise_format(first, data.format)
    if kind in ("text_label", "tokens_tags"):
        raise UserError(f"data: rows of {kind} need a classification head, and this model continues text; look at them with gpt inspect")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        encoder = ExampleEncoder(folder, ExampleSettings(data.format, config.loss_on, data.too_long, context_length), kind, [])
        stream = source.rows(report)
        counts: Counter[str] = Counter()
        ids, labels, n_bytes = [], [], 0
        while rows := list(islice(stream, _ROWS)):
            for example in encoder([row for row in rows if hold_out is None or hold_out(row.name)]):
                counts.update(example.counts)
                if len(example.ids) and example.labels is not None:
                    ids.append(example.ids.astype(np.int64))
                    labels.append(example.labels.astype(np.int64))
                    n_bytes += example.bytes
    if not ids:
        left = ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))
        raise UserError(f"data: there are no{' held-out' if hold_out else ''} examples to score" + (f" ({left})" if left else ""))
    borders = np.cumsum([0, *map(len, ids)]).astype(np.uint64)
    split = Split(TokenArray([np.concatenate(ids)]), borders, TokenArray([np.concatenate(labels)]))
    packed = ExampleRows(split, context_length, packed=data.packing == "best_fit")
    return EncodedExamples(packed, kind, len(ids), packed.tokens_per_epoch, n_bytes, counts), report
