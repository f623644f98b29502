"""profile=true: some steps of a run recorded with torch.profiler, as a trace for a browser and a table of the dearest operations."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from gpt.runtime.device import Device

SKIPPED_STEPS = 5  # compilation and warm caches first; the last of them already runs under the profiler
RECORDED_STEPS = 3
DEAREST = 10
NAME_WIDTH = 60


class Profiler:
    """Records steps 6 to 8 after its making; call `step` after every step of training.

    Args:
        directory: the trace goes to trace.json.gz in it (open it in ui.perfetto.dev or chrome://tracing).
        device: of the run; times are of this device.
        say: takes the lines for people.
    """

    def __init__(self, directory: Path, device: Device, say: Callable[[str], None]) -> None:
        self._directory, self._say = directory, say
        activities = [ProfilerActivity.CPU]
        if not device.is_host:
            activities += [a for a in torch.profiler.supported_activities() if a != ProfilerActivity.CPU]
        self._on_cpu = len(activities) == 1
        if self._on_cpu and not device.is_host:
            say(f"profile: torch.profiler cannot look into {device.type}; the times are the host's")
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler's library writes two lines of its own
        self._steps = 0
        window = schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=RECORDED_STEPS, repeat=1)
        self._profile: profile | None = profile(activities=activities, schedule=window).__enter__()

    def step(self) -> None:
        """A step of training is done."""
        if self._profile is None:
            return
        self._steps += 1
        if self._steps == SKIPPED_STEPS + RECORDED_STEPS:
            self._finish(RECORDED_STEPS)
        else:
            self._profile.step()

    def close(self) -> None:
        """Training is over (call it before what comes after it): if that came too soon, write and say what there is."""
        if self._profile is None:
            return
        recorded = self._steps - SKIPPED_STEPS
        if recorded > 0:
            self._say(f"profile: the run ended after {recorded} of the {RECORDED_STEPS} steps to be recorded")
            self._finish(recorded)
        else:
            self._profile.stop()
            self._profile = None
            needed = SKIPPED_STEPS + RECORDED_STEPS
            self._say(f"profile: the run ended after {self._steps} steps, and the profiler needs {needed}: nothing was recorded")

    def _finish(self, steps: int) -> None:
        """Stop, once and for all, and write the trace and the table."""
        assert self._profile is not None
        finished, self._profile = self._profile, None
        finished.stop()
        try:
            path = self._write(finished)
        except (OSError, RuntimeError) as error:  # a full disk: the run goes on
            self._say(f"profile: the trace could not be written ({error})")
        else:
            self._say(f"profile: {path} (open it in ui.perfetto.dev)")
        for line in dearest_operations(finished.key_averages(), steps, self._on_cpu):
            self._say(line)

    def _write(self, finished: profile) -> Path:
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / "trace.json.gz"
        aside = self._directory / f".{os.getpid()}.trace.json.gz"  # the ending has it compressed
        finished.export_chrome_trace(str(aside))
        os.replace(aside, path)
        return path


def dearest_operations(events: Any, steps: int, on_cpu: bool) -> list[str]:
    """A table of the operations that took most of the device's own time, children not counted.

    Args:
        events: `profile.key_averages()`.
        steps: recorded.
        on_cpu: whether the device is the CPU; else the operations are the accelerator's kernels and copies.

    Returns:
        Aligned lines of text, the first one the heading: milliseconds and calls a step, and the share of all operations.
    """
    rows: list[tuple[str, int, float]] = []
    for event in events:
        is_of_host = event.device_type == torch.autograd.DeviceType.CPU
        if event.is_user_annotation or event.key.startswith("ProfilerStep") or is_of_host != on_cpu:
            continue
        rows.append((event.key, event.count, event.self_cpu_time_total if on_cpu else event.self_device_time_total))
    total = sum(microseconds for *_, microseconds in rows)
    if not total:
        return ["profile: the device did nothing that could be recorded"]
    rows.sort(key=lambda row: -row[2])
    rows = rows[:DEAREST]
    names = [name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 1]}…" for name, *_ in rows]
    width = max(len("operation"), *map(len, names))
    lines = [f"{'operation':<{width}}  {'calls/step':>10}  {'ms/step':>9}  {'share':>6}"]
    for name, (_, calls, microseconds) in zip(names, rows, strict=True):
        lines.append(f"{name:<{width}}  {calls / steps:>10,.0f}  {microseconds / 1000 / steps:>9,.2f}  {microseconds / total:>6.1%}")
    return lines
