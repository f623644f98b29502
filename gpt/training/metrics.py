"""metrics.jsonl: one JSON object a line, flushed at once, cut back to the checkpoint when a run resumes."""

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
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        kept = [line for line in read_metrics(path) if line.get("step", 0) <= resume_step]
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(aside, path)
        self._file = path.open("a")

    def write(self, values: dict[str, Any]) -> None:
        """Add one line."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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
