"""Where text and examples come from: rows, each with a name that stays the same from machine to machine.

Every source gives its rows one by one, in the same order each time, within bounded memory, and can go on from where it
stood. What cannot be read stops it or is counted, as `data.on_error` says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from gpt.data.config import SourceConfig
from gpt.data.files import FileReader, StoredFile, fingerprint_files, list_files
from gpt.errors import UserError

OnError = Literal["auto", "raise", "skip"]
PIECE_BYTES = 8 << 20
"""Of text, about: a longer file comes in pieces."""
_CUT_WITHIN = 64 << 10  # bytes at the end of a piece in which a good place to cut is looked for
_BINARY_WITHIN = 8192  # bytes at the start of a file in which a NUL says that it is not text


@dataclass(frozen=True)
class Row:
    """A text or an example.

    Attributes:
        name: the same on every machine: `pkg/mod.py`, `rows.jsonl:17` (line), `a.parquet:12` (row), `org/set/train:5`.
        place: where it was found, for messages: `/x/rows.jsonl, line 17`.
        values: its fields under our names (`FieldNames`); other fields of the row are dropped.
        piece: a text file over PIECE_BYTES comes as several rows of one name, numbered from 0.
        group: what data.holdout_by says that it belongs to; None: it stands for itself.
    """

    name: str
    place: str
    values: dict[str, Any]
    piece: int = 0
    group: str | None = None

    @property
    def held_out_key(self) -> str:
        """Whose hash decides whether the row is held out."""
        return self.name if self.group is None else self.group


@dataclass
class ReadReport:
    """What was met while reading; said aloud and kept beside the tokens. Counters only grow, so a restart goes on with them."""

    files: int = 0
    """With text or rows in them."""
    empty_files: int = 0
    binary_files: int = 0
    first_binary: str = ""
    invalid_utf8_files: int = 0
    """Files, or rows, with characters that are not UTF-8 and were replaced."""
    invalid_utf8_characters: int = 0
    first_invalid: str = ""
    skipped_rows: int = 0
    """Left out because they are not what they should be."""
    first_skipped: str = ""
    """What was wrong with the first of them."""
    split_within_files: bool = False

    def warnings(self) -> list[str]:
        """What a user should know, a sentence each."""
        found = []
        if self.binary_files:
            found.append(f"{self.binary_files} binary files were left out, e.g. {self.first_binary}")
        if self.invalid_utf8_files:
            found.append(
                f"invalid UTF-8 in {self.invalid_utf8_files} files or rows, {self.invalid_utf8_characters} characters replaced, "
                f"e.g. in {self.first_invalid}"
            )
        if self.skipped_rows:
            found.append(f"{self.skipped_rows} rows were left out, e.g. {self.first_skipped}")
        if self.split_within_files:
            found.append("there are few texts: the end of each is held out, not whole ones")
        return found

    def binary(self, name: str) -> None:
        """Count a binary file."""
        self.binary_files += 1
        self.first_binary = self.first_binary or name

    def invalid(self, name: str, characters: int, again: bool = False) -> None:
        """Count replaced characters, and the file or row that they are in, unless it was counted before."""
        self.invalid_utf8_files += not again
        self.invalid_utf8_characters += characters
        self.first_invalid = self.first_invalid or name

    def skipped(self, problem: str) -> None:
        """Count a row that is left out."""
        self.skipped_rows += 1
        self.first_skipped = self.first_skipped or problem


class RowStream(Iterator[Row]):
    """Rows that know where they stand.

    Args:
        rows: the rows.
        state: what `state_dict` gives; called between rows only.
    """

    def __init__(self, rows: Iterator[Row], state: Callable[[], dict[str, Any]]):
        self._rows, self._state = rows, state

    def __next__(self) -> Row:
        return next(self._rows)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; where the stream stands, behind the last row given. `Source.rows` goes on from it."""
        return self._state()


class Source(ABC):
    """Rows, as often as one asks for them.

    Attributes:
        name: for messages: `stdlib`, `text: 3 files`, `org/set (train)`.
        size: bytes of all files as stored; None if unknown.
    """

    name: str
    size: int | None = None

    @property
    def place(self) -> str:
        """Its name and where it was looked for, for messages about what is not there."""
        return self.name

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes with the rows. Cheap: large files count by their size and time.

        Raises:
            UserError: a file that cannot be read.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the source is, for the manifest of the data; JSON-able."""

    @abstractmethod
    def rows(self, report: ReadReport, state: dict[str, Any] | None = None) -> RowStream:
        """The rows from the start, or behind where another stream stood.

        Args:
            report: what is met is added to it; with `state`, the report as it was when that state was taken.
            state: of `RowStream.state_dict`.

        Raises:
            UserError: while reading: a file or row that cannot be read, unless it is to be left out.
        """


class FileSource(Source):
    """Rows of files, file after file."""

    def __init__(self, config: SourceConfig, files: list[StoredFile], on_error: OnError):
        self.config, self.files, self.on_error = config, files, on_error
        self.name = f"{config.source}: {len(files)} file{'s' * (len(files) != 1)}"
        self.size = None if any(f.size is None for f in files) else sum(f.size or 0 for f in files)

    @property
    def place(self) -> str:
        """`jsonl: 1 file (rows.jsonl)`."""
        return f"{self.name} ({', '.join(self.config.paths[:3])}{', ...' * (len(self.config.paths) > 3)})"

    def fingerprint(self) -> str:
        """A hash of every file's name and content, as `fingerprint_files` makes it."""
        return fingerprint_files(self.files)

    def describe(self) -> dict[str, Any]:
        """Source, paths, number of files, bytes and licence."""
        config = self.config
        return {
            "source": config.source, "paths": list(config.paths), "files": len(self.files), "bytes": self.size, "licence": config.licence,
        }  # fmt: skip

    def rows(self, report: ReadReport, state: dict[str, Any] | None = None) -> RowStream:
        """The rows of all files, in the order of the files' names."""
        position = dict(state or {"file": 0})  # of the file in the list, and where in that file, as `_read` keeps it

        def read() -> Iterator[Row]:
            while position["file"] < len(self.files):
                yield from self._read(self.files[position["file"]], report, position)
                file = position["file"] + 1
                position.clear()
                position["file"] = file

        return RowStream(read(), lambda: dict(position))

    @abstractmethod
    def _read(self, file: StoredFile, report: ReadReport, position: dict[str, Any]) -> Iterator[Row]:
        """The rows of a file from `position` on, which holds the place behind a row when the row is given."""


class TextSource(FileSource):
    """A text a file."""

    def _read(self, file: StoredFile, report: ReadReport, position: dict[str, Any]) -> Iterator[Row]:
        with FileReader(file) as reader:
            offset, piece, head = position.get("bytes", 0), position.get("piece", 0), b""
            if offset:
                reader.skip(offset)
            else:
                head = _read_fully(reader, _BINARY_WITHIN)
                if not self._is_text(file, head, report):
                    return
            for raw in _pieces(reader, head):
                if not offset:
                    report.files += 1
                text = self._decoded(raw, file, offset, report, position)
                offset += len(raw)
                position |= {"bytes": offset, "piece": piece + 1}
                yield Row(file.name, file.path, {"text": text}, piece)
                piece += 1

    def _is_text(self, file: StoredFile, head: bytes, report: ReadReport) -> bool:
        if not head.strip() and _is_blank(file):
            report.empty_files += 1
            return False
        if b"\0" in head:
            if self.on_error == "raise":
                raise UserError(f"data.paths: {file.path} is a binary file (data.on_error=skip leaves it out)")
            report.binary(file.name)
            return False
        return True

    def _decoded(self, raw: bytes, file: StoredFile, offset: int, report: ReadReport, position: dict[str, Any]) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.on_error == "raise":
                raise UserError(
                    f"data.paths: {file.path} is not UTF-8 at byte {offset + error.start} (data.on_error=skip replaces such bytes)"
                ) from error
        text = raw.decode("utf-8", errors="replace")
        report.invalid(file.name, text.count("\ufffd") - raw.count("\ufffd".encode()), again=position.get("invalid", False))
        position["invalid"] = True
        return text


def _read_fully(reader: FileReader, size: int) -> bytes:
    """`size` bytes, or what is left: a stream may give fewer at a time."""
    parts = []
    while size > 0 and (part := reader.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _is_blank(file: StoredFile) -> bool:
    with FileReader(file) as reader:
        while (part := reader.read(1 << 20)) and not part.strip():
            pass
    return not part


def _pieces(reader: FileReader, rest: bytes) -> Iterator[bytes]:
    """What is left of a file, behind `rest`, in pieces of at most PIECE_BYTES, cut where both text and ids fall apart."""
    while True:
        rest += _read_fully(reader, PIECE_BYTES + 1 - len(rest))
        if len(rest) <= PIECE_BYTES:
            break
        border = _border(rest, PIECE_BYTES)
        yield rest[:border]
        rest = rest[border:]
    if rest:
        yield rest


def _border(raw: bytes, end: int) -> int:
    """The last good place to cut, at most `end` and less than the length of `raw`.

    Byte-level BPE begins a new word behind a line break between two characters that are not blank, and at a blank behind a
    letter, so that a cut there changes no ids. Of several line breaks, or one of two characters, some tokenizers make a word
    that a cut would change.
    """
    low = max(1, end - _CUT_WITHIN)
    newline = end
    while (newline := raw.rfind(b"\n", low, newline)) >= 0:
        if not _blank(raw[max(0, newline - 4) : newline], -1) and not _blank(raw[newline + 1 : newline + 5], 0):
            return newline + 1
    blank = end + 1
    while (blank := raw.rfind(b" ", low, blank)) >= 0:
        if raw[blank - 1 : blank].isalpha():
            return blank
    if (newline := raw.rfind(b"\n", low, end)) >= 0:
        return newline + 1
    while end > low and 0x80 <= raw[end] < 0xC0:  # within a character
        end -= 1
    return end


def _blank(raw: bytes, index: int) -> bool:
    """Whether the first or last character of a few bytes is blank; none is."""
    text = raw.decode("utf-8", errors="ignore")
    return not text or text[index].isspace()


def open_source(config: SourceConfig, on_error: OnError, streaming: bool = False) -> Source:
    """The source of a config; not for a mixture, whose parts are sources each.

    Args:
        config: which source, and where it lies.
        on_error: what to do with files and rows that cannot be read; auto: files of text are left out, rows stop.
        streaming: a dataset of the hub is read while it is downloaded.

    Raises:
        UserError: a path that matches nothing, an empty channel, a dataset that is not there, no network.
    """
    from gpt.data import embedded, hub, rows

    if config.source == "text":
        return TextSource(config, list_files(config.paths), on_error)
    if config.source == "jsonl":
        return rows.JsonlSource(config, list_files(config.paths), on_error)
    if config.source == "parquet":
        return rows.ParquetSource(config, list_files(config.paths), on_error)
    if config.source == "hf":
        return hub.HubSource(config, on_error, streaming)
    if config.source == "stdlib":
        return embedded.StandardLibrary(config, on_error)
    assert config.source != "mixture", "its parts are sources each"
    return embedded.EmbeddedSource(config)
