"""The next batches are made in a thread while the model works, so that a step does not wait for its data.

They come in the order of their steps. The state of a stream is kept beside each of them, for the thread is ahead of the trainer.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from gpt.data.batches import Batch, Batches

AHEAD = 3  # batches
_JOIN_SECONDS = 2.0  # how long `close` waits for a batch that is just being read


@dataclass
class _Shared:
    """What the thread and its owner share; the thread does not hold the owner, which so can be collected."""

    batches: Batches
    rank: int
    world: int
    pin: bool
    ready: deque[tuple[Batch, dict[str, Any] | None]] = field(default_factory=deque)
    error: BaseException | None = None
    closed: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)


class Prefetch:
    """Batches of one rank, made ahead.

    Args:
        batches: where they come from; from now on this thread's alone, until `close`.
        first_step: that is wanted first.
        rank, world: of which the batches are a part.
        pin: copy into pinned memory (CUDA).

    Attributes:
        waited: seconds that `get` has waited in all.
    """

    def __init__(self, batches: Batches, first_step: int = 0, rank: int = 0, world: int = 1, pin: bool = False) -> None:
        self.waited = 0.0
        self._next_step = first_step
        self._state = _state_of(batches)
        self._shared = _Shared(batches, rank, world, pin)
        thread = threading.Thread(target=_fill, args=(self._shared, first_step), name="prefetch", daemon=True)
        self.close = weakref.finalize(self, _stop, self._shared, thread)
        """End the thread; done by itself when nobody holds this any longer, and when the interpreter ends."""
        thread.start()

    def get(self, step: int) -> Batch:
        """The batch of `step`, which must follow the one before.

        Raises:
            ValueError: another step, or closed.
            Exception: whatever making the batch raised.
        """
        if step != self._next_step:
            raise ValueError(f"step {step} was asked for, but {self._next_step} comes next")
        shared = self._shared
        with shared.changed:
            if not shared.ready:
                started = time.perf_counter()
                while not (shared.ready or shared.error or shared.closed):
                    shared.changed.wait()
                self.waited += time.perf_counter() - started
            if shared.closed:
                raise ValueError(f"step {step} was asked for after the end")
            if not shared.ready:
                assert shared.error is not None
                raise shared.error
            batch, self._state = shared.ready.popleft()
            shared.changed.notify_all()
        self._next_step += 1
        return batch

    def state_dict(self) -> dict[str, Any] | None:
        """The state of a stream behind the batch that `get` gave last; None where batches have no state."""
        return self._state


def _state_of(batches: Batches) -> dict[str, Any] | None:
    state_dict = getattr(batches, "state_dict", None)
    return None if state_dict is None else state_dict()


def _fill(shared: _Shared, step: int) -> None:
    """The thread: make batches while there is room."""
    while True:
        with shared.changed:
            while len(shared.ready) >= AHEAD and not shared.closed:
                shared.changed.wait()
            if shared.closed:
                return
        try:
            batch = shared.batches.batch(step, shared.rank, shared.world)
            made = (_pinned(batch) if shared.pin else batch), _state_of(shared.batches)
        except BaseException as error:
            with shared.changed:
                shared.error = error
                shared.changed.notify_all()
            return
        with shared.changed:
            shared.ready.append(made)
            shared.changed.notify_all()
        step += 1


def _pinned(batch: Batch) -> Batch:
    documents = None if batch.documents is None else batch.documents.pin_memory()
    return replace(batch, tokens=batch.tokens.pin_memory(), targets=batch.targets.pin_memory(), documents=documents)


def _stop(shared: _Shared, thread: threading.Thread) -> None:
    with shared.changed:
        shared.closed = True
        shared.ready.clear()
        shared.changed.notify_all()
    if thread is not threading.current_thread():
        thread.join(_JOIN_SECONDS)
