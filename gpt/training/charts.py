"""Curves, areas and bars as SVG for the pages of runs: inline, without a script, in the colours of the page.

matplotlib is imported when something is drawn: it is heavy, and most imports of this package never draw.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]

POINTS_PER_CURVE = 2000  # more cannot be told apart on a screen, and the page would grow with the length of the run
STRETCHES = 300  # of areas, which are averaged rather than thinned
NUMBERED_CLASSES = 14  # of a confusion matrix: in more there is no room for numbers
CLASS_NAME = 14  # characters of a class's name there
SMOOTH_FROM = 20  # fewer points are not noise but the curve itself

# matplotlib wants colours, the page wants CSS variables (light, dark, print): each stand-in is drawn, then replaced in the SVG.
_NAMES = ("text", "muted", "faint", "grid", "accent", "second", *(f"series-{i}" for i in range(1, 9)))
COLOURS = {f"#0000{i:02x}": f"var(--{name})" for i, name in enumerate(_NAMES, start=1)}
TEXT, MUTED, FAINT, GRID, ACCENT, SECOND, *SERIES = COLOURS
DASHES = ("solid", (0, (5, 1.8)), (0, (1.2, 1.2)))  # colours, then dashes, tell curves apart

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # real text: it takes the font of the page, can be searched, and is small
    "font.family": "DejaVu Sans",  # comes with matplotlib; it only measures the layout
    "font.size": 9,
    "path.simplify": False,  # the curves are thinned already, and it may add points to a jagged one
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
}


@dataclass(frozen=True)
class Curve:
    """A line through points, whose x grows."""

    points: list[Point]
    label: str = ""
    """In the legend; empty: it is not named there."""
    colour: str = ACCENT
    dash: Any = "solid"
    width: float = 1.6
    opacity: float = 1.0
    dots: int = 1
    """Up to so many points are each marked; a single one has no line to be seen by."""


def noisy(points: list[Point], label: str, colour: str = ACCENT) -> list[Curve]:
    """The curve of a noisy measure: a pale one of the points and a strong one of their average; of few points one alone."""
    if not points:
        return []
    if len(points) < SMOOTH_FROM:
        return [Curve(points, label, colour)]
    return [Curve(points, "", colour, width=0.8, opacity=0.35), Curve(smooth(points), f"{label}, smoothed", colour)]


def thin(points: list[Point], limit: int = POINTS_PER_CURVE) -> list[Point]:
    """At most `limit` points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= limit:
        return points
    stretch = math.ceil(2 * len(points) / limit)
    parts = (points[start : start + stretch] for start in range(0, len(points), stretch))
    return [point for part in parts for point in sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})]


def smooth(points: list[Point]) -> list[Point]:
    """An exponential moving average forwards, then backwards: one alone trails behind a falling loss by the width of its window."""

    def average(values: list[float]) -> list[float]:
        decay, total, weight, result = 1 - 1 / max(3, len(values) / 60), 0.0, 0.0, []
        for value in values:
            total, weight = decay * total + value, decay * weight + 1
            result.append(total / weight)
        return result

    heights = average(average([y for _, y in points])[::-1])[::-1]
    return [(x, height) for (x, _), height in zip(points, heights, strict=True)]


def draw_curves(
    axes: Axes, curves: Sequence[Curve], x: str, y: str, log: bool = False, legend: bool = False, limit: int = POINTS_PER_CURVE,
    marks: Sequence[float] = (),
) -> None:  # fmt: skip
    """Draw curves over one x axis.

    Args:
        axes: where; an empty one.
        curves: at least one, each with at least one point.
        x, y: what the axes are called.
        log: a logarithmic y axis, if all values have logarithms.
        legend: whether there is one.
        limit: most points drawn of each curve.
        marks: places on the x axis that get a dashed line.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    for curve in curves:
        marker = "o" if len(curve.points) <= curve.dots else ""
        axes.plot(
            *zip(*thin(curve.points, limit), strict=True), color=curve.colour, linewidth=curve.width, linestyle=curve.dash,
            alpha=curve.opacity if curve.opacity < 1 else None, marker=marker, markersize=3.5, clip_on=False, label=curve.label or None,
        )  # fmt: skip
    for place in marks:
        axes.axvline(place, color=MUTED, linewidth=0.9, linestyle=(0, (3, 2.5)), zorder=0)
    if legend:
        axes.legend(frameon=False, labelcolor=TEXT)
    heights = [height for curve in curves for _, height in curve.points]
    log = log and min(heights) > 0
    axes.set_yscale("log" if log else "linear")
    if not log:
        axes.set_ylim(bottom=min(0, *heights), top=None if max(heights) > min(0, *heights) else 1)
    decades = math.log10(max(heights) / min(heights)) if log else 0
    powers = LogLocator(subs=(1, 2, 5) if decades < 3 else (1,))
    axes.yaxis.set_major_locator(powers if decades > 1.3 else MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.yaxis.set_minor_locator(NullLocator())
    _finish(axes, x, f"{y}, log scale" if log else y, log)


def draw_areas(axes: Axes, steps: list[float], heights: dict[str, list[float]], x: str, y: str) -> None:
    """Draw areas on top of each other, named above the chart.

    Args:
        axes: where; an empty one, with room above.
        steps: n places on the x axis.
        heights: name -> n heights, from the bottom to the top.
        x, y: what the axes are called.
    """
    from matplotlib.ticker import MaxNLocator

    stretch = math.ceil(len(steps) / STRETCHES)
    ends = [steps[min(start + stretch, len(steps)) - 1] for start in range(0, len(steps), stretch)]
    means = [_means(values, stretch) for values in heights.values()]
    if len(ends) == 1:  # an area needs a width
        ends, means = [0.0, max(ends[0], 1.0)], [values * 2 for values in means]
    axes.stackplot(ends, *means, labels=list(heights), colors=SERIES[: len(means)], linewidth=0)
    axes.legend(
        frameon=False, labelcolor=TEXT, loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=len(means),
        handlelength=0.9, handleheight=0.9, handletextpad=0.4, columnspacing=1.8,
    )  # fmt: skip
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    _finish(axes, x, y, log=False)


def draw_scatter(axes: Axes, points: Sequence[tuple[float, float, str]], front: Sequence[int], x: str, y: str, shaded: float) -> None:
    """Draw points with their names beside them, and a line through some.

    Args:
        axes: where; an empty one.
        points: (x, y, name) of each, at least one.
        front: the numbers of those on the line, from left to right.
        x, y: what the axes are called.
        shaded: up to here the y axis is shaded, from the lowest point on.
    """
    from matplotlib.ticker import MaxNLocator

    lowest, highest = min(y for _, y, _ in points), max(y for _, y, _ in points)
    left, right = min(x for x, _, _ in points), max(x for x, _, _ in points)
    start = 0.0 if left < right / 2 else max(0.0, left - 0.5 * (right - left))  # a chart whose left half is empty hides what there is
    span, width = (highest - lowest) or abs(lowest) or 1.0, (right - start) or 1.0
    axes.axhspan(lowest, shaded, color=GRID, linewidth=0, zorder=0)
    axes.plot([points[n][0] for n in front], [points[n][1] for n in front], color=ACCENT, linewidth=1.3)
    for number, (across, up, _) in enumerate(points):
        axes.plot([across], [up], "o", markersize=5.5, color=ACCENT if number in front else MUTED)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    _finish(axes, x, y, log=False)
    axes.set(xlim=(start, start + 1.12 * width), ylim=(lowest - 0.2 * span, highest + 0.14 * span))
    for (across, up, name), (dx, dy, side) in zip(points, _beside(axes, points, front), strict=True):
        apart = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3} if abs(dy) > 12 else None
        look = {"ha": side, "va": "center", "color": TEXT, "fontsize": 9, "arrowprops": apart}
        axes.annotate(name, (across, up), (dx, dy), textcoords="offset points", **look)


_PLACES = ((8, 0), (-8, 0), (0, 12), (0, -12), (7, 10), (-7, 10), (7, -10), (-7, -10), (8, 21), (-8, 21), (8, -21), (-8, -21), (8, 32))
_LETTER, _HALF_LINE = 5.8, 6  # typographic points, on a small screen


def _beside(axes: Axes, points: Sequence[tuple[float, float, str]], front: Sequence[int]) -> list[tuple[float, float, Any]]:
    """Where the name of each point goes, as an offset in typographic points and a side, so that it covers no point, name or line."""
    scale = 72 / axes.figure.dpi
    places = [tuple(scale * float(value) for value in axes.transData.transform(point[:2])) for point in points]
    room = axes.get_window_extent()
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    steps = [(places[a], places[b], n / 24) for a, b in itertools.pairwise(front) for n in range(25)]
    taken += [
        (x - 1.5, y - 1.5, x + 1.5, y + 1.5) for x, y in (((1 - s) * a[0] + s * b[0], (1 - s) * a[1] + s * b[1]) for a, b, s in steps)
    ]
    chosen: list[tuple[float, float, Any]] = []
    for (x, y), (_, _, name) in zip(places, points, strict=True):
        width, found = _LETTER * len(name), []
        for number, (dx, dy) in enumerate(_PLACES):
            left = x + dx if dx > 0 else x + dx - width if dx else x - width / 2
            box = (left, y + dy - _HALF_LINE, left + width, y + dy + _HALF_LINE)
            outside = max(0.0, box[2] - scale * room.x1 - 8) + max(0.0, scale * room.x0 - box[0]) + max(0.0, scale * room.y0 - box[1])
            hidden = sum(max(0.0, min(box[2], b[2]) - max(box[0], b[0])) * max(0.0, min(box[3], b[3]) - max(box[1], b[1])) for b in taken)
            found.append((hidden + 100 * outside, number, box))
        _, number, box = min(found)
        dx, dy = _PLACES[number]
        chosen.append((dx, dy, "left" if dx > 0 else "right" if dx else "center"))
        taken.append(box)
    return chosen


def draw_bars(axes: Axes, sizes: dict[str, float], x: str) -> None:
    """Draw lying bars, the first one in colour, with their sizes to three digits."""
    bars = axes.barh(list(sizes), list(sizes.values()), height=0.45, color=[ACCENT] + [FAINT] * (len(sizes) - 1))
    axes.bar_label(bars, [f"{value:.3f}" for value in sizes.values()], padding=5, color=TEXT, fontsize=10.5, fontweight="bold")
    axes.tick_params(axis="y", labelsize=10.5, labelcolor=TEXT)
    axes.spines["bottom"].set_visible(False)
    axes.set(xlim=(0, 1.15 * max(sizes.values())), ylim=(len(sizes) - 0.5, -0.5), xticks=[], xlabel=x)


def draw_confusion(axes: Axes, names: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
    """Draw a confusion matrix: a row for each true class, darker where more of it went.

    Args:
        axes: where; an empty one, with room on the left and below for names.
        names: of the classes.
        counts: (C, C), rows true, columns predicted.
    """
    size = len(names)
    places = [(row, column, count) for row, line in enumerate(counts) for column, count in enumerate(line) if count]
    for row, column, count in places:
        share = count / sum(counts[row])
        colour = ACCENT if row == column else SECOND
        axes.fill_between([column, column + 1], row, row + 1, color=colour, alpha=0.08 + 0.72 * share, linewidth=0)
        if size <= NUMBERED_CLASSES:
            axes.text(column + 0.5, row + 0.5, short(count), ha="center", va="center", color=TEXT, fontsize=8 if size > 8 else 9)
    middle = [number + 0.5 for number in range(size)]
    cut = [name if len(name) <= CLASS_NAME else f"{name[: CLASS_NAME - 1]}…" for name in names]
    axes.set_xticks(middle, cut, rotation=90 if size > 5 else 0, parse_math=False)
    axes.set_yticks(middle, cut, parse_math=False)
    axes.tick_params(labelsize=8 if size <= NUMBERED_CLASSES else 5)
    axes.spines["bottom"].set_visible(False)
    axes.set(xlim=(0, size), ylim=(size, 0), xlabel="predicted", ylabel="true")


def svg(name: str, draw: Callable[[Axes], None], left: float = 0.125, top: float = 0.96, bottom: float = 0.15, height: float = 3.2) -> str:
    """What `draw` draws, as an element for an HTML page: no metadata, no global style, the colours of the page.

    Args:
        name: of the chart, another for each on a page: it keeps their ids apart.
        draw: draws into empty axes.
        left, top, bottom: where these begin and end, as shares of the chart. To have matplotlib measure them takes as long as all the rest.
        height: of the chart, which is 5.6 wide.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(5.6, height), facecolor="none")
        figure.subplots_adjust(left=left, right=0.98, bottom=bottom, top=top)
        axes = figure.add_subplot(facecolor="none")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        axes.set_axisbelow(True)
        draw(axes)
        axes.yaxis.set_label_coords(0.028, (bottom + top) / 2, transform=figure.transFigure)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = target.getvalue()
    text = re.sub(r"<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    return re.sub("|".join(COLOURS), lambda colour: COLOURS[colour[0]], text)


def _finish(axes: Axes, x: str, y: str, log: bool) -> None:
    """What all charts over an x axis have in common."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=x == "step"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value, axes.get_xlim()[1])))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value, 0 if log else axes.get_ylim()[1])))
    axes.margins(x=0.02)
    axes.set_xlim(left=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set(xlabel=x, ylabel=y)


def _means(values: list[float], stretch: int) -> list[float]:
    parts = (values[start : start + stretch] for start in range(0, len(values), stretch))
    return [sum(part) / len(part) for part in parts]


# Numbers for people


def is_finite(value: object) -> TypeGuard[float]:
    """Whether it is a number that can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def count(number: int, noun: str) -> str:
    """`1 step`, `1,150 steps`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def short(value: float, reach: float = 0.0) -> str:
    """A number for people: 1,150 25k 4.71M 6e-5. `reach`, the largest number on an axis, gives all of them the same unit."""
    largest = max(abs(value), reach)
    steps = ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k"), (0, 1, ""))
    unit, letter = next((unit, letter) for least, unit, letter in steps if largest >= least)
    return f"{value / unit:,.{4 if letter else 6}g}{letter if value else ''}".replace("e-0", "e-")


def duration(seconds: float) -> str:
    """`38.2s`, `3m 12s`, `1h 15m`."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60:,}h {minutes % 60:02d}m"


def time_unit(seconds: float) -> tuple[str, int]:
    """The unit for an axis that reaches so far, and its seconds."""
    return ("hours", 3600) if seconds >= 7200 else ("minutes", 60) if seconds >= 120 else ("seconds", 1)
