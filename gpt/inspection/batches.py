"""Rows of a batch as text: what is learned, what is only read, where documents begin, what is padding.

Target i says what token i + 1 is learned as, so the token that is predicted carries the colour; a class stands behind its own token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from gpt.data.encoded import IGNORE_LABEL
from gpt.inspection.visible import character_runs, segments, special_ids

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from gpt.data.batches import Batch
    from gpt.data.tokenizer import Tokenizer

# Neighbouring tokens alternate between two shades, which can be read on black and on white; of 16 colours both greens become one.
_LEARNED = ("#22913f", "#5a9a20")
_MASKED = ("#757575", "#929292")
_SPECIAL = "#a64ac9"
_CLASS = "#c4621d"
_FAINT = "#8a8a8a"


@dataclass(frozen=True)
class Piece:
    """What is shown as one: a token, or the tokens that share a character."""

    position: int
    """Of its first token in the row."""
    ids: tuple[int, ...]
    raw: bytes
    learned: bool
    special: bool
    label: str
    """The class that is learned here, or nothing."""


@dataclass(frozen=True)
class Row:
    """One row of a batch."""

    documents: list[list[Piece]]
    places: int
    """How long the row is, in tokens."""
    learned: int
    """Targets that are learned."""
    padding: int
    """Places without a token."""


def read_rows(batch: Batch, tokenizer: Tokenizer, classes: Sequence[str] | None, n: int) -> list[Row]:
    """The first rows of a batch.

    Args:
        batch: (B, T) tokens and targets.
        tokenizer: that made them.
        classes: names of the classes, where targets are classes; None where they are the next tokens.
        n: how many rows at most.
    """
    special, rows = special_ids(tokenizer), []
    for number in range(min(n, len(batch.tokens))):
        tokens, targets = batch.tokens[number].tolist(), batch.targets[number].tolist()
        documents = None if batch.documents is None else batch.documents[number].tolist()
        rows.append(_read_row(tokens, targets, documents, tokenizer, special, classes))
    return rows


@dataclass(frozen=True)
class _Place:
    """A token that is shown, and what is learned at it."""

    position: int
    token: int
    learned: bool
    label: str = ""


def _read_row(
    tokens: list[int],
    targets: list[int],
    documents: list[int] | None,
    tokenizer: Tokenizer,
    special: set[int],
    classes: Sequence[str] | None,
) -> Row:
    padding = _padding(tokens, targets, documents)
    filled = len(tokens) - padding
    borders = [0, *(i for i in range(1, filled) if documents and documents[i] != documents[i - 1]), filled] if filled else []
    shown: list[list[Piece]] = []
    for start, stop in pairwise(borders):
        if classes is None:
            places = _predicted(tokens[start:stop], targets[start:stop], start)
        else:
            named = [(targets[i] != IGNORE_LABEL, i) for i in range(start, stop)]
            places = [_Place(i, tokens[i], is_learned, classes[targets[i]] if is_learned else "") for is_learned, i in named]
        parts = [places] if documents is not None else _documents_of_text(places, tokenizer.end_of_text)
        shown += [_pieces(part, tokenizer, special) for part in parts]
    return Row(shown, len(tokens), sum(target != IGNORE_LABEL for target in targets), padding)


def _predicted(tokens: list[int], targets: list[int], start: int) -> list[_Place]:
    """The tokens of a document, and the one behind its last where that is learned: it is predicted, but not read in this row."""
    learned = [target != IGNORE_LABEL for target in targets]
    places = [_Place(start + i, token, i > 0 and learned[i - 1]) for i, token in enumerate(tokens)]
    return [*places, _Place(start + len(tokens), targets[-1], True)] if learned[-1] else places


def _documents_of_text(places: list[_Place], end_of_text: int | None) -> list[list[_Place]]:
    """Text cut in front of each end-of-text token, which is where a document begins."""
    borders = [0, *(i for i, place in enumerate(places) if i and place.token == end_of_text), len(places)]
    return [places[start:stop] for start, stop in pairwise(borders)]


def _pieces(places: list[_Place], tokenizer: Tokenizer, special: set[int]) -> list[Piece]:
    """Tokens that share a character become one, if all or none of them are learned; of words with a class the first token has it."""
    found: list[Piece] = []
    for _, run in groupby(places, key=lambda place: (place.token in special, place.learned and not place.label)):
        alike = list(run)
        raw = tokenizer.pieces([place.token for place in alike])
        for together in character_runs(raw):
            those, whole = alike[together.start : together.stop], b"".join(raw[together.start : together.stop])
            ids, label = tuple(place.token for place in those), " ".join(place.label for place in those if place.label)
            found.append(Piece(those[0].position, ids, whole, any(place.learned for place in those), ids[0] in special, label))
    return found


def _padding(tokens: list[int], targets: list[int], documents: list[int] | None) -> int:
    """How many places at the end of a row hold no token: one id over and over, with nothing to learn, as a document of its own."""
    start = len(tokens)
    while start and tokens[start - 1] == tokens[-1] and targets[start - 1] == IGNORE_LABEL:
        start -= 1
    if documents is not None:
        border = documents.index(documents[-1])
        return len(tokens) - border if start <= border else 0
    return len(tokens) - start if len(tokens) - start > 1 else 0


def print_rows(rows: Sequence[Row], console: Console, noun: str, names_classes: bool) -> None:
    """Print rows; with colours where the console has them, else what is learned stands between « and ».

    Args:
        rows: of `read_rows`.
        console: to print on.
        noun: what a document of a row is called.
        names_classes: whether targets are classes.
    """
    from rich.text import Text

    colour = console.color_system is not None and not console.no_color
    for number, row in enumerate(rows, start=1):
        console.rule(Text(f"row {number} of {len(rows)}", style="bold"), style=_FAINT)
        for index, pieces in enumerate(row.documents, start=1):
            if len(row.documents) > 1:
                console.rule(Text(f"{noun} {index}", style=_FAINT), characters="┄", style=_FAINT, align="left")
            console.print(_as_text(pieces, colour), overflow="fold", soft_wrap=False)
        if row.padding:
            console.print(Text(f"… {row.padding:,} padding", style=_FAINT))
        console.print(Text(figures_of_row(row, noun), style="italic"))
        console.print()
    console.print(_legend(colour, names_classes))


def figures_of_row(row: Row, noun: str) -> str:
    """The figures of a row in one line."""
    count, documents = row.places - row.padding, len(row.documents)
    return (
        f"{count:,} tokens in {row.places:,} places, {row.learned:,} trained on ({row.learned / row.places:.1%} of the places), "
        f"{documents} {noun}{'' if documents == 1 else 's'}"
    )


def _as_text(pieces: Sequence[Piece], colour: bool) -> Text:
    from rich.text import Text

    text = Text(tab_size=1)
    for index, piece in enumerate(pieces):
        shades = _LEARNED if piece.learned else _MASKED
        style = f"{_SPECIAL} bold" if piece.special and piece.learned else _SPECIAL if piece.special else shades[index % 2]
        opens = piece.learned and (index == 0 or not pieces[index - 1].learned or bool(pieces[index - 1].label))
        closes = piece.learned and (index + 1 == len(pieces) or not pieces[index + 1].learned or bool(piece.label))
        text.append("«" if opens and not colour else "")
        for part, is_mark in segments(piece.raw):
            text.append(f"⟦{part}⟧" if piece.special else part, style=f"{style} italic" if is_mark else style)
        if closes and not colour:
            at_end = text.plain.endswith("\n")
            if at_end:
                text.right_crop()
            text.append("»\n" if at_end else "»")
        if piece.label:
            text.append(f"‹{piece.label}›", style=_CLASS)
    if text.plain.endswith("\n"):
        text.right_crop()
    return text


def _legend(colour: bool, names_classes: bool) -> Text:
    from rich.text import Text

    learned = ("has a class to learn" if names_classes else "trained on", _LEARNED[0])
    if colour:
        parts = [learned, ("read only", _MASKED[0]), ("⟦control token⟧", _SPECIAL)]
    else:
        parts = [(f"«{learned[0]}»", ""), ("read only", ""), ("⟦control token⟧", "")]
    if names_classes:
        parts.append(("‹class of the token before›", _CLASS))
    parts.append(("↵ line end  → tab  \\xNN a byte", _FAINT))
    if colour:
        parts.append(("shades alternate from token to token", _FAINT))
    return Text("   ").join(Text(text, style=style) for text, style in parts)
