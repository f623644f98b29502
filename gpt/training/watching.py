"""What people see of a run while it goes on: the bar, metrics.jsonl, a tracker, and the page, which all get the same lines.

Of several processes only the main one shows anything; to the others all of this is silent.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from gpt.config import RunConfig
from gpt.training.metrics import MetricsFile
from gpt.training.progress import Progress
from gpt.training.report import LiveReport
from gpt.training.run_directory import RunDirectory
from gpt.training.tracking import Tracker, open_tracker

_LAST_SECONDS = 3.0  # that a tracker gets of an interrupted run, which must be gone in ten


class Watching:
    """Shows a run; to be entered.

    Args:
        config: the run.
        directory: where its files are.
        step: that it goes on from.
        total: its length in steps, or in seconds if `timed`.
        timed: whether its length is a time.
        is_main: whether this process shows anything.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory, step: int, total: float, timed: bool, is_main: bool) -> None:
        self._config, self._directory, self._step, self._is_main = config, directory, step, is_main
        self._progress = Progress(total, timed, quiet=not is_main, batch_tokens=config.train.batch_tokens)
        self._metrics: MetricsFile | None = None
        self._tracker: Tracker | None = None
        self._report: LiveReport | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Watching:
        self._stack.enter_context(self._progress)
        if self._is_main:
            path = self._directory.path
            self._metrics = MetricsFile(self._directory.metrics, self._step)
            self._stack.callback(lambda: self._metrics and self._metrics.close())
            self._tracker = open_tracker(self._config.tracking, path.name, path, self._config.to_dict(), self._step, self.say)
            if self._tracker is not None:
                self._stack.callback(self._tracker.finish)
            self._report = LiveReport(path, say=self.say)
            self._stack.callback(self._report.close)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.stopped()
        self._stack.close()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._progress.say(text)

    def log(self, line: dict[str, Any]) -> None:
        """Metrics of training, or of a validation (with `val_loss`), with their `step`."""
        if self._metrics is None:
            return
        self.keep()
        if problem := self._metrics.write(line):
            self.say(f"warning: {self._directory.metrics} could not be written ({problem}); training goes on, and its lines wait for room")
        if "val_loss" in line:
            self._progress.validated(line)
        else:
            self._progress.update(line)
        if self._tracker is not None:
            self._tracker.log(line, line["step"])
        if self._report is not None:
            self._report.refresh()

    def keep(self) -> None:
        """Where someone has removed the run directory, make it again, so that what is still to come has a place."""
        if self._metrics is not None and self._directory.restored():
            self._metrics.close()
            self._metrics = MetricsFile(self._directory.metrics, sys.maxsize)
            self.say(f"warning: {self._directory.path} or its lock was removed while the run goes on; what comes now is kept")

    def stopped(self) -> None:
        """The run ends before its last step: what is still to be shown of it is, within seconds."""
        if self._tracker is not None:
            self._tracker.finish(_LAST_SECONDS)
        if self._report is not None:
            self._report.close(stopped=True)
