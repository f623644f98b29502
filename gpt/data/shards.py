"""Token shards on disk: flat memory-mapped arrays of ids with an index, written aside and renamed when whole.

    <cache>/<key>/index.json  tokenizer.json  train-00000.bin  held_out-00000.bin

The key is a hash of the text, the tokenizer's settings and VERSION, so a stale cache cannot be read; a folder without its
index is not a cache.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from gpt.errors import UserError

VERSION = 2
SHARD_TOKENS = 1 << 28  # 512 MiB of uint16 a file


@dataclass
class Index:
    """What a folder of shards holds."""

    version: int = VERSION
    dtype: str = "uint16"
    vocab_size: int = 0
    tokenizer: str = ""
    """The tokenizer's fingerprint."""
    source: str = ""
    """The text's fingerprint."""
    tokens: dict[str, list[int]] = field(default_factory=dict)
    """Split -> tokens in each of its shards."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Split -> bytes of text."""
    documents: dict[str, int] = field(default_factory=dict)
    """Split -> documents."""
    notes: list[str] = field(default_factory=list)
    """What reading the text met."""


class ShardWriter:
    """Appends ids to the shards of one split."""

    def __init__(self, directory: Path, split: str, dtype: str) -> None:
        self.directory, self.split, self.dtype = directory, split, np.dtype(dtype)
        self.sizes: list[int] = []

    def append(self, pieces: Iterable[np.ndarray]) -> None:
        """Write ids, starting a new shard where the last is full."""
        for piece in pieces:
            while len(piece):
                if not self.sizes or self.sizes[-1] == SHARD_TOKENS:
                    self.sizes.append(0)
                head = piece[: SHARD_TOKENS - self.sizes[-1]]
                with (self.directory / f"{self.split}-{len(self.sizes) - 1:05d}.bin").open("ab") as file:
                    file.write(head.astype(self.dtype).tobytes())
                self.sizes[-1] += len(head)
                piece = piece[len(head) :]


class TokenArray:
    """A split's ids as one long read-only array over memory-mapped shards."""

    def __init__(self, shards: list[np.ndarray]) -> None:
        self.shards = shards
        self.starts = np.cumsum([0, *(len(s) for s in shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(len(starts), length) int64: the ids from each start on, across shards if need be."""
        rows = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(rows, starts, strict=True):
            filled, position = 0, int(start)
            while filled < length:
                shard = int(np.searchsorted(self.starts, position, side="right")) - 1
                piece = self.shards[shard][position - self.starts[shard] :][: length - filled]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
                position += len(piece)
        return rows


def write_index(directory: Path, index: Index) -> None:
    """Write index.json."""
    (directory / "index.json").write_text(json.dumps(asdict(index), indent=1))


def read_index(directory: Path) -> Index | None:
    """The index of a folder of shards, or None if there is no usable one."""
    try:
        index = Index(**json.loads((directory / "index.json").read_text()))
        return index if index.version == VERSION else None
    except (OSError, ValueError, TypeError):
        return None


def open_split(directory: Path, index: Index, split: str) -> TokenArray:
    """Map a split's shards.

    Raises:
        UserError: a shard that is missing or has another size than the index says.
    """
    shards = []
    for number, tokens in enumerate(index.tokens[split]):
        path = directory / f"{split}-{number:05d}.bin"
        size = path.stat().st_size if path.is_file() else -1
        if size != tokens * np.dtype(index.dtype).itemsize:
            raise UserError(f"{path} is damaged ({size} bytes, {tokens} tokens expected); delete {directory} and it is made again")
        shards.append(np.memmap(path, dtype=index.dtype, mode="r"))
    return TokenArray(shards)


@contextmanager
def building(directory: Path) -> Iterator[Path | None]:
    """Build `directory` in a folder aside that takes its name when the block ends well.

    Only one process builds; another waits for it. Yields None if the folder is there already.

    Raises:
        UserError: it cannot be written, or the disk is full; nothing is left behind.
    """
    from filelock import FileLock

    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if read_index(directory) is not None:
                yield None
                return
            shutil.rmtree(directory, ignore_errors=True)
            aside = directory.with_name(f".{directory.name}.building")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            try:
                yield aside
                os.replace(aside, directory)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot write {directory.parent}: {error.strerror or error} (set data.cache_dir to another folder)"
        ) from error
