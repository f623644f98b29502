"""Rows of files: JSON, one a line, and Parquet.

A row that is not what it should be stops the reading with its file and line, or is left out and counted (data.on_error=skip).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from gpt.data.config import BESIDE_FIELDS, FieldNames, SourceConfig
from gpt.data.files import FileReader, StoredFile, one_line
from gpt.data.formats import brief
from gpt.data.sources import FileSource, OnError, ReadReport, Row
from gpt.errors import UserError
from gpt.typed import nearest, shown

LINE_BYTES = 256 << 20
"""Longer lines are refused: a file without line breaks would fill the memory."""
BATCH_BYTES = 16 << 20
"""Of rows of Parquet that are unpacked at a time, about."""
_DEEPEST = 50  # lists and objects within each other; conversations have three
_SURROGATE = re.compile("[\ud800-\udfff]")


class RowReader:
    """Makes rows of the values that a file or dataset has, under our names.

    Args:
        config: what the fields are called there, and by which of them rows are held out.
        on_error: what to do with a row that is not what it should be.
        key: that names the source, for messages: data.paths, data.name.
    """

    def __init__(self, config: SourceConfig, on_error: OnError, key: str = "data.paths"):
        self.names, self.on_error, self.key = {ours: str(theirs) for ours, theirs in vars(config.fields).items()}, on_error, key
        self._group = config.holdout_by
        renamed = {f"fields.{ours}": theirs for ours, theirs in self.names.items() if theirs != getattr(FieldNames(), ours)}
        self._named = renamed | ({"holdout_by": self._group} if self._group else {})

    def check_columns(self, columns: list[str], place: str) -> list[str]:
        """Those of the columns that are read.

        Raises:
            UserError: none is, or one that the config names is not there.
        """
        for key, theirs in self._named.items():
            if theirs not in columns:
                guess = nearest(theirs, columns) or "."
                raise UserError(f"data.{key}={theirs}: {place} has no such column{guess} There are: {shown(columns)}")
        if not any(c in self.names.values() for c in columns):
            raise UserError(f"{self.key}: {place} {self._lacks('column', columns)}")
        return [c for c in columns if c in self.names.values() or c == self._group]

    def row(self, name: str, place: str, values: dict[str, Any], report: ReadReport) -> Row | None:
        """The row, or None for one that is left out.

        Raises:
            UserError: it has none of the fields, or is nested too deep, or nothing says what it belongs to, and is not to be left out.
        """
        replaced: list[str] = []
        try:
            found = {ours: _clean(values[theirs], replaced) for ours, theirs in self.names.items() if theirs in values}
        except _NestedTooDeepError as error:
            self.refuse(f"{place}: {error}", report)
            return None
        if not found:
            self.refuse(f"{place} {self._lacks('field', list(values))}", report)
            return None
        if replaced:
            if self.on_error == "raise":
                raise UserError(f"{self.key}: {place} has characters that are no Unicode text (data.on_error=skip replaces them)")
            report.invalid(name, len(replaced))
        group = None
        if self._group:
            value = _clean(values.get(self._group), replaced)
            if not isinstance(value, (str, int, float)):
                there = "has no such field" if value is None else f"has {brief(value)} there, which is no text or number"
                self.refuse(f"{place} {there}; data.holdout_by={self._group} asks every row what it belongs to", report)
                return None
            group = str(value)
        return Row(name, place, found, group=group)

    def refuse(self, problem: str, report: ReadReport) -> None:
        """Stop because of a row, or count it."""
        if self.on_error != "skip":
            raise UserError(f"{self.key}: {problem} (data.on_error=skip leaves such rows out)")
        report.skipped(problem)

    def _lacks(self, what: str, there: list[str]) -> str:
        wanted = ", ".join(theirs for ours, theirs in self.names.items() if ours not in BESIDE_FIELDS)
        found = shown([name if name.isprintable() else ascii(name) for name in there])
        return f"has none of the {what}s {wanted}; it has {found}; name yours, e.g. data.fields.text=<{what}>"


class _NestedTooDeepError(ValueError):
    """Lists and objects within each other, deeper than any example is."""


def _clean(value: Any, replaced: list[str], depth: int = 0) -> Any:
    """A value in which every text is Unicode: halves of surrogate pairs, as JSON may have them, and invalid bytes are replaced."""
    if isinstance(value, str):
        if value.isascii() or not (halves := _SURROGATE.findall(value)):
            return value
        replaced += halves
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, bytes):  # Parquet written without saying that it is text
        text = value.decode("utf-8", errors="replace")
        replaced += ["\ufffd"] * (text.count("\ufffd") - value.count("\ufffd".encode()))
        return text
    if depth > _DEEPEST:
        raise _NestedTooDeepError(f"lists and objects are nested more than {_DEEPEST} deep")
    if isinstance(value, list):
        return [_clean(item, replaced, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_clean(key, replaced, depth): _clean(item, replaced, depth + 1) for key, item in value.items()}
    return value


class JsonlSource(FileSource):
    """JSON objects, one a line.

    Read with `json` and not by Arrow, as `datasets` does it: that makes a table, so that a field which is a number in one row and a
    text in another, or only in some, is converted or refused, and its messages do not know the line.
    """

    def __init__(self, config: SourceConfig, files: list[StoredFile], on_error: OnError):
        super().__init__(config, files, on_error)
        self._reader = RowReader(config, on_error)

    def _read(self, file: StoredFile, report: ReadReport, position: dict[str, Any]) -> Iterator[Row]:
        offset, number, met = position.get("bytes", 0), position.get("line", 0), "bytes" in position
        with FileReader(file) as reader:
            reader.skip(offset)
            for line, length in _lines(reader):
                if not number:
                    line = None if line is None else line.removeprefix(b"\xef\xbb\xbf")
                    if self._is_binary(file, line or b"", report):
                        return
                offset, number = offset + length, number + 1
                if line is not None and not line.strip():
                    continue
                if not met:
                    report.files += 1
                    if line is not None and line.lstrip().startswith(b"["):
                        raise UserError(f"data.paths: {file.path} is a JSON array; write one object a line")
                    met = True
                if (row := self._parsed(line, file, number, report)) is not None:
                    position |= {"bytes": offset, "line": number}
                    yield row
        report.empty_files += not met

    def _is_binary(self, file: StoredFile, start: bytes, report: ReadReport) -> bool:
        if b"\0" not in start[:8192]:
            return False
        if self.on_error != "skip":
            raise UserError(f"data.paths: {file.path} is a binary file, not lines of JSON (data.on_error=skip leaves it out)")
        report.binary(file.name)
        return True

    def _parsed(self, line: bytes | None, file: StoredFile, number: int, report: ReadReport) -> Row | None:
        place = f"{file.path}, line {number}"
        if line is None:
            self._reader.refuse(f"{place}: is longer than {LINE_BYTES >> 20} MiB; write one object a line", report)
            return None
        try:
            values = json.loads(line.decode("utf-8"))
            if isinstance(values, dict):
                return self._reader.row(f"{file.name}:{number}", place, values, report)
            problem = f'is {_KINDS.get(type(values), "a number")}, not an object such as {{"text": ...}}'
        except UnicodeDecodeError as error:
            problem = f"is not UTF-8 at byte {error.start}"
        except RecursionError:
            problem = "lists and objects are nested too deep"
        except json.JSONDecodeError as error:
            problem = f"is not JSON at column {error.colno} ({error.msg}); write one object a line"
        except UserError:
            raise
        except ValueError:
            problem = "holds a number of thousands of digits"
        self._reader.refuse(f"{place}: {problem}", report)
        return None


_KINDS = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}


def _lines(reader: FileReader) -> Iterator[tuple[bytes | None, int]]:
    """Lines without their ends, and their length with it; None for one that is longer than LINE_BYTES."""
    begun: list[bytes] = []
    length = 0
    while part := reader.read(1 << 20):
        *whole, rest = part.split(b"\n")
        for end in whole:
            length += len(end) + 1
            yield (None if length - 1 > LINE_BYTES else b"".join((*begun, end)) if begun else end), length
            begun, length = [], 0
        length += len(rest)
        if length > LINE_BYTES:
            begun = []
        elif rest:
            begun.append(rest)
    if length:
        yield (None if length > LINE_BYTES else b"".join(begun)), length


class ParquetSource(FileSource):
    """Rows of Parquet files, a few at a time."""

    def __init__(self, config: SourceConfig, files: list[StoredFile], on_error: OnError):
        super().__init__(config, files, on_error)
        self._reader = RowReader(config, on_error)

    def _read(self, file: StoredFile, report: ReadReport, position: dict[str, Any]) -> Iterator[Row]:
        number = position.get("row", 0)
        if file.size == 0:  # Spark leaves such beside its files
            report.empty_files += 1
            return
        rows = self._values(file, number)
        while True:
            try:
                values = next(rows)
            except StopIteration:
                break
            except UserError:
                raise
            except Exception as error:  # Arrow has many kinds for files that are damaged
                raise UserError(f"data.paths: {file.path} is not a Parquet file, or damaged: {one_line(error)}") from error
            if not number:
                report.files += 1
            number += 1
            row = self._reader.row(f"{file.name}:{number}", f"{file.path}, row {number}", values, report)
            if row is not None:
                position["row"] = number
                yield row
        report.empty_files += not number

    def _values(self, file: StoredFile, start: int) -> Iterator[dict[str, Any]]:
        """The rows from number `start` on, counted from 0, without what is null: tables say so of fields that a row lacks."""
        import pyarrow.parquet

        with file.open() as stream, pyarrow.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20) as table:
            columns = self._reader.check_columns(table.schema_arrow.names, file.path)
            for group in range(table.metadata.num_row_groups):
                about = table.metadata.row_group(group)
                if start >= about.num_rows:
                    start -= about.num_rows
                    continue
                size = max(1, min(4096, BATCH_BYTES * about.num_rows // max(1, about.total_byte_size)))
                for batch in table.iter_batches(size, row_groups=[group], columns=columns, use_threads=False):
                    yield from python_rows(batch.slice(min(start, len(batch))))
                    start = max(0, start - len(batch))


def python_rows(batch: Any) -> list[dict[str, Any]]:
    """The rows of an Arrow record batch or table, without what is null."""
    import pyarrow

    columns = {}
    for name in batch.schema.names:
        column = batch.column(name)
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
            column = column.cast(pyarrow.large_binary())  # Arrow does not check that it is UTF-8
        columns[name] = column.to_pylist()
    return [{name: values[i] for name, values in columns.items() if values[i] is not None} for i in range(len(batch))]
