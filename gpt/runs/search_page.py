"""What a search for a plan of freezing has found: a table for the terminal, and the page with loss against time and against memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpt.finetuning.search import CLOSE, Tried, pareto, short_plan
from gpt.finetuning.trainable import counts
from gpt.runs.compare import Lead, write_comparison
from gpt.training.charts import draw_scatter, duration, is_finite, svg, time_unit
from gpt.training.freezing_figure import read_rows
from gpt.training.metrics import read_metrics

HEAD = ("plan", "trains", "val loss", "time", "tokens/s", "memory")


def measure(run: Path) -> tuple[list[float], int | None, float]:
    """What a run's files say beside `describe_run`: its rates in tokens/s, its peak memory in bytes, and the share that trains."""
    lines = read_metrics(run / "metrics.jsonl")
    rates = [line["tokens_per_second"] for line in lines if is_finite(line.get("tokens_per_second"))]
    memory = [int(line["memory_bytes"]) for line in lines if is_finite(line.get("memory_bytes"))]
    trains, total = counts(read_rows(run)) if read_rows(run) else (1, 1)
    return rates, max(memory, default=None), trains / total


def format_tries(tries: Sequence[Tried]) -> str:
    """A line per try, in the order given; why those failed that did."""
    lines = [(*HEAD, "state", ""), *((*_cells(one), one.state, one.note) for one in tries)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = ["<", *">" * (len(HEAD) - 1), "<", "<"]
    return "\n".join("  ".join(map("{:{}{}}".format, line, sides, widths)).rstrip() for line in lines)


def write_search_page(runs: Sequence[Path], page: Path, title: str, tries: Sequence[Tried], says: str, command: str, timed: bool) -> Path:
    """Write the page that compares the tries: the advice, the table, loss against time and memory, then all curves.

    Args:
        runs: the run directories of the tries that have begun.
        page: the file to write.
        title: of the page.
        tries: what came of them.
        says: the advice.
        command: that follows it.
        timed: all of them trained for the same time.

    Returns:
        `page`.

    Raises:
        UserError: it cannot be written.
    """
    rows = [(*_cells(one), f"{one.state}: {one.note}" if one.note else one.state) for one in tries]
    return write_comparison(runs, page, title, Lead(says, command, (*HEAD, "state"), rows, _charts(tries, timed)))


def _charts(tries: Sequence[Tried], timed: bool) -> list[tuple[str, str, str]]:
    """(title, SVG, note) of the loss against what it takes."""
    whole = [(one, one.loss) for one in tries if one.state == "finished" and one.loss is not None and is_finite(one.loss)]
    if not whole:
        return []
    losses, names = [loss for _, loss in whole], [short_plan(one.plan) for one, _ in whole]
    costs = [one.cost(timed) for one, _ in whole]
    unit, unit_seconds = time_unit(max(costs))
    what = f"{unit} for a million tokens" if timed else f"training time, {unit}"
    axes = [("Loss against time", [cost / unit_seconds for cost in costs], what)]
    if all(one.memory for one, _ in whole):
        axes.append(("Loss against memory", [(one.memory or 0) / 2**30 for one, _ in whole], "peak memory, GiB"))
    result = []
    for title, values, label in axes:
        points = list(zip(values, losses, names, strict=True))
        front = pareto([point[:2] for point in points])
        limit = min(losses) * (1 + CLOSE)

        def draw(where, points=points, front=front, label=label, limit=limit) -> None:
            draw_scatter(where, points, front, label, "best validation loss, nats per token", limit)

        result.append((title, svg(title, draw), f"On the line: what no other plan beats in both. Shaded: within {CLOSE:.0%} of the best."))
    return result


def _cells(one: Tried) -> tuple[str, ...]:
    """The cells of a line, in the order of HEAD."""
    share = "-" if one.share is None else f"{one.share:.1%}" if one.share >= 0.001 else f"{one.share:.3%}"
    loss = "-" if one.loss is None else f"{one.loss:.4f}"
    rate = "-" if one.tokens_per_second is None else f"{one.tokens_per_second:,.0f}"
    memory = "-" if one.memory is None else f"{one.memory / 2**30:.2f} GiB"
    return one.plan, share, loss, duration(one.seconds) if one.seconds else "-", rate, memory
