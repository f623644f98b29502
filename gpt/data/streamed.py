"""A corpus that is read and cut into ids while training: its tokenizer, its batches, and a held-out part kept in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from gpt.data.config import DataConfig, TokenizerConfig
from gpt.data.encoded import Encoded
from gpt.data.encoding import TextEncoder
from gpt.data.manifest import combine, describe_preparation, describe_tokenizer
from gpt.data.plan import PartPlan, Plan, make_plan
from gpt.data.prepare import Corpus, Part, cache_directory
from gpt.data.redaction import Redactor
from gpt.data.shards import Index, Split, TokenArray
from gpt.data.sources import ReadReport, Row
from gpt.data.streaming import StreamedSource, StreamingBatches, collect_held_out
from gpt.data.survey import text_of
from gpt.errors import UserError


def prepare_streams(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    context_length: int,
    sequences: int,
    seed: int,
    held_out_tokens: int,
    say: Callable[[str], None],
) -> tuple[Corpus, StreamingBatches]:
    """Batches of sources that are read as they come, and what goes with them.

    Args:
        data, tokenizer: what to read and how to cut it.
        context_length: T.
        sequences: of a batch.
        seed: of the order.
        held_out_tokens: most tokens of held-out text, over all parts.
        say: takes progress messages.

    Returns:
        A corpus whose parts have held-out text alone, and the batches to train on.

    Raises:
        UserError: no text, too little held-out text, text that cannot be read, a tokenizer that cannot be made.
    """
    plan = make_plan(data, tokenizer, cache_directory(data), say, None)
    sources = [_streamed(part, plan, data, ReadReport()) for part in plan.parts]
    parts = []
    for source, part in zip(sources, plan.parts, strict=True):
        say(f"{source.name}: read and cut into ids while training")
        report = ReadReport()
        limit = max(context_length, held_out_tokens // len(sources))
        held_out = collect_held_out(_held_out_rows(_streamed(part, plan, data, report), part), limit)
        for note in report.warnings():
            say(f"note: {note}")
        if len(held_out.tokens) < context_length + 1:
            raise UserError(
                f"data: the held-out text of {source.name} has {len(held_out.tokens)} tokens, fewer than model.context_length="
                f"{context_length} and one more; set data.holdout higher, or give more text"
            )
        nothing = Split(TokenArray([]), np.zeros(1, np.uint64), None)
        index = Index(vocab_size=plan.tokenizer.vocab_size, tokenizer=plan.tokenizer.fingerprint(), source=part.fingerprint)
        parts.append(Part(source.name, part.weight, nothing, held_out, index))
    described = [
        part.source.describe()
        | {"name": part.source.name, "weight": part.weight, "fingerprint": part.fingerprint, "streamed": True}
        | {"prepared": describe_preparation(data, part.config.holdout_by)}
        for part in plan.parts
    ]
    manifest = combine(described, describe_tokenizer(tokenizer, plan.tokenizer), "text", [])
    corpus = Corpus(plan.tokenizer, parts, manifest, "text", [])
    return corpus, StreamingBatches(sources, context_length, sequences, seed, data.document_mask)


def _streamed(part: PartPlan, plan: Plan, data: DataConfig, report: ReadReport) -> StreamedSource:
    encoder = TextEncoder(str(plan.directory), plan.check, part.hold_out)
    return StreamedSource(part.source.name, partial(part.source.rows, report), partial(_encode, encoder, data), part.hold_out, part.weight)


def _held_out_rows(source: StreamedSource, part: PartPlan) -> StreamedSource:
    """The source for its held-out documents alone: the others, most of them, need not be cut into ids to find those."""
    if part.hold_out.within:
        return source
    return replace(source, encode=lambda rows: source.encode([row for row in rows if part.hold_out(row.held_out_key)]))


def _encode(encoder: TextEncoder, data: DataConfig, rows: Sequence[Row]) -> list[Encoded]:
    """Rows to documents as for the shards: the near-empty left out, secrets replaced, cut into ids."""
    redactor, counts = Redactor(data.redact), Counter()
    kept = []
    for row in rows:
        text = text_of(row)
        if row.piece or len(text.strip()) >= data.min_characters:
            kept.append(replace(row, values={"text": redactor.text(text, counts) if data.redact else text}))
    return encoder(kept)
