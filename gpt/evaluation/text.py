"""The text that a model is measured on: read as for training, cut by the model's own tokenizer, kept in memory as ids."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt.commands import EvaluateConfig
from gpt.data.config import DataConfig
from gpt.data.deduplication import SeenDocuments
from gpt.data.encoding import Reader
from gpt.data.redaction import Redactor
from gpt.data.shards import TokenArray
from gpt.data.sources import ReadReport, Source, open_source
from gpt.data.survey import survey
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError

COMPRESSED_BYTES = 1 << 24  # xz takes a second or more for each of the first 16 MiB


@dataclass(frozen=True)
class EncodedText:
    """A text as ids: each document after an end-of-text token, where the tokenizer has one.

    Attributes:
        tokens: all but the first are scored.
        documents: in it.
        bytes: UTF-8 bytes of the tokens that are scored.
        text: those bytes, at most COMPRESSED_BYTES of them, for other compressors.
    """

    tokens: TokenArray
    documents: int
    bytes: int
    text: bytes


def read_texts(config: EvaluateConfig, report: ReadReport) -> list[str]:
    """The documents to measure on: those that a run with this data holds out, or all; filtered and redacted as the config says.

    Args:
        config: which data, and which part of it.
        report: what is met while reading is added to it.

    Raises:
        UserError: there is no text, or it cannot be read.
    """
    data, held_out = config.data, config.part == "held_out"
    sources = [open_source(part, data.on_error) for part in (data.parts if data.source == "mixture" else [data])]
    texts = [text for source in sources for text in _read_source(source, data, held_out, report)]
    if not texts:
        left_out = [f"{n} {what}" for n, what in ((report.empty_files, "empty"), (report.binary_files, "binary")) if n]
        where = ", ".join(source.name for source in sources)
        raise UserError(f"data: there is no{' held-out' * held_out} text in {where}" + f" ({', '.join(left_out)})" * bool(left_out))
    return texts


def _read_source(source: Source, data: DataConfig, held_out: bool, report: ReadReport) -> list[str]:
    hold_out = survey(source, data.holdout, 0, skip=data.on_error == "skip").hold_out if held_out else None
    seen = SeenDocuments(Path(":memory:")) if data.deduplicate == "exact" else None
    redactor, counts = Redactor(data.redact), Counter()
    texts: list[str] = []
    for batch in Reader(source.rows(report), report, data.min_characters, seen, examples=False, skip=data.on_error == "skip"):
        for row in batch.rows:
            text = redactor.text(row.values["text"], counts)
            if hold_out is not None and hold_out.within:
                texts += [end for end in hold_out.cut(text)[1:] if end]
            elif hold_out is None or hold_out(row.held_out_key):
                if row.piece:
                    texts[-1] += text
                else:
                    texts.append(text)
    report.split_within_files |= hold_out is not None and hold_out.within
    return texts


def encode_texts(texts: list[str], tokenizer: Tokenizer, vocab_size: int, max_tokens: int = 0) -> EncodedText:
    """Cut texts into ids.

    Args:
        texts: the documents.
        tokenizer: the model's.
        vocab_size: ids that the model knows.
        max_tokens: read no further than is needed to score so many; 0: all.

    Raises:
        UserError: nothing to score, or ids that the model does not know.
    """
    tokenizer = Tokenizer(tokenizer.backend, check="".join(texts[:50])[:200_000])  # encodes faster where it can
    dtype = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32
    separator = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], dtype=dtype)
    lengths, shards, read = tokenizer.byte_lengths(), [], []
    wanted, found = (max_tokens + 1) if max_tokens else float("inf"), 0
    for start in range(0, len(texts), 64):
        for text, ids in zip(texts[start : start + 64], tokenizer.encode_batch(texts[start : start + 64]), strict=True):
            if found < wanted:
                read.append(text)
                shards.append(np.concatenate((separator, ids.astype(dtype))))
                found += len(shards[-1])
        if found >= wanted:
            break
    if found < 2:
        raise UserError(f"data: {found} token{'s' * (found != 1)} of text; there is nothing to predict")
    if (largest := max(int(ids.max()) for ids in shards if len(ids))) >= vocab_size:
        raise UserError(f"model: its tokenizer makes id {largest}, and the model knows {vocab_size}; they do not belong together")
    first = next(int(ids[0]) for ids in shards if len(ids))
    skipped = 0 if len(separator) else int(lengths[first])  # nothing stands before it that could predict it
    n_bytes = sum(len(text.encode()) for text in read) - skipped
    if found > wanted:
        keep = len(shards[-1]) - (found - int(wanted))
        n_bytes -= int(lengths[shards[-1][keep:]].sum())
        shards[-1] = shards[-1][:keep]
    return EncodedText(TokenArray(shards), len(read), n_bytes, _head(read, skipped + min(n_bytes, COMPRESSED_BYTES))[skipped:])


def _head(texts: list[str], size: int) -> bytes:
    """The first `size` bytes."""
    parts: list[bytes] = []
    for text in texts:
        if size <= 0:
            break
        parts.append(text[:size].encode()[:size])
        size -= len(parts[-1])
    return b"".join(parts)
