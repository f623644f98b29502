"""A page that compares runs: their curves in the same charts, the best first, and the keys of the config in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.config import RunConfig
from gpt.errors import UserError
from gpt.runs.listing import ORDERS, RunRow, describe_run
from gpt.training.charts import (
    COLOURS,
    DASHES,
    POINTS_PER_CURVE,
    SERIES,
    SMOOTH_FROM,
    Curve,
    Point,
    draw_curves,
    duration,
    is_finite,
    short,
    smooth,
    svg,
    time_unit,
)
from gpt.training.metrics import read_metrics
from gpt.training.page import write_page
from gpt.training.run_record import flat
from gpt.typed import shown

MOST_CURVES = len(SERIES) * len(DASHES)
_FEW = 3  # settings that are named in the legend too
_OWN = ("run.id", "run.dir", "resume")  # differ in any two runs and say nothing about them


@dataclass(frozen=True)
class Shown:
    """A run on the page."""

    row: RunRow
    name: str
    colour: str = ""
    """CSS; empty: it has no curves on this page."""
    dash: str = ""
    """The SVG attribute stroke-dasharray."""
    settings: str = ""
    """In which it differs from the others, if they are few."""


@dataclass(frozen=True)
class Lead:
    """What a page says first, where the runs are the tries of a search."""

    says: str
    """What to do."""
    command: str
    """With which command; empty: none."""
    head: tuple[str, ...]
    """The names of the columns of a table."""
    rows: list[tuple[str, ...]]
    charts: list[tuple[str, str, str]]
    """Title, SVG and a note."""


def write_comparison(runs: Sequence[Path], page: Path, title: str, lead: Lead | None = None) -> Path:
    """Write a page with the curves of runs, a table of them and one of the settings in which they differ.

    Args:
        runs: run directories, whole or not, at least one. Only the best `MOST_CURVES` have curves.
        page: the file to write.
        title: of the page.
        lead: what comes before the runs.

    Returns:
        `page`.

    Raises:
        UserError: the page cannot be written.
    """
    rows = sorted(map(describe_run, runs), key=ORDERS["val_loss"])
    differing = differing_keys(rows)
    few = differing if len(differing) <= _FEW else {}
    named = [
        Shown(row, name, *_look(i), " ".join(f"{key.rpartition('.')[2]}={values[i]}" for key, values in few.items()))
        for i, (row, name) in enumerate(zip(rows, short_names([row.path for row in rows]), strict=True))
    ]
    try:
        write_page(
            page,
            Path(__file__).with_name("compare.html.jinja"),
            title=title,
            lead=lead,
            legend=named[:MOST_CURVES],
            charts=_charts(named[:MOST_CURVES]),
            runs=[(run, _figures(run.row)) for run in named],
            figures=FIGURES,
            differing=differing,
        )
    except OSError as error:
        raise UserError(f"output={page}: cannot be written: {error.strerror or error}") from error
    return page


def short_names(paths: Sequence[Path]) -> list[str]:
    """What to call runs: their ids, or their paths where two have the same one."""
    ids = [path.resolve().name for path in paths]
    return [name if ids.count(name) == 1 else str(path) for name, path in zip(ids, paths, strict=True)]


def differing_keys(rows: Sequence[RunRow]) -> dict[str, list[str]]:
    """Key of the config -> its value in each run, for those in which they differ. What an older run does not name has its default."""
    defaults = flat(RunConfig().to_dict())
    configs = [defaults | flat(row.config) if row.config else {} for row in rows]
    keys = [key for key in dict.fromkeys(key for config in configs for key in config) if key not in _OWN]
    values = {key: [shown(config[key]) if key in config else "–" for config in configs] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}


FIGURES = ("state", "best val loss", "at step", "bits/byte", "last loss", "steps", "tokens learned", "time", "learned/s")
"""Learned tokens are those that the loss is of: in fine-tuning the completions', of a classifier one for each example."""


def _figures(row: RunRow) -> list[str]:
    """The cells of a row, in the order of FIGURES."""

    def figure(value: float | None, form: str = ".4f") -> str:
        return "–" if value is None else format(value, form)

    state = f"{row.state}: {row.problem}" if row.problem else row.state
    steps = f"{row.step:,}" + (f" of {row.total:,}" if row.total and row.total > row.step else "")
    rate = f"{row.tokens / row.seconds:,.0f}" if row.seconds else "–"
    losses = (figure(row.best_val_loss), figure(row.best_step, ","), figure(row.val_bpb, ".3f"), figure(row.last_loss))
    return [state, *losses, steps, short(row.tokens), duration(row.seconds), rate]


def _look(number: int) -> tuple[str, str]:
    """The colour and the dashes of a run, in CSS."""
    if number >= MOST_CURVES:
        return "", ""
    dash = DASHES[number // len(SERIES)]
    return COLOURS[SERIES[number % len(SERIES)]], "" if isinstance(dash, str) else " ".join(f"{2 * length:g}" for length in dash[1])


def _charts(runs: Sequence[Shown]) -> list[tuple[str, str]]:
    """(title, SVG) of every chart that there is something to draw for."""
    metrics = [read_metrics(run.row.path / "metrics.jsonl") for run in runs]
    unit, unit_seconds = time_unit(max((run.row.seconds for run in runs), default=0))
    scales, time = {"seconds": unit_seconds}, f"training time, {unit}"
    limit = max(200, POINTS_PER_CURVE // len(runs))
    result: list[tuple[str, str]] = []

    def points(lines: list[dict[str, Any]], x: str, y: str) -> list[Point]:
        kept = {line[x]: line[y] for line in lines if is_finite(line.get(x)) and is_finite(line.get(y))}  # of steps trained twice the last
        return [(place / scales.get(x, 1), kept[place]) for place in sorted(kept)]

    def add(title: str, x: str, y: str, x_label: str, y_label: str, log: bool = False, noise: bool = False, dots: int = 1) -> None:
        curves = []
        for number, lines in enumerate(metrics):
            found = points(lines, x, y)
            found = smooth(found) if noise and len(found) >= SMOOTH_FROM else found
            look = {"colour": SERIES[number % len(SERIES)], "dash": DASHES[number // len(SERIES)]}
            curves += [Curve(found, width=1.4, dots=dots, **look)] if found else []
        curves.reverse()  # the best on top
        if curves:
            result.append((title, svg(title, lambda axes: draw_curves(axes, curves, x_label, y_label, log, limit=limit))))

    loss, dots = "loss, nats per token", 40 if len(runs) <= len(SERIES) else 1
    add("Validation loss by tokens", "tokens", "val_loss", "tokens learned", loss, log=True, dots=dots)
    add("Validation loss by time", "seconds", "val_loss", time, loss, log=True, dots=dots)
    add("Training loss by step", "step", "loss", "step", loss, log=True, noise=True)
    add("Training loss by tokens", "tokens", "loss", "tokens learned", loss, log=True, noise=True)
    add("Training loss by time", "seconds", "loss", time, loss, log=True, noise=True)
    add("Learning rate", "step", "lr", "step", "learning rate")
    add("Throughput", "step", "tokens_per_second", "step", "tokens per second", noise=True)
    add("Gradient norm", "step", "grad_norm", "step", "gradient norm", log=True, noise=True)
    return result
