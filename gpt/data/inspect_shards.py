"""A look into a folder of prepared tokens: whether it is whole, its statistics, and some of its documents as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gpt.data.encoded import IGNORE_LABEL
from gpt.data.manifest import read_manifest
from gpt.data.shards import SPLITS, VERSION, Index, Split, check_files, open_split, read_index
from gpt.data.tokenizer import Tokenizer, load_tokenizer
from gpt.errors import UserError

_SHOWN_CHARACTERS = 600  # of a document


def inspect_shards(folder: str, samples: int, cache_dir: str) -> None:
    """Check every checksum, then print statistics and `samples` documents, evenly spaced over the training split.

    Args:
        folder: of shards.
        samples: documents to print.
        cache_dir: where folders of shards are usually kept, for the message that says so.

    Raises:
        UserError: it is no such folder, of another version, or damaged.
    """
    from rich.console import Console

    directory = Path(folder).expanduser()
    index = _read_index(directory, Path(cache_dir).expanduser() / "data")
    check_files(directory, index, checksums=True)
    splits = {split: open_split(directory, index, split) for split in SPLITS}
    tokenizer = load_tokenizer(directory)
    console = Console(highlight=False, soft_wrap=True)
    size = sum(file["bytes"] for file in index.files.values())
    console.print(f"{directory}: {len(index.files)} files, {size / 1e6:.1f} MB, all checksums are right", markup=False)
    console.print(_statistics(index, splits))
    console.print(_origin(read_manifest(directory), index), markup=False)
    for note in index.notes:
        console.print(f"note: {note}", markup=False)
    documents = index.documents["train"]
    for number in np.linspace(0, documents - 1, min(samples, documents)).round().astype(int).tolist():
        console.print(f"\n--- training document {number:,}: {_sample(splits['train'], number, tokenizer, index)}", markup=False)


def _read_index(directory: Path, usual: Path) -> Index:
    index = read_index(directory)
    if index is not None:
        return index
    try:
        version = json.loads((directory / "index.json").read_text(encoding="utf-8"))["version"]
    except (OSError, ValueError, KeyError, TypeError):
        known = sorted((p.parent for p in usual.glob("*/index.json")), key=lambda p: p.stat().st_mtime) if usual.is_dir() else []
        there = f"the newest is {known[-1]}" if known else f"there are none in {usual} yet: gpt prepare makes them"
        raise UserError(f"inspect={directory} is not a folder of prepared tokens (it has no index.json); {there}") from None
    if version == VERSION:
        raise UserError(f"{directory / 'index.json'} is damaged; delete {directory} and it is made again")
    raise UserError(
        f"inspect={directory} was made by another version of gpt (index version {version}, this one reads {VERSION}); prepare it again"
    )


def _statistics(index: Index, splits: dict[str, Split]) -> Any:
    from rich.table import Table

    table = Table("", *splits)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in zip(_FIGURES, zip(*(_figures(index, name, split) for name, split in splits.items()), strict=True), strict=True):
        if any(values):
            table.add_row(name, *values)
    return table


_FIGURES = (
    "documents", "tokens", "learned tokens", "bytes", "bytes per token",
    "document length: 5 % below", "document length: median", "document length: 95 % below", "document length: most tokens",
)  # fmt: skip


def _figures(index: Index, name: str, split: Split) -> list[str]:
    """In the order of _FIGURES; empty where a split has no such figure."""
    tokens, learned = len(split.tokens), None
    if split.labels is not None:
        learned = sum(int(np.count_nonzero(shard != IGNORE_LABEL)) for shard in split.labels.shards)
    lengths = np.diff(split.documents)
    found = np.percentile(lengths, (5, 50, 95, 100)) if len(lengths) else np.zeros(4)
    ratio = index.bytes[name] / max(1, tokens if learned is None else learned)
    return [
        f"{index.documents[name]:,}", f"{tokens:,}", "" if learned is None else f"{learned:,}", f"{index.bytes[name]:,}",
        "" if index.classes else f"{ratio:.2f}", *(f"{round(n):,}" for n in found),
    ]  # fmt: skip


def _origin(manifest: dict[str, Any], index: Index) -> str:
    """Where it comes from and what was left out, a line each."""
    source = ", ".join(
        f"{key}={value}" for key, value in manifest.items() if key in ("source", "paths", "name", "config", "split") and value
    )
    lines = [f"source: {source}; licence: {manifest.get('licence') or 'not given'}"]
    lines.append(f"kind: {index.kind}" + (f", classes: {', '.join(index.classes)}" if index.classes else ""))
    lines.append(f"ids: {index.dtype}, {index.vocab_size:,} in the vocabulary, tokenizer {index.tokenizer}")
    counts = {name: n for name, n in manifest["counts"].items() if n}
    lines.append("counts: " + ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items()))
    return "\n".join(lines)


def _sample(split: Split, number: int, tokenizer: Tokenizer, index: Index) -> str:
    """A document's length and text; of an example also what is learned of it."""
    start, end = (int(n) for n in split.documents[number : number + 2])
    ids = split.tokens.windows(np.array([start]), end - start)[0]
    text = f"{end - start:,} tokens\n{_shortened(tokenizer.decode(ids.tolist()))}"
    if split.labels is None:
        return text
    labels = split.labels.windows(np.array([start]), end - start)[0]
    learned = labels[labels != IGNORE_LABEL].tolist()
    if index.classes:
        return f"{text}\n    learned: {_shortened(' '.join(index.classes[label] for label in learned))}"
    return f"{text}\n    learned: {_shortened(tokenizer.decode(learned))}"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} [...]"
