"""The runs of a folder as a table for the terminal. Imports nothing heavy: hundreds of runs are listed in a second."""

from __future__ import annotations

import difflib
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpt.errors import UserError
from gpt.training.charts import count, duration
from gpt.training.run_record import RunRow, describe_run, is_run

__all__ = ["ORDERS", "RunRow", "describe_run", "find_run", "find_runs", "format_table"]

ORDERS: dict[str, Callable[[RunRow], Any]] = {
    "started": lambda run: run.started,
    "val_loss": lambda run: math.inf if run.best_val_loss is None else run.best_val_loss,
    "time": lambda run: run.seconds,
    "step": lambda run: run.step,
}


def find_runs(directory: Path) -> list[Path]:
    """The run directories in a folder, and in its folders that are none themselves, such as those of sweeps."""
    found = []
    for path in _folders(directory):
        found += [path] if is_run(path) else [inner for inner in _folders(path) if is_run(inner)]
    return found


def find_run(name: str, directory: Path) -> Path:
    """A run by its path, its id, or as much of the beginning or the end of its id as no other run has.

    Args:
        name: what the user wrote.
        directory: where ids are looked up.

    Raises:
        UserError: there is none, or several.
    """
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):  # which takes names that are too long
        if is_run(path):
            return path
        inside = find_runs(path)
        raise UserError(f"runs: {name} is no run directory" + (f" but holds {count(len(inside), 'run')}; name some" if inside else ""))
    runs = {path.relative_to(directory).as_posix(): path for path in find_runs(directory)}
    if name in runs:
        return runs[name]
    close = [known for known in runs if known.startswith(name) or known.endswith(name)]
    if len(close) == 1:
        return runs[close[0]]
    if close:
        raise UserError(f"runs: {name} may be {_some(close)}; write more of the name")
    known = {key: known for known, path in runs.items() for key in (path.name, known, str(path))}
    near = difflib.get_close_matches(name, known, 1, 0.6)
    hint = f". Did you mean {known[near[0]]}?" if near else f". There are {_some(list(runs))}" if runs else ""
    raise UserError(f"runs: {name}: no such run in {directory}{hint}")


def format_table(rows: Sequence[RunRow], names: Sequence[str] = ()) -> str:
    """Runs as text, one a line in the order given, the totals below.

    Args:
        rows: the runs.
        names: what each is called; its id if none are given.
    """
    head = ("run", "state", "step", "best val loss", "bits/byte", "last loss", "time", "size")
    lines = [_cells(row, name) for row, name in zip(rows, names or [row.id for row in rows], strict=True)]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    aligned = ["  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(cells)) for cells in (head, *lines)]
    problems = ["", *(f"  ({row.problem})" if row.problem else "" for row in rows)]
    states = ", ".join(f"{number} {state}" for state, number in Counter(row.state for row in rows).most_common())
    totals = f"{count(len(rows), 'run')} ({states}), {duration(sum(r.seconds for r in rows))}, {_size(sum(r.size_bytes for r in rows))}"
    return "\n".join([*(f"{line}{problem}".rstrip() for line, problem in zip(aligned, problems, strict=True)), "", totals])


def _cells(row: RunRow, name: str) -> tuple[str, ...]:
    def figure(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    step = f"{row.step:,}" + (f" of {row.total:,}" if row.total and row.state != "finished" else "")
    best = figure(row.best_val_loss) + (f" at {row.best_step:,}" if row.best_step is not None else "")
    time = duration(row.seconds) + (f" of {duration(row.total_seconds)}" if row.total_seconds and row.state != "finished" else "")
    return name, row.state, step, best, figure(row.val_bpb), figure(row.last_loss), time, _size(row.size_bytes)


def _size(number: float) -> str:
    """Bytes for people, in powers of ten, as file managers count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.{0 if unit == 'B' or number >= 99.5 else 1}f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _folders(directory: Path) -> list[Path]:
    try:
        with os.scandir(directory) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:  # gone, or not for us to read
        return []
