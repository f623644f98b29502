"""Where text comes from: documents, each with a name that stays the same from machine to machine.

Held-out documents are chosen by a hash of their names, so adding a file never moves another across the border. A corpus
of few files is cut within the files instead, or chance would decide how much is held out, if anything.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import takewhile
from pathlib import Path

from gpt.config import DataConfig
from gpt.errors import UserError

MIN_FILES_PER_SIDE = 10  # to be expected on either side of the border; fewer files are cut within
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass
class SourceFile:
    """One file of the corpus."""

    name: str
    """Path relative to where it was found, with forward slashes; bytes that are not UTF-8 as `\\xff`."""
    path: Path

    @classmethod
    def below(cls, root: Path, path: Path) -> SourceFile:
        """A file named after its place below `root`."""
        return cls(os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace"), path)


@dataclass
class Document:
    """A text, or a part of one, on one side of the border."""

    name: str
    text: str
    held_out: bool


@dataclass
class ReadReport:
    """What was met while reading; said aloud and kept beside the tokens."""

    files: int = 0
    """With text in them."""
    binary_files: list[str] = field(default_factory=list)
    empty_files: int = 0
    invalid_utf8: dict[str, int] = field(default_factory=dict)
    """File -> number of characters replaced."""
    split_within_files: bool = False

    def warnings(self) -> list[str]:
        """What a user should know, a sentence each."""
        found = []
        if self.binary_files:
            found.append(f"{len(self.binary_files)} binary files were left out, e.g. {self.binary_files[0]}")
        if self.invalid_utf8:
            worst = max(self.invalid_utf8, key=lambda n: self.invalid_utf8[n])
            total = sum(self.invalid_utf8.values())
            found.append(f"invalid UTF-8 in {len(self.invalid_utf8)} files, {total} characters replaced, most in {worst}")
        if self.split_within_files:
            found.append(f"only {self.files} files: the end of each is held out, not whole files")
        return found


def find_files(config: DataConfig) -> list[SourceFile]:
    """The files of the source, sorted by name.

    Raises:
        UserError: a path that matches nothing.
    """
    if config.source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        found = []
        for where, folders, names in os.walk(root):
            folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS]  # site-packages may hold a hundred thousand files
            found += [SourceFile.below(root, Path(where, n)) for n in names if n.endswith(".py")]
        return sorted(found, key=lambda f: f.name)
    files: dict[Path, SourceFile] = {}
    for pattern in config.paths:
        for file in _matching(pattern):
            files.setdefault(file.path.resolve(), file)
    return sorted(files.values(), key=lambda f: f.name)


def _matching(pattern: str) -> list[SourceFile]:
    path = Path(os.path.expanduser(pattern))
    if os.path.isfile(path):
        return [SourceFile.below(path.parent, path)]
    if os.path.isdir(path):
        inside = sorted(_files_below(path))
        if not inside:
            raise UserError(f"data.paths: the folder {pattern!r} has no files in it")
        return [SourceFile.below(path, p) for p in inside]
    matches = sorted(Path(m) for m in glob.glob(str(path), recursive=True) if os.path.isfile(m))
    if not matches:
        from gpt.config import nearest

        where = path.parent if os.path.isdir(path.parent) else Path()
        siblings: list[str] = []
        with suppress(OSError):
            siblings = os.listdir(where)
        raise UserError(f"data.paths: no file matches {pattern!r} (looked in {where.resolve()}){nearest(path.name, siblings)}")
    fixed = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
    return [SourceFile.below(fixed, m) for m in matches]


def _files_below(folder: Path) -> Iterator[Path]:
    """Every file in a folder and its folders, without hidden ones."""

    def refuse(error: OSError) -> None:
        raise UserError(f"data.paths: {error.filename} cannot be read: {error.strerror}") from error

    for where, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [f for f in folders if not f.startswith(".")]
        yield from (Path(where, n) for n in names if not n.startswith(".") and os.path.isfile(os.path.join(where, n)))


def fingerprint(files: list[SourceFile]) -> str:
    """A hash of every file's name and content.

    Raises:
        UserError: a file that cannot be read.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with _reading(file) as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def read_documents(files: list[SourceFile], config: DataConfig, report: ReadReport) -> list[Document]:
    """Every document, in the order of the files, filling `report` on the way.

    Raises:
        UserError: a file that cannot be read; or with on_error=raise a binary one or one with invalid UTF-8.
    """
    texts: list[tuple[str, str]] = []
    for file in files:
        with _reading(file) as stream:
            raw = stream.read()
        if not raw.strip():
            report.empty_files += 1
            continue
        if b"\0" in raw[:8192]:
            if config.on_error == "raise":
                raise UserError(f"data.paths: {file.path} is a binary file (data.on_error=skip leaves it out)")
            report.binary_files.append(file.name)
            continue
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if config.on_error == "raise":
                raise UserError(
                    f"data.paths: {file.path} is not UTF-8 at byte {error.start} (data.on_error=skip replaces such bytes)"
                ) from error
            text = raw.decode("utf-8", errors="replace")
            report.invalid_utf8[file.name] = text.count("\ufffd") - raw.count("\ufffd".encode())
        texts.append((file.name, text))
    report.files = len(texts)
    report.split_within_files = len(texts) * min(config.holdout, 1 - config.holdout) < MIN_FILES_PER_SIDE
    if not report.split_within_files:
        return [Document(name, text, _is_held_out(name, config.holdout)) for name, text in texts]
    documents = []
    for name, text in texts:
        border = _tail_start(text, config.holdout)
        documents += [Document(name, text[:border], held_out=False), Document(f"{name} (end)", text[border:], held_out=True)]
    return [d for d in documents if d.text]


@contextmanager
def _reading(file: SourceFile) -> Iterator[BufferedReader]:
    try:
        with file.path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise UserError(f"data.paths: {file.path} cannot be read: {error.strerror}") from error


def _is_held_out(name: str, share: float) -> bool:
    return int.from_bytes(hashlib.md5(name.encode(), usedforsecurity=False).digest()[:8], "big") / 2**64 < share


def _tail_start(text: str, share: float) -> int:
    """Where the held-out end of a text begins: at a line's start if there is one near."""
    border = int(len(text) * (1 - share))
    newline = text.find("\n", border)
    return newline + 1 if 0 <= newline < border + max(1, (len(text) - border) // 2) else border
