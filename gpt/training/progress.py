"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

PLAIN_EVERY_SECONDS = 5.0


class Progress:
    """Shows a run.

    Args:
        total: steps of the run, or seconds if `timed`.
        timed: whether the run's length is a time.
    """

    def __init__(self, total: float, timed: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self.total, self.timed = total, timed
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._last_line = 0.0
        self._val = ""
        self._bar = None
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Bar(*columns, console=self.console)
            self._task = self._bar.add_task("training", total=total, text="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def validated(self, val_loss: float, val_bpb: float) -> None:
        """The latest validation, shown from here on."""
        self._val = f"  val {val_loss:.3f}  {val_bpb:.3f} bits/byte"

    def update(self, line: dict[str, Any]) -> None:
        """Show one line of training metrics."""
        done = line["seconds"] if self.timed else line["step"]
        left = _clock(self.total - done if self.timed else (self.total - done) * line["tokens"] / line["step"] / line["tokens_per_second"])
        text = f"step {line['step']}  loss {line['loss']:.3f}{self._val}  {line['tokens_per_second']:,.0f} tokens/s  {left} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
        elif time.monotonic() - self._last_line > PLAIN_EVERY_SECONDS or done >= self.total:
            self._last_line = time.monotonic()
            self.say(text)


def say(text: str) -> None:
    """A line on stderr before and after the bar."""
    print(text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
