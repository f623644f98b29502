"""The table of what trains: its rows, which a run keeps in `trainable.json`, and its text. Imports no torch: pages are drawn from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TableRow:
    """A module of the table of what trains."""

    module: str
    parameters: int
    trains: int
    """How many of them train, now or later."""
    lr: float | None
    """Peak learning rate; of several the highest. None: none trains."""
    since: float
    """When the last of them begin: 0: at the beginning; else as `Stage.at`."""
    first: int
    """How many train from the beginning."""


HEAD = ("module", "parameters", "trains", "learning rate", "")


def table_cells(rows: Sequence[TableRow]) -> list[tuple[str, str, str, str, str]]:
    """The lines of the table below `HEAD`, the last of which is of all; blocks that are alike are one line."""
    lines = []
    for first, last, row in joined(rows):
        module = row.module if first == last else f"blocks.{first}-{last}"
        count = last - first + 1
        trains = "no" if not row.trains else "yes" if row.trains == row.parameters else f"{count * row.trains:,}"
        lines.append((module, f"{count * row.parameters:,}", trains, "" if row.lr is None else f"{row.lr:.3g}", begins(row)))
    trains, total = counts(rows)
    when = "at the beginning" if any(row.since for row in rows) else ""
    lines.append(("in all", f"{total:,}", f"{trains:,} ({trains / total:.1%})", "", when))
    return lines


def counts(rows: Sequence[TableRow]) -> tuple[int, int]:
    """How many parameters train at the beginning, and how many there are."""
    return sum(row.first for row in rows), sum(row.parameters for row in rows)


def begins(row: TableRow) -> str:
    """`from step 500 on`, `after 50% of the run`; empty for what trains from the beginning, or never."""
    return "" if not row.since else f"from step {row.since:g} on" if row.since >= 1 else f"after {row.since:.0%} of the run"


def write_table(rows: Sequence[TableRow]) -> str:
    """The table as text."""
    lines = [HEAD, *table_cells(rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    padded = (
        [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:4], widths[1:], strict=False))] for line in lines
    )
    return "\n".join("  ".join([*cells, line[4]]).rstrip() for cells, line in zip(padded, lines, strict=True))


def joined(rows: Sequence[TableRow]) -> list[tuple[int, int, TableRow]]:
    """Rows, with runs of like blocks as the numbers of the first and the last; (0, 0) for what is no block."""
    found: list[tuple[int, int, TableRow]] = []
    for row in rows:
        number = int(row.module.removeprefix("blocks.")) if row.module.startswith("blocks.") else -1
        if number > 0 and found[-1][2].module.startswith("blocks.") and _alike(found[-1][2], row):
            found[-1] = (found[-1][0], number, found[-1][2])
        else:
            found.append((max(number, 0), max(number, 0), row))
    return found


def _alike(a: TableRow, b: TableRow) -> bool:
    return (a.parameters, a.trains, a.lr, a.since) == (b.parameters, b.trains, b.lr, b.since)
