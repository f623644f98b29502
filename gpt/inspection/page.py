"""Pages that show data: one HTML file each, which opens anywhere, asks the network for nothing and runs no script.

Charts are SVG in percent of the width that there is, so that their letters keep one size from a phone to a wide screen.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt.errors import UserError
from gpt.inspection.positions import PositionMap, colour_bar, picture

_BARS = 36


def check_output(output: str) -> Path | None:
    """Where a page goes; None for no page.

    Raises:
        UserError: it cannot be written there.
    """
    if output in ("", "null"):
        return None
    path = Path(os.path.expanduser(output))
    if path.is_dir():
        raise UserError(f"output={output}: is a folder; name a file in it, such as {path / 'page.html'}")
    if not path.parent.is_dir():
        raise UserError(f"output={output}: there is no folder {path.parent}; make it, or write elsewhere")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"output={output}: cannot write to the folder {path.parent}; write elsewhere")
    return path


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a template of this folder into `path`, in one move.

    Raises:
        UserError: it cannot be written.
    """
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = templates.get_template(template).render(**values)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(page, encoding="utf-8", errors="backslashreplace")
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"output={path}: cannot be written: {error.strerror or error}") from error


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in percent of its length, and what stands there."""

    at: float
    text: str


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram; all in percent of the chart."""

    x: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Histogram:
    """How many documents have which length."""

    bars: list[Bar]
    across: list[Tick]
    up: list[Tick]
    context: float
    """Where the context length is; 100 also where it is beyond the end."""
    is_beyond: bool
    """Whether it is."""
    is_log: bool
    """Whether lengths are drawn by their logarithm."""


def length_histogram(lengths: np.ndarray, context_length: int) -> Histogram:
    """The histogram of lengths in tokens, by their logarithm where a few are far longer than most."""
    top, middle = int(lengths.max()), float(np.median(lengths))
    is_log = top > 12 * middle
    fits = context_length + 1  # the border of a bar, so that none mixes what fits with what does not
    end = max(top + 1, fits) if is_log or context_length <= 4 * top else top + 1
    if is_log:
        low = max(1, int(lengths.min()))
        edges = np.union1d(np.geomspace(low, end, _BARS + 1).round().astype(np.int64), max(low, fits))
    else:
        low, step = 0, max(1, _nice(end / _BARS))
        edges = np.unique([0, *range(fits % step, end + step, step)])
        end = int(edges[-1])

    def place(length: float) -> float:
        share = math.log(max(low, length) / low) / math.log(end / low) if is_log else length / end
        return round(100 * share, 3)

    counts, _ = np.histogram(np.maximum(lengths, low), edges)
    marks, highest = axis_ticks(int(counts.max()))
    bars = [
        Bar(place(start), round(place(stop) - place(start), 3), round(100 * count / highest, 3), f"{_span(start, stop)}: {count:,}")
        for start, stop, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
        if count
    ]
    across = [Tick(place(value), f"{value:,}") for value in (_powers(low, end) if is_log else axis_ticks(end, 5)[0]) if value <= end]
    up = [Tick(100 * value / highest, f"{value:,}") for value in marks]
    is_beyond = fits > end
    return Histogram(bars, across, up, 100.0 if is_beyond else place(fits), is_beyond, is_log)


def _span(start: int, stop: int) -> str:
    if stop > start + 1:
        return f"{start:,} to {stop - 1:,} tokens"
    return f"{start:,} token{'' if start == 1 else 's'}"


def axis_ticks(reach: int, most: int = 4) -> tuple[list[int], int]:
    """Round numbers from 0 to at least `reach`, and the last of them."""
    step = max(1, _nice(reach / most))
    values = list(range(0, reach + step, step))
    return values, values[-1]


def _powers(low: int, end: int) -> list[int]:
    """Powers of ten of an axis, or of two where it is short."""
    base = 10 if end > 100 * low else 2
    return [base**i for i in range(64) if low <= base**i <= end]


def _nice(step: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50 ..."""
    power = 10 ** math.floor(math.log10(max(1.0, step)))
    return next(int(f * power) for f in (1, 2, 5, 10) if f * power >= step)


@dataclass(frozen=True)
class PositionsChart:
    """A heat map of positions for the page: the picture and its axes."""

    picture: str
    width: int
    """At most, in pixels."""
    height: int
    rendering: str
    down: list[Tick]
    across: list[Tick]
    end: float | None
    """Where the text ends, in percent of the height; None: not within the picture."""
    scale: str
    low: str
    high: str


def positions_chart(found: PositionMap, tokens: int) -> PositionsChart:
    """Lay out the heat map of a text of so many tokens."""
    length, width = found.values.shape
    reach = f"{found.reach:.2g}"

    def ticks(count: int) -> list[Tick]:
        return [Tick(round(100 * (value + 0.5) / count, 3), f"{value:,}") for value in axis_ticks(count, 6)[0] if value < count]

    return PositionsChart(
        picture(found), max(240, 12 * width), min(640, max(120, 8 * length)), "pixelated" if width <= 320 and length <= 320 else "auto",
        ticks(length), ticks(width), round(100 * tokens / length, 3) if tokens < length else None, colour_bar(), f"-{reach}", reach,
    )  # fmt: skip


def flat_rows(value: object, name: str = "") -> list[tuple[str, str]]:
    """Nested values as rows of name and text; names are joined by a dot, and what is empty is left out."""
    if isinstance(value, dict):
        return [row for key, inner in value.items() for row in flat_rows(inner, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        return [row for number, inner in enumerate(value, start=1) for row in flat_rows(inner, f"{name} {number}")]
    if value is None or value in ("", []):
        return []
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [(name, ", ".join(map(str, value)))]
    return [(name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))]
