"""Text in which nothing hides: line ends, tabs, control characters and single bytes get a mark that can be seen.

The terminal and the pages draw the marks fainter than the text around them.
"""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpt.data.tokenizer import Tokenizer

_NAMED = {"\n": "↵\n", "\r": "␍", "\t": "→   "}
# What turns the direction of the text around it, breaks a line, or has no width: it would move or hide what stands beside it. The joiners
# U+200C and U+200D stay, since emoji and several scripts are written with them.
_HIDDEN = set("\u00ad\u061c\u180e\u200b\u200e\u200f\u2028\u2029\u2060\ufeff\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

Segment = tuple[str, bool]
"""A stretch of visible text, and whether it is a mark."""


def segments(raw: bytes) -> list[Segment]:
    """Bytes as visible text; a byte that is no part of a whole UTF-8 character becomes \\xNN."""
    shown = ((_mark(c) or c, _mark(c) is not None) for c in raw.decode("utf-8", "surrogateescape"))
    return [("".join(text for text, _ in run), is_mark) for is_mark, run in groupby(shown, key=lambda segment: segment[1])]


def in_one_line(raw: bytes) -> str:
    """Bytes as visible text for a cell of a table, where a blank is a mark too."""
    return "".join("".join(text.split()) if is_mark else text.replace(" ", "␣") for text, is_mark in segments(raw))


def _mark(c: str) -> str | None:
    """What stands for a character that cannot be seen."""
    if c in _NAMED:
        return _NAMED[c]
    if "\udc80" <= c <= "\udcff":  # so surrogateescape holds a byte
        return f"\\x{ord(c) - 0xDC00:02X}"
    if unicodedata.category(c) == "Cc":
        return f"\\x{ord(c):02X}" if ord(c) < 0x80 else f"\\u{ord(c):04X}"
    return f"\\u{ord(c):04X}" if c in _HIDDEN else None


def character_runs(pieces: Sequence[bytes]) -> Iterator[range]:
    """The places of tokens that belong together: one token, or the tokens that hold the bytes of a character between them.

    A token whose character is not made whole by those behind it stays alone.
    """
    start = 0
    while start < len(pieces):
        decoder = codecs.getincrementaldecoder("utf-8")()
        stop = start
        try:
            while stop == start or decoder.getstate()[0]:
                decoder.decode(pieces[stop])
                stop += 1
        except (UnicodeDecodeError, IndexError):
            stop = start + 1
        yield range(start, stop)
        start = stop


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """The ids of control tokens."""
    return {index for index, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
