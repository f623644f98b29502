"""metrics.jsonl: one JSON object a line, on disk at once, cut back to the checkpoint when a run resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends metrics to a file.

    Args:
        path: the file.
        resume_step: lines after this step are dropped first, as is a line that a killed process cut short.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        kept = [line for line in read_metrics(path) if line.get("step", 0) <= resume_step]
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def write(self, values: dict[str, Any]) -> OSError | None:
        """Add one line. One that cannot be written (disk full) is kept, and written before the next; why, if it is the first of such."""
        is_first = not self._unwritten
        self._unwritten += json.dumps(values).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            return error if is_first else None
        return None

    def close(self) -> None:
        """Close the file.

        Raises:
            OSError: lines that could not be written still cannot.
        """
        try:
            self._write()
        finally:
            self._file.close()

    def _write(self) -> None:
        while self._unwritten:  # as much as there is room for: the rest of a line follows when there is more
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics file; none if there is no file."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:  # cut short by a kill
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines
