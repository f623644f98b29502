"""Which files a source reads, and their bytes: files, folders, globs, URLs that fsspec knows, channels of a SageMaker job.

Compressed files are read as they are. Whatever goes wrong is said in one sentence that names the file.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, cast

from gpt.errors import UserError
from gpt.typed import nearest

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

CHANNELS = "/opt/ml/input/data"  # https://docs.aws.amazon.com/sagemaker/latest/dg/amazon-sagemaker-toolkits.html
HASHED_BYTES = 16 << 20
"""Local files up to this size count by their content, larger ones by size and time."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def _zstandard(stream: IO[bytes]) -> IO[bytes]:
    # Arrow's reader, since that of `zstandard` takes a file that is cut off for a whole one, and stops behind the first frame.
    import pyarrow

    return cast(IO[bytes], pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd"))


_DECOMPRESSED: dict[str, Callable[[IO[bytes]], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstandard}


@dataclass(frozen=True)
class StoredFile:
    """One file of a source.

    Attributes:
        name: path relative to where it was found, with forward slashes, bytes that are not UTF-8 as `\\xff`, and without the
            suffix of a compressed file.
        path: local path or URL.
        size: in bytes, as stored; None where the file system does not tell.
        remote: the file system of a URL, with the path in it.
    """

    name: str
    path: str
    size: int | None
    remote: tuple[AbstractFileSystem, str] | None = None

    @property
    def compression(self) -> str:
        """The suffix of a compressed file, `.gz`, else nothing."""
        return _compression(self.path)

    def open(self) -> IO[bytes]:
        """The bytes as stored; for libraries that read files by themselves."""
        if self.remote is None:
            return open(self.path, "rb")
        system, path = self.remote
        return cast(IO[bytes], system.open(path, "rb"))

    def reason(self, error: Exception) -> UserError:
        """What to tell the user when reading the file has failed."""
        damaged = isinstance(error, (EOFError, zlib.error, lzma.LZMAError)) or (isinstance(error, OSError) and error.errno is None)
        if self.compression and damaged and not isinstance(error, (FileNotFoundError, PermissionError)):
            return UserError(f"data.paths: {self.path} is damaged or cut off, as {self.compression} ({one_line(error)}); fetch it again")
        return UserError(f"data.paths: {self.path} cannot be read: {one_line(error)}")


class FileReader:
    """The bytes of a file from its start, decompressed. A context manager.

    Raises:
        UserError: the file cannot be read, or is a damaged archive; by every method.
    """

    def __init__(self, file: StoredFile):
        self.file = file
        with self._in_a_sentence():
            self._stored = file.open()
            self._stream = _DECOMPRESSED[file.compression](self._stored) if file.compression else self._stored

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stored.close()

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        with self._in_a_sentence():
            return self._stream.read(size)

    def skip(self, size: int) -> None:
        """Go on `size` bytes behind the start of the file, which must not have been read from yet."""
        if not self.file.compression:
            with self._in_a_sentence():
                self._stored.seek(size)
            return
        while size > 0 and (read := len(self.read(min(size, 1 << 20)))):
            size -= read

    @contextmanager
    def _in_a_sentence(self) -> Iterator[None]:
        failures = (OSError, EOFError, zlib.error, lzma.LZMAError) if self.file.remote is None else Exception  # each library has its own
        try:
            yield
        except failures as error:
            raise self.file.reason(error) from error


def one_line(error: BaseException) -> str:
    """What an exception says, without line breaks, cut to a readable length."""
    text = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError) and " " not in text:  # remote file systems give the path alone
        text = "No such file"
    return text.rstrip(".") if len(text) <= 300 else f"{text[:300]}..."


def list_files(paths: Iterable[str]) -> list[StoredFile]:
    """The files that `data.paths` names, sorted by name, none of them twice.

    Raises:
        UserError: a path that matches nothing, a channel that is not there or empty, a file system that cannot be reached.
    """
    files: dict[str, StoredFile] = {}
    for pattern in paths:
        if pattern.startswith("channel://"):
            found = _in_channel(pattern)
        elif _URL.match(pattern):
            found = _remote(pattern)
        else:
            found = _local(pattern)
        for file in found:
            files.setdefault(file.path if file.remote else os.path.realpath(file.path), file)
    return sorted(files.values(), key=lambda f: f.name)


def local_file(root: Path, path: Path) -> StoredFile:
    """A file named after its place below `root`."""
    name = os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")
    with suppress(OSError):
        return StoredFile(_plain(name), str(path), path.stat().st_size)
    return StoredFile(_plain(name), str(path), None)


def fingerprint_files(files: Iterable[StoredFile]) -> str:
    """A hash of the files' names and what is in them: of small local files the content, of others what the file system says.

    Raises:
        UserError: a file that cannot be read.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        try:
            if file.remote is not None:
                system, path = file.remote
                info = system.info(path)  # beside the key, which over http is of the address alone
                digest.update(f"{system.ukey(path)} {file.size} {info.get('ETag')} {info.get('mtime')}".encode())
            elif file.size is not None and file.size > HASHED_BYTES:
                digest.update(f"{file.size} {os.stat(file.path).st_mtime_ns}".encode())
            else:
                with file.open() as stream:
                    digest.update(hashlib.file_digest(cast(Any, stream), "sha256").digest())
        except Exception as error:
            if file.remote is None and not isinstance(error, OSError):
                raise
            raise UserError(f"data.paths: {file.path} cannot be read: {one_line(error)}") from error
    return digest.hexdigest()


def _compression(path: str) -> str:
    suffix = PurePosixPath(path).suffix.lower()
    return suffix if suffix in _DECOMPRESSED else ""


def _plain(name: str) -> str:
    return name[: len(name) - len(_compression(name))]


def _local(pattern: str) -> list[StoredFile]:
    path = Path(os.path.expanduser(pattern))
    if os.path.isfile(path):
        return [local_file(path.parent, path)]
    if os.path.isdir(path):
        inside = sorted(_files_below(path))
        if not inside:
            raise UserError(f"data.paths: the folder {pattern!r} has no files in it")
        return [local_file(path, p) for p in inside]
    matches = sorted(Path(m) for m in glob.glob(str(path), recursive=True) if os.path.isfile(m))
    if not matches:
        where = path.parent if os.path.isdir(path.parent) else Path()
        siblings: list[str] = []
        with suppress(OSError):
            siblings = os.listdir(where)
        raise UserError(f"data.paths: no file matches {pattern!r} (looked in {where.resolve()}){nearest(path.name, siblings)}")
    fixed = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
    return [local_file(fixed, m) for m in matches]


def _files_below(folder: Path) -> Iterator[Path]:
    """Every file in a folder and its folders, without hidden ones."""

    def refuse(error: OSError) -> None:
        raise UserError(f"data.paths: {error.filename} cannot be read: {error.strerror}") from error

    for where, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [f for f in folders if not f.startswith(".")]
        yield from (Path(where, n) for n in names if not n.startswith(".") and os.path.isfile(os.path.join(where, n)))


def _in_channel(pattern: str) -> list[StoredFile]:
    """The files of an input channel, or those of them that the rest of the path names."""
    name, _, rest = pattern.removeprefix("channel://").partition("/")
    folder = os.environ.get(f"SM_CHANNEL_{name.upper()}", "") or os.path.join(CHANNELS, name)
    if name and os.path.isdir(folder):
        if rest:
            return _local(os.path.join(glob.escape(folder), rest))
        if inside := sorted(_files_below(Path(folder))):
            return [local_file(Path(folder), path) for path in inside]
        problem = f"the channel {name!r} ({folder}) is empty; give the job data for it"
    else:
        problem = f"there is no channel {name!r} ({folder})"
    there = {key.removeprefix("SM_CHANNEL_").lower() for key in os.environ if key.startswith("SM_CHANNEL_")}
    with suppress(OSError):
        there |= {entry.name for entry in os.scandir(CHANNELS) if entry.is_dir()}
    known = f"there are: {', '.join(sorted(there))}" if there else "this machine has none, a SageMaker training job does"
    raise UserError(f"data.paths: {problem}; {known}")


def _remote(pattern: str) -> list[StoredFile]:
    """The files of a URL: one, all below a folder, or those that match."""
    from fsspec.core import url_to_fs

    protocol, reason = pattern.partition("://")[0], ""
    try:
        system, path = cast("tuple[AbstractFileSystem, str]", url_to_fs(pattern))
        try:
            info = system.info(path)
        except FileNotFoundError as error:  # of http also when the server is not there
            info = {"type": None}
            reason = f": {one_line(error.__cause__)}" if error.__cause__ else ""
        if info["type"] == "file":
            root, found = path.rpartition("/")[0], {path: info}
        elif info["type"] == "directory":
            root, found = path, cast("dict[str, Any]", system.find(path, detail=True))
        else:
            root = "/".join(takewhile(lambda part: not glob.has_magic(part), path.split("/")))
            found = cast("dict[str, Any]", system.glob(path, detail=True)) if glob.has_magic(path) else {}
    except ImportError as error:
        remedy = "pip install 'gpt-trainer[s3]'" if protocol in ("s3", "s3a") else one_line(error)
        raise UserError(f"data.paths: {pattern} needs a package that is not installed: {remedy}") from error
    except Exception as error:  # every file system has errors of its own
        raise UserError(f"data.paths: {pattern} cannot be read: {one_line(error)}") from error
    files = []
    for file, details in sorted(found.items()):
        name = file.removeprefix(root).lstrip("/")
        hidden = info["type"] == "directory" and any(part.startswith(".") for part in name.split("/"))
        if details["type"] == "file" and not hidden and not file.endswith("/"):  # S3 may keep an empty object for a folder
            files.append(StoredFile(_plain(name), system.unstrip_protocol(file), details.get("size"), (system, file)))
    if not files:
        what = f"the folder {pattern!r} has no files in it" if info["type"] == "directory" else f"no file matches {pattern!r}{reason}"
        raise UserError(f"data.paths: {what}")
    return files
