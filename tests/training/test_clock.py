"""The clock of a step: parts add up to the time that passed, cost nothing, and never make the host wait within a step."""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable

import pytest
import torch

from gpt.runtime.cpu import Cpu
from gpt.runtime.cuda import Cuda
from gpt.training.clock import BETWEEN_STEPS, STEP_PARTS, StepClock

CPU = Cpu("CPU", torch.float32)
ACCELERATOR = Cuda("a stand-in", torch.bfloat16)
PARTS = [f"time_{name}" for name in STEP_PARTS]


def test_a_cpu_is_timed_by_the_host():
    before = time.perf_counter()
    clock = StepClock(CPU)
    made = time.perf_counter()
    for _ in range(2):
        with clock.part("data"):
            time.sleep(0.01)
        for _ in range(2):  # micro-batches
            with clock.part("forward"):
                time.sleep(0.02)
            with clock.part("backward"):
                time.sleep(0.03)
        time.sleep(0.02)
        clock.step()
    with clock.spend("evaluation"):
        time.sleep(0.03)
    asked = time.perf_counter()
    read, totals = clock.read(), clock.totals()
    answered = time.perf_counter()
    assert list(read) == [*PARTS, "time_other"]
    least = {"time_data": 0.01, "time_forward": 0.04, "time_backward": 0.06, "time_optimizer": 0.0, "time_other": 0.02}
    for name, seconds in least.items():
        assert seconds <= read[name] <= seconds + (answered - before - 0.29) / 2 + 1e-6  # what all of it took longer than it slept
    assert read["time_optimizer"] == 0.0
    assert list(totals) == [*STEP_PARTS, *BETWEEN_STEPS, "other"]
    assert totals["forward"] == pytest.approx(2 * read["time_forward"])
    assert totals["evaluation"] >= 0.03
    assert asked - made <= 2 * sum(read.values()) + totals["evaluation"] <= answered - before
    assert asked - made <= sum(totals.values()) <= answered - before


def test_reading_starts_anew_and_the_totals_go_on():
    clock = StepClock(CPU)
    assert clock.read() == {}
    with clock.part("optimizer"):
        time.sleep(0.02)
    clock.step()
    assert clock.read()["time_optimizer"] >= 0.02
    assert clock.read() == {}
    clock.step()
    assert clock.read()["time_optimizer"] == 0.0
    assert clock.totals()["optimizer"] >= 0.02


def test_a_part_that_raises_is_still_counted():
    clock = StepClock(CPU)

    def sleep(seconds: float) -> None:
        time.sleep(seconds)
        raise ValueError("within")

    with pytest.raises(ValueError, match="within"), clock.part("forward"):
        sleep(0.01)
    assert clock.totals()["forward"] >= 0.01


def test_a_misspelt_part_is_ours_to_mend():
    clock = StepClock(CPU)
    with pytest.raises(AssertionError):
        clock.part("foward")
    with pytest.raises(AssertionError):
        clock.spend("forward")


@pytest.mark.parametrize("device", [CPU, ACCELERATOR], ids=lambda device: device.type)
def test_entering_and_leaving_a_part_costs_under_5_microseconds(device):
    queue = Queue()
    clock = StepClock(device, queue.event)

    def enter_and_leave() -> None:
        with clock.part("forward"):
            pass

    # Of the accelerator's events the real cost is unknown here; of the clock's own part, this is it.
    fastest = min(timeit.repeat(enter_and_leave, number=1000, repeat=20)) / 1000
    assert fastest < 5e-6


# An accelerator: a queue of work with a clock of its own


class Queue:
    """A device that works off what is put into its queue only when told to, or when waited for."""

    def __init__(self) -> None:
        self.work: list[float | QueueEvent] = []
        self.seconds, self.made, self.waits = 0.0, 0, 0

    def event(self) -> QueueEvent:
        self.made += 1
        return QueueEvent(self)

    def launch(self, seconds: float) -> None:
        self.work.append(seconds)

    def run(self) -> None:
        for item in self.work:
            if isinstance(item, QueueEvent):
                item.at = self.seconds
            else:
                self.seconds += item
        self.work.clear()


class QueueEvent:
    """Like `torch.Event`."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.at: float | None = None

    def record(self) -> None:
        self.at = None
        self.queue.work.append(self)

    def query(self) -> bool:
        return self.at is not None

    def synchronize(self) -> None:
        self.queue.waits += 1
        self.queue.run()

    def elapsed_time(self, end_event: QueueEvent) -> float:
        assert self.at is not None
        assert end_event.at is not None
        return (end_event.at - self.at) * 1000


def steps(clock: StepClock, queue: Queue, number: int, between: Callable[[], None] = lambda: None) -> None:
    for _ in range(number):
        with clock.part("data"):
            pass
        for _ in range(2):
            with clock.part("forward"):
                queue.launch(0.001)
            with clock.part("backward"):
                queue.launch(0.002)
        with clock.part("optimizer"):
            queue.launch(0.0005)
        clock.step()
        between()


def test_an_accelerator_is_timed_in_its_own_queue_and_waited_for_at_the_log_line_alone():
    queue = Queue()
    clock = StepClock(ACCELERATOR, queue.event)
    started = time.perf_counter()
    steps(clock, queue, 3)
    assert queue.waits == 0
    assert queue.seconds == 0.0  # nothing has run yet, and nobody waited
    time.sleep(0.05)
    read = clock.read()
    assert queue.waits == 1
    assert [read[name] for name in PARTS] == pytest.approx([0.0, 0.002, 0.004, 0.0005])
    assert 0.05 <= 3 * (read["time_other"] + 0.0065) <= time.perf_counter() - started + 0.01  # of the time that passed here, what is left
    assert clock.totals()["backward"] == pytest.approx(0.012)


def test_what_the_device_has_passed_is_taken_in_within_the_steps_so_few_events_are_made():
    queue = Queue()
    clock = StepClock(ACCELERATOR, queue.event)
    steps(clock, queue, 100, queue.run)
    assert queue.made == 24  # of the step in hand and of the one before
    assert queue.waits == 0
    assert clock.totals()["forward"] == pytest.approx(0.2)


def test_evaluation_is_timed_on_the_device_too():
    queue = Queue()
    clock = StepClock(ACCELERATOR, queue.event)
    steps(clock, queue, 1)
    with clock.spend("evaluation"):
        queue.launch(0.3)
    assert clock.totals()["evaluation"] == pytest.approx(0.3)
    assert clock.read()["time_other"] == 0.0  # the stand-in's time is not the host's; never negative


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_torch_events_time_what_a_gpu_does():
    clock = StepClock(ACCELERATOR)
    a = torch.randn(4096, 4096, device="cuda")
    a @ a
    torch.cuda.synchronize()
    started = time.perf_counter()
    with clock.part("forward"):
        for _ in range(20):
            a @ a
    clock.step()
    read = clock.read()
    assert 0 < read["time_forward"] <= time.perf_counter() - started
    assert read["time_forward"] > 0.5 * (time.perf_counter() - started)
