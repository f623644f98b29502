import gc
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from small_corpora import corpus, same, settings, text

from gpt.data.batches import Batch
from gpt.data.loader import build_batches
from gpt.data.prefetch import AHEAD, Prefetch

PATIENCE = 10.0  # seconds that a machine may be busy with other things


class Counted:
    """Batches whose ids are the step, with a state; `hold` makes it wait before a step until it is let go."""

    windows = tokens_per_epoch = 1

    def __init__(self, fails_at: int | None = None, holds_at: int | None = None) -> None:
        self.fails_at, self.holds_at, self.go_on = fails_at, holds_at, threading.Event()
        self.asked: list[tuple[int, int, int]] = []

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        if step == self.fails_at:
            raise OSError(f"step {step}")
        if step == self.holds_at:
            self.go_on.wait(PATIENCE)
        self.asked.append((step, rank, world))
        return Batch(torch.full((2, 3), step), torch.full((2, 3), step + 1), None)

    def state_dict(self) -> dict[str, Any]:
        return {"made": len(self.asked)}


def until(what) -> None:
    started = time.monotonic()
    while not what():
        assert time.monotonic() - started < PATIENCE
        time.sleep(0.002)


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.fixture(autouse=True)
def ends_every_thread():
    yield
    gc.collect()
    until(lambda: not running())


def test_batches_are_those_of_their_steps():
    batches = build_batches(corpus(text(900, [0, 40, 300])), settings(document_mask=True), 16, 12, seed=1)
    ahead = Prefetch(batches, first_step=7, rank=1, world=3)
    for step in range(7, 40):
        assert same(ahead.get(step), batches.batch(step, 1, 3))
    assert ahead.state_dict() is None  # such batches have none
    ahead.close()


def test_a_few_are_made_ahead_and_no_more():
    batches = Counted()
    ahead = Prefetch(batches, first_step=5, rank=1, world=2)
    until(lambda: len(batches.asked) == AHEAD)
    assert 2 <= AHEAD <= 4
    ahead.get(5)
    until(lambda: len(batches.asked) == AHEAD + 1)
    time.sleep(0.05)
    assert batches.asked == [(step, 1, 2) for step in range(5, 5 + AHEAD + 1)]
    ahead.close()


def test_steps_come_in_their_order():
    ahead = Prefetch(Counted(), first_step=5)
    ahead.get(5)
    for step in (5, 7, 0):
        with pytest.raises(ValueError, match=f"step {step} was asked for, but 6 comes next"):
            ahead.get(step)
    assert ahead.get(6).tokens[0, 0] == 6
    ahead.close()


def test_the_state_is_that_of_the_batch_given_last():
    batches = Counted()
    ahead = Prefetch(batches)
    assert ahead.state_dict() == {"made": 0}
    for step in range(6):
        until(lambda given=step: len(batches.asked) == given + AHEAD)  # the thread is ahead
        assert ahead.state_dict() == {"made": step}
        ahead.get(step)
        assert ahead.state_dict() == {"made": step + 1}
    ahead.close()


def test_an_error_comes_after_the_batches_before_it():
    ahead = Prefetch(Counted(fails_at=2))
    until(lambda: not running())
    assert [ahead.get(step).tokens[0, 0].item() for step in (0, 1)] == [0, 1]
    for _ in range(2):
        with pytest.raises(OSError, match="step 2"):
            ahead.get(2)
    ahead.close()


def test_an_error_wakes_who_waits():
    batches = Counted(holds_at=0, fails_at=1)
    ahead = Prefetch(batches)
    threading.Timer(0.05, batches.go_on.set).start()
    ahead.get(0)
    with pytest.raises(OSError, match="step 1"):
        ahead.get(1)


def test_waiting_is_counted():
    batches = Counted(holds_at=1)
    ahead = Prefetch(batches)
    until(lambda: len(batches.asked) == 1)
    time.sleep(0.02)
    ahead.get(0)
    assert ahead.waited == 0
    threading.Timer(0.2, batches.go_on.set).start()
    ahead.get(1)
    assert 0.15 < ahead.waited < PATIENCE
    ahead.close()


def test_close_ends_the_thread_whatever_it_does():
    full = Prefetch(Counted())
    until(lambda: len(full._shared.ready) == AHEAD)
    full.close()
    assert not running()  # it waited for room
    full.close()
    with pytest.raises(ValueError, match="step 0 was asked for after the end"):
        full.get(0)
    busy = Counted(holds_at=0)
    held = Prefetch(busy)
    threading.Timer(0.05, busy.go_on.set).start()
    held.close()
    assert not running()  # it was in the middle of a batch, which is not kept
    assert busy.asked == [(0, 0, 1)]


def test_close_does_not_wait_for_a_source_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("gpt.data.prefetch._JOIN_SECONDS", 0.1)
    batches = Counted(holds_at=0)
    ahead = Prefetch(batches)
    started = time.monotonic()
    ahead.close()
    assert 0.05 < time.monotonic() - started < PATIENCE / 2
    batches.go_on.set()


def test_forgotten_it_ends():
    ahead = Prefetch(Counted())
    assert len(running()) == 1
    del ahead
    gc.collect()
    until(lambda: not running())


def test_nothing_turns_while_it_waits():
    batches = Counted(holds_at=AHEAD)
    ahead = Prefetch(batches)
    until(lambda: len(batches.asked) == AHEAD)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.15
    batches.go_on.set()
    ahead.close()


def test_pinned_only_if_asked(monkeypatch):
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    plain = Prefetch(Counted())
    plain.get(0)
    plain.close()
    assert not pinned
    batches = build_batches(corpus(text(900)), settings(document_mask=True), 16, 2, seed=1)
    ahead = Prefetch(batches, pin=True)
    assert same(ahead.get(0), batches.batch(0))
    ahead.close()
    assert len(pinned) >= 3  # tokens, targets, documents


EXITS = """
import sys, threading
import torch
from gpt.data.batches import Batch
from gpt.data.prefetch import Prefetch

class Zeros:
    windows = tokens_per_epoch = 1
    def batch(self, step, rank=0, world=1):
        if step == int(sys.argv[2]):
            threading.Event().wait()  # for ever
        return Batch(torch.zeros(2, 3), torch.zeros(2, 3), None)

ahead = Prefetch(Zeros())
print(ahead.get(0).tokens.shape[0], flush=True)
if sys.argv[1] == "raises":
    raise RuntimeError("on purpose")
"""


@pytest.mark.parametrize(("how", "holds_at", "code"), [("ends", -1, 0), ("raises", -1, 1), ("ends", 1, 0)])
def test_an_interpreter_ends_without_closing_it(how, holds_at, code):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", EXITS, how, str(holds_at)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "2\n", done.stderr
    assert done.returncode == code
    assert ("RuntimeError: on purpose" in done.stderr) == (how == "raises")
    assert "Fatal" not in done.stderr
    assert time.monotonic() - started < 30
