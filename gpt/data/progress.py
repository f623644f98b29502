"""What a person sees on stderr while data is prepared: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

SILENT_SECONDS = 2.0
PLAIN_EVERY_SECONDS = 10.0


class PreparationProgress:
    """Shows how far it is, once it takes longer than a moment.

    Args:
        size: bytes of the source as stored, if known.
        say: takes the plain lines.
    """

    def __init__(self, size: int | None, say: Callable[[str], None]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._say, self._size = say, size
        self._bar = None
        if console.is_terminal:
            columns = (TextColumn("preparing"), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("", total=size, text="")
        self._started = self._last = time.monotonic()
        self._first: int | None = None
        self._shown = False

    def __enter__(self) -> PreparationProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None and self._shown:
            self._bar.stop()

    def update(self, documents: int, read: int, tokens: int) -> None:
        """Tell where it stands.

        Args:
            documents: so far.
            read: characters of text so far.
            tokens: so far.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = read  # a restart begins behind what was there
        if now - self._started < SILENT_SECONDS or (self._bar is None and now - self._last < PLAIN_EVERY_SECONDS):
            return
        speed = (read - self._first) / (now - self._started)
        text = f"{documents:,} documents  {read / 1e6:,.1f} MB  {speed / 1e6:.1f} MB/s  {tokens / 1e6:,.1f}M tokens"
        if self._bar is None:
            self._last = now
            self._say(text)
            return
        if not self._shown:
            self._bar.start()
            self._shown = True
        known = self._size if self._size and read <= self._size else None  # compressed text is more than its files
        self._bar.update(self._task, completed=read, total=known, text=text)
