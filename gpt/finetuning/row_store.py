"""What has been computed of each row of the data, kept on disk: a file of rows of one shape, filled in any order and read again and again.

Rows are written and read as any file is: a full disk is an error and no crash, and what was read is no memory of this process. Beside the
rows stands a checksum of each: a row whose write was cut short, by a kill or a power failure, counts as missing. Processes of one machine
share the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt.errors import UserError

_META, _ROWS, _SUMS = "meta.json", "rows.bin", "checksums.bin"
_BLANK = 0  # the checksum of a row that is not there; one that happens to be 0 is stored as 1


def store_name(key: Mapping[str, Any]) -> str:
    """The name of the folder of rows that only this key describes."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def room_needed(rows: int, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes on disk of so many rows, checksums included."""
    return rows * (math.prod(shape) * dtype.itemsize + 4)


class RowStore:
    """Rows of tensors by number.

    Args:
        folder: of this store; made if it is not there.
        key: what the rows depend on: weights, data, settings. Plain values.
        rows: how many there may be.
        shape, dtype: of a row.

    Raises:
        UserError: the folder holds rows of another key.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], rows: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.folder, self.rows, self.shape, self.dtype = folder, rows, tuple(shape), dtype
        self._row_bytes = math.prod(shape) * dtype.itemsize
        meta = {"key": dict(key), "rows": rows, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
        folder.mkdir(parents=True, exist_ok=True)
        self._check(json.loads(json.dumps(meta)))
        self._files = [os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644) for name in (_ROWS, _SUMS)]
        for file, size in zip(self._files, (rows * self._row_bytes, 4 * rows), strict=True):
            if os.fstat(file).st_size != size:
                os.ftruncate(file, size)
        self._sums = np.frombuffer(mmap.mmap(self._files[1], 0, prot=mmap.PROT_READ), dtype=np.uint32)
        self._known = np.zeros(rows, dtype=bool)  # rows that this process has written, or has found to be whole

    def _check(self, meta: dict[str, Any]) -> None:
        file = self.folder / _META
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            found = None
        except ValueError:
            found = {}
        if found is not None and found != meta:
            raise UserError(f"{self.folder} was made from other weights, data or settings than this run's; remove it, and it is made anew")
        if found is None:
            aside = file.with_name(f".{_META}.{os.getpid()}")
            aside.write_text(json.dumps(meta, indent=1), encoding="utf-8")
            os.replace(aside, file)
        os.utime(file)  # when it was used last

    def holds(self, numbers: np.ndarray) -> bool:
        """Whether all these rows are there and whole; negative numbers are of padding, which is always there."""
        numbers = numbers[numbers >= 0]
        if not (self._sums[numbers] != _BLANK).all():
            return False
        for number in numbers[~self._known[numbers]].tolist():
            if _checksum(self._bytes(np.array([number]))[0]) != self._sums[number]:
                return False
            self._known[number] = True
        return True

    def read(self, numbers: np.ndarray) -> Tensor:
        """(n, *shape) on the CPU: the rows of these numbers, which `holds` has found; zeros for padding."""
        return torch.from_numpy(self._bytes(numbers)).view(self.dtype).view(len(numbers), *self.shape)

    def _bytes(self, numbers: np.ndarray) -> np.ndarray:
        """(n, bytes of a row) uint8; zeros for negative numbers."""
        rows = np.empty((len(numbers), self._row_bytes), dtype=np.uint8)
        for number, row in zip(numbers.tolist(), rows, strict=True):
            if number < 0:
                row[:] = 0
            else:
                _read(self._files[0], row.data, number * self._row_bytes)
        return rows

    def write(self, numbers: np.ndarray, rows: Tensor) -> None:
        """Keep rows (n, *shape), on the CPU, in the store's dtype, under these numbers; padding is left out.

        Raises:
            OSError: the disk is full.
        """
        assert rows.dtype == self.dtype, (rows.dtype, self.dtype)
        flat = rows.detach().contiguous().view(len(numbers), -1).view(torch.uint8).numpy()
        for number, row in zip(numbers.tolist(), flat, strict=True):
            if number < 0:
                continue
            _write(self._files[0], row.data, number * self._row_bytes)
            _write(self._files[1], np.uint32(_checksum(row)).tobytes(), 4 * number)
            self._known[number] = True

    def filled(self) -> int:
        """How many rows are there."""
        return int(np.count_nonzero(self._sums))

    def close(self) -> None:
        """Close the files; what was read stays."""
        for file in self._files:
            os.close(file)
        self._files = []


def make_room(parent: Path, name: str, size: int, limit: int) -> str | None:
    """Remove the stores in `parent` that were not used for longest until one of this size fits.

    Args:
        parent: the folder of all stores, in a folder each or several.
        name: of the one that is to fit; what it has on disk already counts as room.
        size: of it, in bytes.
        limit: of all stores, in bytes.

    Returns:
        None, or why it does not fit, in words.
    """
    if size > limit:
        return f"it would take {size / 1e9:.1f} GB, more than the {limit / 1e9:g} GB that it may"
    parent.mkdir(parents=True, exist_ok=True)
    others = sorted((p for p in parent.iterdir() if p.name != name and p.is_dir()), key=_last_used)
    sizes = {p: _on_disk(p) for p in others}
    need = size - _on_disk(parent / name)
    reserve = size // 20  # of a disk that others write to as well
    while others and (sum(sizes[p] for p in others) + size > limit or need + reserve > shutil.disk_usage(parent).free):
        shutil.rmtree(others[0], ignore_errors=True)  # a run that uses it has its files open, and goes on with them
        others.pop(0)
    free = shutil.disk_usage(parent).free
    return f"it would take {size / 1e9:.1f} GB, and {parent} has {free / 1e9:.1f} GB left" if need + reserve > free else None


def _last_used(folder: Path) -> float:
    return max((file.stat().st_mtime for file in folder.rglob(_META)), default=0.0)


def _on_disk(folder: Path) -> int:
    return sum(512 * file.stat().st_blocks for file in folder.rglob("*") if file.is_file())


def _checksum(row: np.ndarray) -> int:
    return zlib.crc32(row.data) or 1


def _read(file: int, view: memoryview, offset: int) -> None:
    while view:
        read = os.preadv(file, [view], offset)
        if not read:
            raise OSError(errno.EIO, "the file of rows was cut short")
        view, offset = view[read:], offset + read


def _write(file: int, data: memoryview | bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
