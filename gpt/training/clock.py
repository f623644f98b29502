"""Where the time of a run goes: by parts of a step, evaluation and checkpoints, without making the host wait for the device.

On a CPU the host's clock times a part. Elsewhere events are recorded around it in the device's own queue of work and read
later, so a part is the time that the device spent in it, stalls included: data that was ready before it was needed costs nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from gpt.runtime.device import Device

STEP_PARTS: tuple[str, ...] = ("data", "forward", "backward", "optimizer")
BETWEEN_STEPS: tuple[str, ...] = ("evaluation", "checkpointing")


class StepClock:
    """Times the parts of a run.

        with clock.part("forward"):
            ...
        clock.step()  # at the end of a step
        line |= clock.read()  # where a line of metrics is due, which waits for the device anyway

    Parts do not nest. A part may be entered many times in a step (micro-batches); it then counts as the sum.

    Args:
        device: the device of the run.
        new_event: makes an event, for a device other than a CPU; by default a `torch.Event` with timing, whose methods it has.
    """

    def __init__(self, device: Device, new_event: Callable[[], Any] | None = None) -> None:
        self._seconds: dict[str, float] = dict.fromkeys((*STEP_PARTS, *BETWEEN_STEPS), 0.0)
        if not device.times_itself:
            self._parts: dict[str, _HostPart | _DevicePart] = {name: _HostPart(self._seconds, name) for name in self._seconds}
            self._events = None
        else:
            self._events = _Events(self._seconds, new_event or (lambda: torch.Event(device.type, enable_timing=True)))
            self._parts = {name: _DevicePart(self._events, name) for name in self._seconds}
        self._started = time.perf_counter()
        self._steps = 0
        self._read_at, self._read_seconds = self._started, dict(self._seconds)

    def part(self, name: str) -> _HostPart | _DevicePart:
        """A context around a part of a step, one of STEP_PARTS."""
        assert name in STEP_PARTS, name
        return self._parts[name]

    def spend(self, name: str) -> _HostPart | _DevicePart:
        """A context around what happens between steps, one of BETWEEN_STEPS."""
        assert name in BETWEEN_STEPS, name
        return self._parts[name]

    def step(self) -> None:
        """Count a step; takes in, without waiting, the parts that the device has finished."""
        self._steps += 1
        if self._events is not None:
            self._events.collect(wait=False)

    def read(self) -> dict[str, float]:
        """Mean seconds a step since the last call, and start anew; on an accelerator this waits for what is queued.

        Call it once after the first step, too, and drop the result: that step compiles, and would hide the time of the others.

        Returns:
            `time_data`, `time_forward`, `time_backward`, `time_optimizer`, and as `time_other` what is left of the time, evaluation and
            checkpoints aside. Empty if there was no step.
        """
        now = self._now()
        spent = {name: seconds - self._read_seconds[name] for name, seconds in self._seconds.items()}
        elapsed, steps = now - self._read_at, self._steps
        self._read_at, self._read_seconds, self._steps = now, dict(self._seconds), 0
        if not steps:
            return {}
        means = {f"time_{name}": spent[name] / steps for name in STEP_PARTS}
        return means | {"time_other": max(0.0, elapsed - sum(spent.values())) / steps}

    def totals(self) -> dict[str, float]:
        """Seconds of each part since the clock was made, and as `other` the rest; on an accelerator this waits for what is queued."""
        now = self._now()
        return self._seconds | {"other": max(0.0, now - self._started - sum(self._seconds.values()))}

    def _now(self) -> float:
        if self._events is not None:
            self._events.collect(wait=True)
        return time.perf_counter()


class _HostPart:
    """Adds the host's time within the block. Without a generator: entering and leaving costs under a microsecond."""

    __slots__ = ("_name", "_seconds", "_since")

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name
        self._since = 0.0

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._seconds[self._name] += time.perf_counter() - self._since


class _Events:
    """Pairs of events in the order of their recording, and those that are free to be used again."""

    def __init__(self, seconds: dict[str, float], new_event: Callable[[], Any]) -> None:
        self._seconds, self._new_event = seconds, new_event
        self._pending: deque[tuple[str, Any, Any]] = deque()
        self._free: list[Any] = []

    def record(self) -> Any:
        event = self._free.pop() if self._free else self._new_event()
        event.record()
        return event

    def finish(self, name: str, start: Any) -> None:
        self._pending.append((name, start, self.record()))

    def collect(self, wait: bool) -> None:
        """Add up the pairs that the device is through with, or all after waiting for the last."""
        if wait and self._pending:
            self._pending[-1][2].synchronize()
        while self._pending and (wait or self._pending[0][2].query()):
            name, start, end = self._pending.popleft()
            self._seconds[name] += start.elapsed_time(end) / 1000
            self._free += (start, end)


class _DevicePart:
    """Records events around the block."""

    __slots__ = ("_events", "_name", "_start")

    def __init__(self, events: _Events, name: str) -> None:
        self._events, self._name = events, name
        self._start: Any = None

    def __enter__(self) -> None:
        self._start = self._events.record()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._events.finish(self._name, self._start)
        self._start = None
