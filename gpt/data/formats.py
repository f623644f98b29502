"""The formats that rows of examples have: recognised by their fields; and the classes that labels and tags name.

Fields are under our names, which data.fields gives to yours. What is wrong with a row is said with its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gpt.errors import UserError
from gpt.typed import nearest, shown

if TYPE_CHECKING:
    from gpt.data.sources import Row

FORMATS = {
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text_label": ("text", "label"),
    "tokens_tags": ("tokens", "tags"),
    "preference": ("chosen", "rejected"),
    "text": ("text",),
}
"""What the rows of each format must have."""


def brief(value: Any) -> str:
    """A value of a row, for messages: on one line and cut to a readable length."""
    return " ".join(shown(value).split()) or "an empty one"


def recognise_format(rows: Sequence[Row], forced: str, skip_bad_rows: bool = False) -> str:
    """The format of rows, by the fields that they have; a field that is null is not there.

    Args:
        rows: the first ones.
        forced: a format to check them against instead, or "auto".
        skip_bad_rows: go by the first row that fits a format; what becomes of others is the encoder's business.

    Raises:
        UserError: rows that fit no format, more than one, or another than the rows before them; or not the one that is forced.
    """
    if forced != "auto":
        for row in rows[: 0 if skip_bad_rows else None]:
            check_fields(row, forced, exactly=False)
        return forced
    if not rows:
        raise UserError("data: there are no rows whose format could be recognised; data.format=<format> sets it")
    if skip_bad_rows:
        rows = [row for row in rows if len(_fitting(row)) == 1][:1] or rows
    found = _format_of(rows[0])
    for row in rows:
        check_fields(row, found, exactly=True)
    return found


def _fitting(row: Row) -> list[str]:
    """The formats whose fields a row has."""
    there = {name for name, value in row.values.items() if value is not None}
    fitting = [name for name, needed in FORMATS.items() if there.issuperset(needed)]
    # A text beside the fields of another format is one of them, or the same once more, written out.
    return [name for name in fitting if name != "text"] or fitting


def _format_of(row: Row) -> str:
    fitting = _fitting(row)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(f"{row.place}: a row with {_fields(row)} fits {' and '.join(fitting)}; say which with data.format")
    raise UserError(
        f"{row.place}: a row with {_fields(row)} fits no format; there are: {_formats()}. "
        "What your own fields are called is set by data.fields.<name>"
    )


def check_fields(row: Row, format: str, exactly: bool) -> None:
    """Raises UserError for a row without the fields of the format, or, if `exactly`, with those of another."""
    missing = [name for name in FORMATS[format] if row.values.get(name) is None]
    if exactly and (fitting := _fitting(row)) and fitting != [format]:
        forced = "" if missing else f", or set data.format={format}"
        raise UserError(
            f"{row.place}: a row of {_format_of(row)} ({_fields(row)}) among rows of {format}; put them into files of their own{forced}"
        )
    if missing:
        raise UserError(
            f"{row.place}: rows of {format} need {' and '.join(FORMATS[format])}, and this one has {_fields(row)}; mend it, leave it out "
            f"with data.on_error=skip, or say with data.fields.{missing[0]} which field of yours it is"
        )


def _fields(row: Row) -> str:
    names = [f"{name} (null)" if value is None else name for name, value in row.values.items()]
    return ", ".join(names) or "none of the known fields"


def _formats() -> str:
    return ", ".join(f"{name} ({' and '.join(needed)})" for name, needed in FORMATS.items())


def collect_classes(rows: Iterable[Row], format: str, given: list[str]) -> list[str]:
    """The classes that labels or tags name: `given`, or all that occur, sorted, numbers by their value.

    Labels that are none are passed over: encoding their rows says what is wrong with them, and where.

    Args:
        rows: all of them; not read if classes are given.
        format: text_label or tokens_tags; other formats have no classes.
        given: the classes in order, or none.

    Raises:
        UserError: fewer than two classes.
    """
    if format not in ("text_label", "tokens_tags"):
        return []
    found = set(given)
    if not given:
        for row in rows:
            labels = row.values.get("tags") if format == "tokens_tags" else [row.values.get("label")]
            found.update(name for label in (labels if isinstance(labels, list) else []) if (name := _class_name(label)) is not None)
    if len(found) < 2:
        have = f"all rows have the same class, {brief(found.pop())}" if found else "no row has a class"
        raise UserError(f"data.labels: {have if not given else f'{brief(given)} is one class'}; telling classes apart takes two or more")
    if given:
        return list(given)
    return sorted(found, key=int) if all(map(_is_number, found)) else sorted(found)


def _class_name(label: Any) -> str | None:
    """The name of a class as rows have it, a text or a whole number, or true or false; None if it is none of these."""
    if isinstance(label, bool):
        return str(label).lower()
    return str(label) if isinstance(label, int) or (isinstance(label, str) and label.strip()) else None


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal() and name.isascii()


class Classes:
    """The classes in order, and which of them a label is."""

    def __init__(self, names: Sequence[str]) -> None:
        self._numbers = {name: number for number, name in enumerate(names)}
        self._named = not any(map(_is_number, names))  # then a number says which of them in order

    def number(self, label: Any, where: str) -> int:
        """The number of a label's class, 0 to C - 1.

        Raises:
            UserError: none of the classes; `where` says which label it is.
        """
        name = _class_name(label)
        if name is None:
            raise UserError(f"{where} must be the name or the number of a class, not {brief(label)}")
        if name in self._numbers:
            return self._numbers[name]
        names = list(self._numbers)
        known = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        if self._named and isinstance(label, int) and not isinstance(label, bool):
            if 0 <= label < len(names):
                return label
            raise UserError(f"{where}={brief(label)} is out of range; there are 0 to {len(names) - 1}, which are {known}")
        raise UserError(f"{where}={brief(label)} is none of the classes{nearest(name, names) or '.'} There are: {known}")
