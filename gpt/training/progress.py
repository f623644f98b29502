"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from types import TracebackType
from typing import Any

PLAIN_EVERY_SECONDS = 5.0
LEAST_BAR = 9  # columns, with the blank behind it


class Progress:
    """Shows a run.

    Args:
        total: steps of the run, or seconds if `timed`.
        timed: whether the run's length is a time.
        quiet: show nothing: another process does.
        batch_tokens: of a step; None: as many as are learned.
    """

    def __init__(self, total: float, timed: bool, quiet: bool = False, batch_tokens: int | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        self.total, self.timed, self.batch_tokens = total, timed, batch_tokens
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._thousands = "" if "SM_CURRENT_HOST" in os.environ else ","  # in a training job, CloudWatch is to read the number
        self._last_line = 0.0
        self._val: tuple[str, str] | None = None
        self._bar = None
        if self.console.is_terminal and not quiet:
            columns = (BarColumn(bar_width=None), TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True)))
            self._bar = Bar(*columns, console=self.console, expand=True)
            self._task = self._bar.add_task("training", total=total, text="starting")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        with contextlib.suppress(OSError):  # a log file on a full disk: training goes on
            self.console.print(text, markup=False)

    def validated(self, line: dict[str, Any]) -> None:
        """The metrics of the latest validation, shown from here on."""
        second = next((f"accuracy {line[name]:.3f}" for name in ("val_accuracy", "val_reward_accuracy") if name in line), None)
        second = second or f"{line['val_bpb']:.3f} bits/byte"
        self._val = f"val {line['val_loss']:.3f}", second

    def update(self, line: dict[str, Any]) -> None:
        """Show one line of training metrics."""
        done = line["seconds"] if self.timed else line["step"]
        each = self.batch_tokens or line["tokens"] / line["step"]
        left = _clock(self.total - done if self.timed else (self.total - done) * each / line["tokens_per_second"])
        parts = [f"step {line['step']}", f"loss {line['loss']:.3f}", *(self._val or ())]
        parts.append(f"{line['tokens_per_second']:{self._thousands}.0f} tokens/s")
        if line.get("mfu") is not None:
            parts.append(f"mfu {line['mfu']:.1%}")
        parts.append(f"{left} left")
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=fitting(parts, self.console.width - LEAST_BAR))
        elif time.monotonic() - self._last_line > PLAIN_EVERY_SECONDS or done >= self.total:
            self._last_line = time.monotonic()
            self.say("  ".join(parts))


def fitting(parts: list[str], width: int) -> str:
    """As many of the parts as fit into a width, two blanks between; what the line can best do without goes first."""
    for dispensable in ("bits/byte", "accuracy", "mfu", "tokens/s", "val", "left"):
        if len("  ".join(parts)) <= width:
            break
        parts = [part for part in parts if dispensable not in part.split()]
    return "  ".join(parts)


def say(text: str) -> None:
    """A line on stderr before and after the bar."""
    with contextlib.suppress(OSError):  # a log file on a full disk: training goes on
        print(text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
