"""Token shards on disk: flat memory-mapped arrays of ids with an index, written aside and renamed when whole.

    <cache>/data/<key>/index.json  manifest.json  tokenizer.json  train-00000.bin  train-documents.bin  held_out-...
                       train-00000.labels.bin (examples)  verified.json (which files' checksums have been checked)

The key is a hash of the source, the settings and VERSION, so a stale cache cannot be read; a folder without its index is not a cache.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from gpt.errors import UserError

VERSION = 3
SHARD_TOKENS = 1 << 28  # 512 MiB of uint16 a file
SPLITS = ("train", "held_out")
_READ_BYTES = 1 << 24


@dataclass
class Index:
    """What a folder of shards holds."""

    version: int = VERSION
    dtype: str = "uint16"
    vocab_size: int = 0
    tokenizer: str = ""
    """The tokenizer's fingerprint."""
    source: str = ""
    """The source's fingerprint."""
    kind: str = "text"
    """text (for pretraining), or of examples: language_model, text_label, tokens_tags, preference."""
    classes: list[str] = field(default_factory=list)
    """text_label, tokens_tags: what the labels stand for."""
    labelled: bool = False
    """Whether labels stand beside the ids."""
    tokens: dict[str, list[int]] = field(default_factory=dict)
    """Split -> tokens in each of its shards."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Split -> bytes of text that the learned tokens stand for."""
    documents: dict[str, int] = field(default_factory=dict)
    """Split -> documents or examples."""
    notes: list[str] = field(default_factory=list)
    """What reading the source met."""
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    """File -> its "bytes" and "crc32"."""


class TokenArray:
    """Ids, or labels, as one long read-only array over memory-mapped shards."""

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


@dataclass
class Split:
    """One side of a prepared source: D documents or examples."""

    tokens: TokenArray
    documents: np.ndarray
    """(D + 1,) uint64, memory-mapped: where each document begins, and the end."""
    labels: TokenArray | None
    """int32 beside the ids: what each token is to be learned as, IGNORE_LABEL where nothing is. None: every token is learned."""


class ShardWriter:
    """Appends documents to the shards of one split, and goes on where `state`, of an earlier writer, stands.

    Raises:
        ValueError: `state` speaks of files that are not there, or shorter.
    """

    def __init__(self, directory: Path, split: str, dtype: str, labelled: bool = False, state: dict[str, Any] | None = None) -> None:
        self.directory, self.split, self.dtype, self.labelled = directory, split, np.dtype(dtype), labelled
        state = state or {"sizes": [], "documents": 0, "bytes": 0, "files": {}}
        self.sizes: list[int] = list(state["sizes"])
        self.documents: int = state["documents"]
        self.bytes: int = state["bytes"]
        self.files: dict[str, dict[str, int]] = {name: dict(file) for name, file in state["files"].items()}
        self._open: dict[str, FileIO] = {}
        for path in directory.glob(f"{split}-*.bin"):
            if path.name not in self.files:
                path.unlink()
        for name, file in self.files.items():
            path = directory / name
            if not path.is_file() or path.stat().st_size < file["bytes"]:
                raise ValueError(f"{path} is shorter than it was")
            os.truncate(path, file["bytes"])

    @property
    def tokens(self) -> int:
        """Written so far."""
        return sum(self.sizes)

    def append(self, ids: np.ndarray, starts: np.ndarray, n_bytes: int, labels: np.ndarray | None = None) -> None:
        """Write ids, beginning a new shard where the last is full.

        Args:
            ids: (N,), of any number of documents.
            starts: where in `ids` documents begin; what stands before the first belongs to the document before.
            n_bytes: of text that they stand for.
            labels: (N,), where the shards have them.
        """
        self._write(f"{self.split}-documents.bin", (starts.astype(np.uint64) + np.uint64(self.tokens)).tobytes())
        self.documents += len(starts)
        self.bytes += n_bytes
        done = 0
        while done < len(ids):
            if not self.sizes or self.sizes[-1] == SHARD_TOKENS:
                self._close()
                self.sizes.append(0)
            end = done + SHARD_TOKENS - self.sizes[-1]
            stem = f"{self.split}-{len(self.sizes) - 1:05d}"
            head = ids[done:end]
            self._write(f"{stem}.bin", head.astype(self.dtype).tobytes())
            if self.labelled:
                assert labels is not None
                self._write(f"{stem}.labels.bin", labels[done:end].astype(np.int32).tobytes())
            self.sizes[-1] += len(head)
            done += len(head)

    def finish(self) -> None:
        """Write the end of the last document; nothing can be appended after it."""
        self._write(f"{self.split}-documents.bin", np.array([self.tokens], dtype=np.uint64).tobytes())
        self.sync()
        self._close()

    def sync(self) -> None:
        """Bring to the disk what has been written."""
        for file in self._open.values():
            os.fsync(file.fileno())

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, for a writer that goes on after `sync`; JSON-able."""
        return {
            "sizes": list(self.sizes), "documents": self.documents, "bytes": self.bytes,
            "files": {name: dict(file) for name, file in self.files.items()},
        }  # fmt: skip

    def _write(self, name: str, data: bytes) -> None:
        if not data and name in self.files:
            return
        if name not in self._open:
            self._open[name] = FileIO(self.directory / name, "ab")
        view = memoryview(data)
        while view:  # a disk that is nearly full takes a part
            view = view[self._open[name].write(view) :]
        file = self.files.setdefault(name, {"bytes": 0, "crc32": 0})
        file["bytes"] += len(data)
        file["crc32"] = zlib.crc32(data, file["crc32"])

    def _close(self) -> None:
        self.sync()
        while self._open:
            self._open.popitem()[1].close()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that it is there whole, or as it was before."""
    aside = path.with_name(f"{path.name}.new")
    with aside.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1))
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_index(directory: Path, index: Index) -> None:
    """Write index.json."""
    write_json(directory / "index.json", asdict(index))


def read_index(directory: Path) -> Index | None:
    """The index of a folder of shards, or None if there is no usable one."""
    try:
        index = Index(**json.loads((directory / "index.json").read_text(encoding="utf-8")))
        return index if index.version == VERSION else None
    except (OSError, ValueError, TypeError):
        return None


def checksum(path: Path) -> dict[str, int]:
    """A file's "bytes" and "crc32"."""
    found = {"bytes": 0, "crc32": 0}
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            found["bytes"] += len(data)
            found["crc32"] = zlib.crc32(data, found["crc32"])
    return found


def check_files(directory: Path, index: Index, checksums: bool = False) -> None:
    """See that every file of a folder is as the index says: its size always, its checksum if the file is new here, or with `checksums`.

    Raises:
        UserError: a file is damaged or missing.
    """
    known: object = None
    with suppress(OSError, ValueError):
        known = json.loads((directory / "verified.json").read_text(encoding="utf-8"))
    known = known if isinstance(known, dict) else {}
    seen: dict[str, list[int]] = {}
    for name, expected in index.files.items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else -1
        if size != expected["bytes"]:
            what = "missing" if size < 0 else f"{size} bytes, {expected['bytes']} expected"
            raise UserError(f"{path} is damaged ({what}); delete {directory} and it is made again")
        seen[name] = [size, path.stat().st_mtime_ns]
        if (checksums or known.get(name) != seen[name]) and checksum(path) != expected:
            raise UserError(f"{path} is damaged (its checksum is not that of the index); delete {directory} and it is made again")
    if seen != known:
        mark_verified(directory, index)


def mark_verified(directory: Path, index: Index) -> None:
    """Remember that the files are as the index says, until one has another size or time."""
    stats = {name: (directory / name).stat() for name in index.files}
    with suppress(OSError):  # a cache that one may only read is checked every time
        write_json(directory / "verified.json", {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()})


def open_split(directory: Path, index: Index, split: str) -> Split:
    """Map a split's shards, whose files `check_files` has seen."""
    stems = [f"{split}-{number:05d}" for number in range(len(index.tokens[split]))]
    tokens = TokenArray([np.memmap(directory / f"{stem}.bin", dtype=index.dtype, mode="r") for stem in stems])
    labels = (
        TokenArray([np.memmap(directory / f"{stem}.labels.bin", dtype=np.int32, mode="r") for stem in stems]) if index.labelled else None
    )
    return Split(tokens, np.memmap(directory / f"{split}-documents.bin", dtype=np.uint64, mode="r"), labels)


@contextmanager
def building(directory: Path, is_whole: Callable[[Path], bool]) -> Iterator[Path | None]:
    """Build `directory` in a folder aside that takes its name when the block ends well.

    Only one process builds; another waits for it. Yields None if the folder is there already. The folder aside may hold what an earlier
    process had done when it was killed or interrupted.

    Raises:
        UserError: it cannot be written, or the disk is full; nothing is left behind.
    """
    from filelock import FileLock

    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if is_whole(directory):
                yield None
                return
            shutil.rmtree(directory, ignore_errors=True)
            aside = directory.with_name(f".{directory.name}.building")
            aside.mkdir(exist_ok=True)
            try:
                yield aside
                os.replace(aside, directory)
            except Exception:
                shutil.rmtree(aside, ignore_errors=True)
                raise
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot write {directory.parent}: {error.strerror or error} (set data.cache_dir to another folder)"
        ) from error
