"""The examples that a fine-tuned model is measured on: made as for training, with the model's own tokenizer, kept in memory."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from gpt.commands import EvaluateConfig
from gpt.data.config import DataConfig
from gpt.data.deduplication import SeenDocuments
from gpt.data.encoding import Chunk, Reader, Work
from gpt.data.examples import ExampleEncoder, ExampleSettings, recognise_format
from gpt.data.loader import Batch, ExampleRows
from gpt.data.shards import Split, TokenArray
from gpt.data.sources import ReadReport, Source, open_source
from gpt.data.survey import HoldOut, survey
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.model.config import GPTConfig
from gpt.model.heads import describe
from gpt.typed import shown

_FORMAT_ROWS = 100  # whose fields tell the format
_FORMATS = {"sequence": "text_label", "tokens": "tokens_tags"}  # that a head of classes is measured on


@dataclass(frozen=True)
class EncodedExamples:
    """Examples as rows of ids.

    Attributes:
        rows: several examples each, none seeing another.
        format: as it was recognised.
        examples: how many.
        tokens: that are scored; of classes, how many.
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


def read_examples(
    config: EvaluateConfig, tokenizer: Tokenizer, context_length: int, model: GPTConfig
) -> tuple[EncodedExamples, ReadReport]:
    """Read the examples to measure on: all, or those that a run with this data holds out; filtered and redacted as the config says.

    Args:
        config: what to read, and how.
        tokenizer: the model's.
        context_length: most tokens of an example.
        model: whose head says what examples teach, and which classes there are.

    Raises:
        UserError: rows that cannot be read, are not for this head, name a class that it does not have, or leave nothing to score.
    """
    data, report, counts = config.data, ReadReport(), Counter()
    settings = ExampleSettings(data.format, config.loss_on, data.too_long, context_length, model.classes)
    if data.labels and data.labels != model.classes:
        raise UserError(f"data.labels={shown(data.labels)}: the model's head is {describe(model)}; leave it out")
    chunks: list[Chunk] = []
    formats: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder) / "tokenizer.json")
        for part in data.parts or [data]:
            source = open_source(part, data.on_error)
            formats.append(_format(source, data, model))
            encoder = ExampleEncoder(folder, settings, formats[-1], model.classes)
            chunks += _read_source(source, encoder, data, config.part == "held_out", report, counts)
    starts = [chunk.starts + before for chunk, before in zip(chunks, _before(chunks), strict=True)]
    borders = np.concatenate([*starts, [sum(len(chunk.ids) for chunk in chunks)]]).astype(np.uint64)
    if len(borders) == 1:
        left = ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))
        of = " held-out" * (config.part == "held_out")
        raise UserError(f"data: there are no{of} examples to score" + f" ({left})" * bool(left))
    ids, labels = (np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in ("ids", "labels"))
    split, shifted = Split(TokenArray([ids]), borders, TokenArray([labels])), model.head == "language_model"
    packed = ExampleRows(split, context_length, shifted=shifted, packed=data.packing == "best_fit")
    size = sum(chunk.n_bytes for chunk in chunks)
    return EncodedExamples(packed, " and ".join(dict.fromkeys(formats)), len(borders) - 1, packed.tokens_per_epoch, size, counts), report


def _format(source: Source, data: DataConfig, model: GPTConfig) -> str:
    first = list(islice(source.rows(ReadReport()), _FORMAT_ROWS))
    kind = recognise_format(first, data.format, data.on_error == "skip")
    wanted = _FORMATS.get(model.head)
    if wanted is not None and kind != wanted:
        raise UserError(f"data: its rows are of {kind}, and the model's head is {describe(model)}; give rows of {wanted}")
    if wanted is None and kind in _FORMATS.values():
        raise UserError(
            f"data: its rows are of the format {kind}, which needs a classification head, and this model continues text; "
            "train one on such rows with gpt finetune, or look at them with gpt inspect"
        )
    if kind == "preference":
        raise UserError(
            "data: its rows are of the format preference: how a model tells completions apart is measured against the one that it began "
            "as, which gpt finetune does at every validation (val_reward_accuracy); to score the chosen ones alone, give "
            "data.format=prompt_completion data.fields.completion=chosen"
        )
    return kind


def _read_source(
    source: Source, encoder: ExampleEncoder, data: DataConfig, held_out: bool, report: ReadReport, counts: Counter[str]
) -> list[Chunk]:
    """Examples of one source, made as for the shards; `report` and `counts` are added to."""
    skip = data.on_error == "skip"
    nothing = HoldOut(0.0, False, 0.0)
    hold_out = survey(source, data.holdout, 0, examples=True, skip=skip).hold_out if held_out else nothing
    seen = SeenDocuments(Path(":memory:")) if data.deduplicate == "exact" else None
    work = Work(encoder, sorted(data.redact), hold_out, "uint32", labelled=True, skip=skip)
    chunks = []
    for batch in Reader(source.rows(report), report, data.min_characters, seen, examples=True, skip=skip):
        made, counted = work(batch.rows)
        chunks.append(made["held_out" if held_out else "train"])
        counts.update(counted + batch.left_out)
    if refused := counts.pop("skipped_rows", 0):
        report.skipped_rows += refused
        report.first_skipped = report.first_skipped or f"those that are not of {encoder.format}"
    return chunks


def _before(chunks: Sequence[Chunk]) -> list[int]:
    """Tokens before each."""
    return np.cumsum([0, *(len(chunk.ids) for chunk in chunks)])[:-1].tolist()
