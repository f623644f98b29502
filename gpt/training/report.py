"""The page that a run leaves behind: `report.html` in the run directory, one file that opens anywhere, without a network.

It shows the key figures, the curves of `metrics.jsonl` as inline SVG, samples, the config and the environment. matplotlib and
Jinja2 are imported when a report is written: they are heavy, and most imports of this package never write one.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from gpt.training.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]

POINTS_PER_CURVE = 2000  # more cannot be told apart on a screen, and the page would grow with the length of the run
SMOOTH_FROM = 20  # fewer points are not noise but the curve itself

# matplotlib wants colours, the page wants CSS variables (light, dark, print): each stand-in is drawn, then replaced in the SVG.
COLOURS = {
    f"#00000{i}": f"var(--{name})" for i, name in enumerate(("text", "muted", "faint", "grid", "accent", "light", "second"), start=1)
}
TEXT, MUTED, FAINT, GRID, ACCENT, LIGHT, SECOND = COLOURS

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # real text: it takes the font of the page, can be searched, and is small
    "font.family": "DejaVu Sans",  # comes with matplotlib; it only measures the layout
    "font.size": 9,
    "path.simplify": False,  # the curves are thinned already, and it may add points to a jagged one
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
}


@dataclass(frozen=True)
class Sample:
    """A prompt and the continuation that the model wrote."""

    prompt: str
    text: str
    expected: str = ""
    """How the held-out text goes on there, where the prompt is its beginning."""


@dataclass(frozen=True)
class Summary:
    """The key figures of a run; None stands for what was not measured."""

    title: str  # the run id
    model: str  # for people, such as "nano, 2.2M parameters, Qwen3 shape"
    steps: int
    tokens: int  # trained on
    seconds: float  # of training
    tokens_per_second: float
    best_val_loss: float | None  # nats per token
    best_step: int | None
    val_bpb: float | None  # bits per byte over all of the held-out text
    gzip_bpb: float | None  # of the same text under gzip -9
    xz_bpb: float | None  # of the same text under xz -9e
    skipped_steps: int  # without an update
    finished: bool  # False: interrupted
    held_out: str = "held-out text"  # what the bits per byte are of


def write_report(run_directory: Path, samples: list[Sample], summary: Summary) -> Path:
    """Write `report.html` from the files of a run: `metrics.jsonl`, `config.yaml` and `environment.json`, each of which may be missing.

    An earlier page is replaced in one move, so a reader never sees half of one.

    Returns:
        The path of the page.
    """
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = templates.get_template("report.html.jinja").render(
        summary=summary,
        status=f"{'Finished' if summary.finished else 'Interrupted'} after {_count(summary.steps, 'step')}",
        skipped=f"{_count(summary.skipped_steps, 'step')} skipped" if summary.skipped_steps else "",
        cards=_cards(summary),
        charts=_charts(_by_step(read_metrics(run_directory / "metrics.jsonl")), summary),
        samples=samples,
        config=_read_text(run_directory / "config.yaml").rstrip(),
        environment=_read_environment(run_directory / "environment.json"),
    )
    path, aside = run_directory / "report.html", run_directory / "report.html.tmp"
    aside.write_text(page, encoding="utf-8", errors="replace")  # a sampled text may hold half a surrogate pair
    os.replace(aside, path)
    return path


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _by_step(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines by step; of a step that was trained again after a resume, the last line counts."""
    lines = {(line["step"], "val_loss" in line): line for line in metrics if _is_finite(line.get("step"))}
    return [lines[key] for key in sorted(lines)]


def _read_environment(path: Path) -> list[tuple[str, str]]:
    """Rows of name and value; nested names are joined by a dot."""

    def rows(value: object, name: str) -> list[tuple[str, str]]:
        if isinstance(value, dict):
            return [row for key, inner in value.items() for row in rows(inner, f"{name}.{key}" if name else str(key))]
        return [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]

    try:
        return rows(json.loads(_read_text(path)), "")
    except ValueError:
        return []


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _short(value: float, reach: float = 0.0) -> str:
    """A number for people: 1,150 25k 4.71M 6e-5. `reach`, the largest number on an axis, gives all of them the same unit."""
    largest = max(abs(value), reach)
    steps = ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k"), (0, 1, ""))
    unit, letter = next((unit, letter) for least, unit, letter in steps if largest >= least)
    return f"{value / unit:,.{4 if letter else 6}g}{letter if value else ''}".replace("e-0", "e-")


def _duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60:,}h {minutes % 60:02d}m"


def _cards(summary: Summary) -> list[tuple[str, str, str]]:
    """(name, value, note) of the key figures; a dash stands for what is not known."""

    def figure(value: float | None, form: str) -> str:
        return format(value, form) if _is_finite(value) else "–"

    bits_note, best_note = f"of {summary.held_out}" if _is_finite(summary.val_bpb) else "not measured", "not measured"
    if _is_finite(summary.val_bpb) and summary.xz_bpb:
        bits_note = f"{abs(1 - summary.val_bpb / summary.xz_bpb):.0%} {'below' if summary.val_bpb < summary.xz_bpb else 'above'} xz -9e"
    if summary.best_step is not None:
        best_note = f"at step {summary.best_step:,}"
    milliseconds = 1000 * summary.seconds / max(1, summary.steps)
    result = [
        ("Bits per byte", figure(summary.val_bpb, ".3f"), bits_note),
        ("Best validation loss", figure(summary.best_val_loss, ".3f"), best_note),
        ("Tokens", _short(summary.tokens), _count(summary.steps, "step")),
        ("Training time", _duration(summary.seconds), f"{milliseconds:,.{0 if milliseconds >= 10 else 2}f} ms a step"),
        ("Tokens per second", figure(summary.tokens_per_second, ",.0f"), "over the run"),
    ]
    if found := re.search(r"(\d[\d,]*\.?\d*) ?([KMBT]?) parameters", summary.model, re.IGNORECASE):
        size = float(found[1].replace(",", "")) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[found[2].upper()]
        result.append(("Parameters", found[1] + found[2], f"{summary.tokens / size:,.1f} tokens each" if size else ""))
    return result


def _thin(points: list[Point], limit: int = POINTS_PER_CURVE) -> list[Point]:
    """At most `limit` points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= limit:
        return points
    stretch = math.ceil(2 * len(points) / limit)
    parts = (points[start : start + stretch] for start in range(0, len(points), stretch))
    return [point for part in parts for point in sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})]


def _smooth(points: list[Point]) -> list[Point]:
    """An exponential moving average forwards, then backwards: one alone trails behind a falling loss by the width of its window."""

    def average(values: list[float]) -> list[float]:
        decay, total, weight, result = 1 - 1 / max(3, len(values) / 60), 0.0, 0.0, []
        for value in values:
            total, weight = decay * total + value, decay * weight + 1
            result.append(total / weight)
        return result

    heights = average(average([y for _, y in points])[::-1])[::-1]
    return [(x, height) for (x, _), height in zip(points, heights, strict=True)]


def _charts(lines: list[dict[str, Any]], summary: Summary) -> list[tuple[str, str]]:
    """(title, SVG) of every chart that there is something to draw for."""
    longest = max((line["seconds"] for line in lines if _is_finite(line.get("seconds"))), default=0)
    unit, unit_seconds = ("hours", 3600) if longest >= 7200 else ("minutes", 60) if longest >= 120 else ("seconds", 1)
    labels, scales = {"step": "step", "seconds": f"training time, {unit}"}, {"step": 1, "seconds": unit_seconds}
    result: list[tuple[str, str]] = []

    def points(x: str, y: str) -> list[Point]:
        return [(line[x] / scales[x], line[y]) for line in lines if _is_finite(line.get(x)) and _is_finite(line.get(y))]

    def add(title: str, x: str, y: str, label: str, validation: str = "", log: bool = False, noisy: bool = True) -> None:
        raw, checks = points(x, y), points(x, validation)
        if raw or checks:
            result.append((title, _svg(title, lambda axes: _draw_curves(axes, labels[x], label, raw, checks, log, noisy))))

    add("Loss by step", "step", "loss", "loss, nats per token", "val_loss", log=True)
    named = {"this model": summary.val_bpb, "xz -9e": summary.xz_bpb, "gzip -9": summary.gzip_bpb}
    known = {name: size for name, size in named.items() if _is_finite(size)}
    if "this model" in known and len(known) > 1:
        result.append(("Held-out text, compressed", _svg("bars", lambda axes: _draw_bars(axes, known))))
    add("Loss by time", "seconds", "loss", "loss, nats per token", "val_loss", log=True)
    add("Learning rate", "step", "lr", "learning rate", noisy=False)
    add("Throughput", "step", "tokens_per_second", "tokens per second")
    add("Gradient norm", "step", "grad_norm", "gradient norm", log=True)
    return result


def _draw_curves(axes: Axes, x: str, y: str, raw: list[Point], validation: list[Point], log: bool, noisy: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    def draw(points: list[Point], color: str, width: float, dots: int = 1, **style: Any) -> None:
        marker = "o" if len(points) <= dots else ""  # a single point has no line to be seen by
        axes.plot(*zip(*_thin(points), strict=True), color=color, linewidth=width, marker=marker, markersize=3.5, clip_on=False, **style)

    if noisy and len(raw) >= SMOOTH_FROM:
        draw(raw, LIGHT, 0.8)
        draw(_smooth(raw), ACCENT, 1.6, label="training, smoothed")
    elif raw:
        draw(raw, ACCENT, 1.6, label="training")
    if validation:
        draw(validation, SECOND, 1.4, dots=40, label="validation")
        axes.legend(frameon=False, labelcolor=TEXT)
    heights = [height for _, height in raw + validation]
    log = log and min(heights) > 0
    axes.set_yscale("log" if log else "linear")
    if not log:
        axes.set_ylim(bottom=min(0, *heights))
    decades = math.log10(max(heights) / min(heights)) if log else 0
    powers = LogLocator(subs=(1, 2, 5) if decades < 3 else (1,))
    axes.yaxis.set_major_locator(powers if decades > 1.3 else MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=x == "step"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value, axes.get_xlim()[1])))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value, 0 if log else axes.get_ylim()[1])))
    axes.margins(x=0.02)
    axes.set_xlim(left=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set(xlabel=x, ylabel=f"{y}, log scale" if log else y)


def _draw_bars(axes: Axes, sizes: dict[str, float]) -> None:
    bars = axes.barh(list(sizes), list(sizes.values()), height=0.45, color=[ACCENT] + [FAINT] * (len(sizes) - 1))
    axes.bar_label(bars, [f"{value:.3f}" for value in sizes.values()], padding=5, color=TEXT, fontsize=10.5, fontweight="bold")
    axes.tick_params(axis="y", labelsize=10.5, labelcolor=TEXT)
    axes.spines["bottom"].set_visible(False)
    axes.set(xlim=(0, 1.15 * max(sizes.values())), ylim=(len(sizes) - 0.5, -0.5), xticks=[], xlabel="bits per byte, lower is better")


def _svg(name: str, draw: Callable[[Axes], None]) -> str:
    """What `draw` draws, as an element for an HTML page: no metadata, no global style, the colours of the page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):  # the salt keeps the ids of two charts apart
        figure = Figure(figsize=(5.6, 3.2), facecolor="none", layout="constrained")
        axes = figure.add_subplot(facecolor="none")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        axes.set_axisbelow(True)
        draw(axes)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = target.getvalue()
    text = re.sub(r"<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    return re.sub("|".join(COLOURS), lambda colour: COLOURS[colour[0]], text)
