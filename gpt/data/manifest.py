"""The manifest of prepared data: where it comes from, under which licence, what was left out or replaced, and hashes of what remained.

It stands beside the shards as manifest.json, and the trainer copies it into every checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt.data.config import DataConfig, TokenizerConfig
from gpt.data.shards import SPLITS, Index
from gpt.data.sources import ReadReport
from gpt.data.tokenizer import Tokenizer

VERSION = 1


def describe_tokenizer(config: TokenizerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What made the ids."""
    return asdict(config) | {"vocab_size": tokenizer.vocab_size, "hash": tokenizer.fingerprint()}


def describe_preparation(data: DataConfig, holdout_by: str) -> dict[str, Any]:
    """What was done to the documents of a source before they became ids; `holdout_by`: of the source."""
    return {
        "holdout": data.holdout, "holdout_by": holdout_by, "min_characters": data.min_characters, "deduplicate": data.deduplicate,
        "redact": sorted(data.redact),
    }  # fmt: skip


def describe_part(
    source: dict[str, Any], data: DataConfig, holdout_by: str, index: Index, counts: Counter[str], report: ReadReport
) -> dict[str, Any]:
    """One source: what it says of itself, how it was prepared, what came of it."""
    splits = {
        split: {"documents": index.documents[split], "tokens": sum(index.tokens[split]), "bytes": index.bytes[split]} for split in SPLITS
    }
    tokens, size = sum(s["tokens"] for s in splits.values()), sum(s["bytes"] for s in splits.values())
    return source | {
        "fingerprint": index.source,
        "prepared": describe_preparation(data, holdout_by),
        "splits": splits,
        "bytes_per_token": round(size / tokens, 4) if tokens and index.kind == "text" else None,  # bytes of examples are of what is learned
        "counts": {
            "files": report.files, "empty_files": report.empty_files, "binary_files": report.binary_files,
            "invalid_utf8_files": report.invalid_utf8_files, "invalid_utf8_characters": report.invalid_utf8_characters,
            "skipped_rows": report.skipped_rows,
        } | dict(sorted(counts.items())),
        "notes": index.notes,
        "crc32": {name: f"{file['crc32']:08x}" for name, file in sorted(index.files.items())},
    }  # fmt: skip


def combine(parts: list[dict[str, Any]], tokenizer: dict[str, Any], kind: str, classes: list[str]) -> dict[str, Any]:
    """The manifest of one source, or of a mixture's."""
    return {"version": VERSION, "kind": kind, "classes": classes, "tokenizer": tokenizer, "sources": parts}


def read_manifest(directory: Path) -> dict[str, Any]:
    """manifest.json of a folder of shards, whose checksum has been checked."""
    return json.loads((directory / "manifest.json").read_text(encoding="utf-8"))


def summary(index: Index, counts: Counter[str], seconds: float, within: bool = False) -> str:
    """What was prepared, in a line; `within`: a document has a part on either side of the split."""
    documents = (max if within else sum)(index.documents.values())
    size, tokens = sum(index.bytes.values()), sum(map(sum, index.tokens.values()))
    made = f"{tokens / 1e6:.1f}M" if tokens >= 1_000_000 else f"{tokens:,}"
    if index.kind == "text":
        ratio = f" ({size / tokens:.2f} bytes per token)" if tokens else ""
        what = f"{size / 1e6:.1f} MB in {documents:,} documents -> {made} tokens{ratio} in {seconds:.0f} s"
    else:
        what = f"{documents:,} examples -> {made} tokens in {seconds:.0f} s"
    left_out, redacted, others = [], [], []
    for name, n in sorted((name, n) for name, n in counts.items() if n):
        if name in ("duplicates", "near_empty"):
            left_out.append(f"{n:,} {name.replace('_', '-')}")
        elif name.startswith("redacted_"):
            redacted.append(f"{n:,} {name.removeprefix('redacted_')}")
        else:
            others.append(f"{n:,} {name.replace('_', ' ')}")
    if left_out:
        what += f"; left out: {', '.join(left_out)}"
    if redacted:
        what += f"; redacted: {', '.join(redacted)}"
    return "; ".join((what, *others))
