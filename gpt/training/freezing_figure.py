"""What trains of a model, for its page: the table, and a picture of the model as a stack of boxes, from `trainable.json`.

The picture is SVG in the colours of the page: what is frozen is grey, what trains is in colour, and what begins to train later is in a
paler one with a dashed edge.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from gpt.finetuning.trainable import TableRow, begins, joined, table_cells
from gpt.training.charts import Point, is_finite

TRAINABLE = "trainable.json"
"""Which parameters train, module by module, in the directory of a run that freezes some."""

# In units of the picture, which is as wide as a phone's screen.
_WIDTH = 400.0
_STACK = 104.0  # width of a box
_NAME, _BAR, _BAR_WIDTH = 118.0, 262.0, 78.0
_LINE = 15.0  # of text
_BLOCK = 13.0  # height of one box of several that are alike
_MANY = 190.0  # most height of all of these together: of a deep model they are thinner
_GAP = 3.0


@dataclass(frozen=True)
class Part:
    """Some boxes of the stack that are alike, from the bottom."""

    name: str
    count: int
    trains: float
    """Share of its parameters."""
    lr: float | None
    begins: str
    """When, if not from the beginning."""


def read_rows(run_directory: Path) -> list[TableRow]:
    """The table that a run keeps; empty where it freezes nothing, or its file cannot be read."""
    try:
        rows = [TableRow(**row) for row in json.loads((run_directory / TRAINABLE).read_text(encoding="utf-8"))]
        sound = all(is_finite(row.parameters) and row.parameters > 0 and is_finite(row.trains) and is_finite(row.since) for row in rows)
        return rows if sound and all(row.lr is None or is_finite(row.lr) for row in rows) else []
    except (OSError, ValueError, TypeError):
        return []


def freezing_section(run_directory: Path) -> dict[str, Any]:
    """What the page says of freezing: the `cells` of the table, the picture as `svg`, and its `key`, pairs of a class and what it means.

    Nothing where the run freezes nothing.
    """
    rows = read_rows(run_directory)
    if not rows:
        return {}
    key = [("now", "trains")] if any(row.trains and not row.since for row in rows) else []
    key += [("later", "begins later")] if any(row.trains and row.since for row in rows) else []
    key += [("frozen", "frozen")] if any(row.trains < row.parameters for row in rows) else []
    return {"cells": table_cells(rows), "svg": draw_stack(rows), "key": [*key, ("rate", "learning rate, at its peak")]}


def stage_steps(lines: Sequence[dict[str, Any]]) -> list[float]:
    """The steps after which more parameters trained, from a run's lines of metrics, sorted: the last that was logged with fewer."""
    counted: list[Point] = [
        (line["step"], line["trainable_parameters"]) for line in lines if is_finite(line.get("trainable_parameters")) and "step" in line
    ]
    return [before[0] for before, after in itertools.pairwise(counted) if after[1] > before[1]]


def draw_stack(rows: Sequence[TableRow]) -> str:
    """The model as a stack of boxes, embeddings at the bottom, the head on top, each with its peak learning rate as a bar.

    A box is filled as far as its parameters train, from the left.
    """
    parts = _parts(rows)
    highest = max((part.lr or 0.0 for part in parts), default=0.0) or 1.0
    drawn, y = [], 1.0
    for part in reversed(parts):
        height = max(min(part.count * (_BLOCK + _GAP) - _GAP, _MANY), _LINE * (2 if part.begins else 1) + 5)
        drawn.append(_draw_part(part, y, height, highest))
        y += height + _GAP
    told = "; ".join(f"{part.name}: {_said(part)}" for part in parts)
    return (
        f'<svg viewBox="0 0 {_WIDTH:g} {y:g}" role="img" aria-label="{escape(f"From the bottom: {told}")}" font-size="12.5">\n'
        + "\n".join(drawn)
        + "\n</svg>"
    )


def _parts(rows: Sequence[TableRow]) -> list[Part]:
    """The stack from the bottom; a head that shares the weights of the embedding stands for itself, on top."""
    parts = []
    for first, last, row in joined(rows):
        block = row.module.startswith("blocks.")
        name = (f"block {first}" if first == last else f"blocks {first}–{last}") if block else row.module.replace("_", " ")
        name = {"embeddings.tokens": "token embedding", "embeddings.positions": "positions"}.get(row.module, name)
        parts.append(Part(name, last - first + 1, row.trains / row.parameters, row.lr, begins(row)))
    tokens = next((part for part in parts if part.name == "token embedding"), None)
    if tokens is not None and not any(row.module == "head" for row in rows):
        parts.append(Part("head (tied)", 1, tokens.trains, tokens.lr, tokens.begins))
    return parts


def _said(part: Part) -> str:
    if not part.trains:
        return "frozen"
    share = "" if part.trains == 1 else f"{_share(part.trains)} "
    return f"{share}trains{f' {part.begins}' if part.begins else ''} at {part.lr:.3g}"


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}" if share >= 0.00095 else f"{share:.2%}"


def _draw_part(part: Part, y: float, height: float, highest: float) -> str:
    """Its boxes, its name, and its learning rate as a bar, the highest of all being as long as there is room."""
    pitch = height / part.count
    gap = min(_GAP, pitch / 3) if part.count > 1 else 0.0
    each = (height - (part.count - 1) * gap) / part.count
    look = "fill: var(--accent)" if not part.begins else "fill: var(--accent); fill-opacity: .35"
    edge = "stroke: var(--accent); stroke-dasharray: 4 2.5" if part.trains and part.begins else "stroke: none"
    lines = []
    for number in range(part.count):
        top = y + number * (each + gap)
        place = f'x="1" y="{top:.4g}" height="{each:.4g}" rx="{min(3.0, each / 3):.3g}"'
        if part.trains < 1:
            lines.append(f'<rect {place} width="{_STACK:g}" style="fill: var(--faint)"/>')
        if part.trains:
            width = max(5.0, _STACK * part.trains)
            lines.append(f'<rect {place} width="{width:.4g}" style="{look}; {edge}"/>')
    middle = y + height / 2
    below = part.begins or (f"{_share(part.trains)} of it" if 0 < part.trains < 1 else "")
    two = bool(below) and height >= 2 * _LINE
    base = middle + 4.5 - (_LINE / 2 if two else 0)
    beside = f' <tspan style="fill: var(--muted)">{escape(below)}</tspan>' if below and not two else ""
    colour = "var(--text)" if part.trains else "var(--muted)"
    lines.append(f'<text x="{_NAME:g}" y="{base:.4g}" style="fill: {colour}">{escape(part.name)}{beside}</text>')
    if two:
        lines.append(f'<text x="{_NAME:g}" y="{base + _LINE:.4g}" style="fill: var(--muted)">{escape(below)}</text>')
    if not part.trains:
        lines.append(f'<text x="{_BAR:g}" y="{middle + 4.5:.4g}" style="fill: var(--muted)">frozen</text>')
    else:
        length = max(2.0, _BAR_WIDTH * (part.lr or 0.0) / highest)
        lines.append(f'<rect x="{_BAR:g}" y="{middle - 4:.4g}" width="{length:.4g}" height="8" rx="2" style="fill: var(--second)"/>')
        lines.append(f'<text x="{_BAR + length + 6:.4g}" y="{middle + 4.5:.4g}" style="fill: var(--text)">{part.lr or 0.0:.3g}</text>')
    return "\n".join(lines)
