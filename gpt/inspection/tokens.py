"""How a text is cut into tokens: one line for each, with its id and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt.inspection.visible import character_runs, in_one_line, segments, special_ids

if TYPE_CHECKING:
    from rich.console import Console

    from gpt.data.tokenizer import Tokenizer
    from gpt.inspection.visible import Segment

MOST_TOKENS = 10_000
_SHADES = ("#3484d8", "#b9761d")  # both can be read on black and on white


@dataclass(frozen=True)
class Token:
    """One token of a text."""

    position: int
    id: int
    raw: bytes
    special: bool

    @property
    def text(self) -> str:
        """For people, in one line."""
        return f"⟦{self.raw.decode()}⟧" if self.special else in_one_line(self.raw)

    @property
    def hex(self) -> str:
        """Its bytes."""
        return self.raw.hex(" ")


@dataclass(frozen=True)
class CutText:
    """A text and its tokens."""

    characters: int
    bytes: int
    count: int
    tokens: list[Token]
    """The first MOST_TOKENS."""

    @property
    def bytes_per_token(self) -> float:
        """Over the whole text."""
        return self.bytes / self.count

    @property
    def left_out(self) -> str:
        """What to say of tokens that are not shown; nothing if all are."""
        return f"the first {MOST_TOKENS:,} of {self.count:,} tokens are shown" if self.count > MOST_TOKENS else ""

    def in_text(self) -> list[tuple[list[Segment], str]]:
        """The text in its tokens, those that share a character together, each with what to say of it."""
        runs = character_runs([token.raw for token in self.tokens])
        groups = (self.tokens[run.start : run.stop] for run in runs)
        return [(segments(b"".join(token.raw for token in group)), _title(group)) for group in groups]


def cut(text: str, tokenizer: Tokenizer) -> CutText:
    """Cut a text, which is not empty, as it would be in a document: special tokens in it are text."""
    ids = tokenizer.encode(text)
    shown, special = ids[:MOST_TOKENS], special_ids(tokenizer)
    pieces = zip(shown, tokenizer.pieces(shown), strict=True)
    tokens = [Token(position, index, raw, index in special) for position, (index, raw) in enumerate(pieces)]
    return CutText(len(text), len(text.encode()), len(ids), tokens)


def _title(group: Sequence[Token]) -> str:
    ids = ", ".join(str(token.id) for token in group)
    more = f" to {group[-1].position}" if len(group) > 1 else ""
    return f"position {group[0].position}{more}, id {ids}, bytes {' '.join(token.hex for token in group)}"


def totals(found: CutText) -> str:
    """The figures in one line."""
    names = (("character", found.characters), ("byte", found.bytes), ("token", found.count))
    counts = ", ".join(f"{number:,} {name}{'' if number == 1 else 's'}" for name, number in names)
    return f"{counts}, {found.bytes_per_token:.2f} bytes per token"


def print_tokens(found: CutText, console: Console) -> None:
    """Print the table of tokens and the totals."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("position", justify="right", no_wrap=True)
    table.add_column("id", justify="right", no_wrap=True)
    table.add_column("text", overflow="fold")
    table.add_column("bytes", overflow="fold")
    for token in found.tokens:
        shade = _SHADES[token.position % 2]
        table.add_row(str(token.position), str(token.id), Text(token.text, style=f"bold {shade}"), Text(token.hex, style=shade))
    console.print(table)
    if found.left_out:
        console.print(f"… {found.left_out}", markup=False)
    console.print(Text(totals(found), style="bold"))
