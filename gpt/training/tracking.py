"""Experiment trackers by name, through accelerate: what goes to metrics.jsonl also goes to tensorboard, wandb, mlflow or trackio.

A tracker is a guest: it works in a thread of its own behind a bounded queue, so one that is missing, fails or hangs is named once and
left out, and training never waits for it. Only the process that writes the run makes one; nothing here speaks to the other processes.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
import os
import queue
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.config import TrackingConfig

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

QUEUE_LINES = 1000  # lines of metrics that wait for a slow tracker, before more are dropped
FINISH_SECONDS = 20.0  # that a tracker has at the end to write what waits; mlflow makes its database for 10 of them
WANDB_SECONDS = 15  # that wandb tries to connect, instead of 90: the process cannot end before
TOLD_ONCE = ("tensorboard", "mlflow")  # the hyperparameters: one shows a second set as a second run, the other refuses what has changed


@dataclass(frozen=True)
class _Run:
    """What a tracker is opened for."""

    project: str
    id: str
    directory: Path
    resume_step: int
    record: _Record


class Tracker:
    """Hands metrics to one tracker, and never raises or waits for it.

    `say` is called in the caller's thread only, within `log` and `finish`.

    Args:
        name: of the tracker, for messages.
        open: makes and starts accelerate's tracker; returns it with a note for people. Runs in the tracker's thread.
        record: what of it is written already.
        hyperparameters: flat.
        say: takes the lines for people.
    """

    def __init__(
        self,
        name: str,
        open: Callable[[], tuple[GeneralTracker, str]],
        record: _Record,
        hyperparameters: Mapping[str, int | float | str | bool],
        say: Callable[[str], None],
    ) -> None:
        self._name, self._open, self._record, self._hyperparameters, self._say = name, open, record, hyperparameters, say
        self._lines: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(QUEUE_LINES)
        self._notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._closing, self._failed, self._dropped = False, False, 0
        # A daemon: one that hangs for good must not keep the process.
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Hand over one line of metrics; what is not a finite number is left out, and so is the step itself.

        Args:
            values: by name.
            step: of the run.
        """
        self._tell()
        numbers = {key: value for key, value in values.items() if key != "step" and _is_finite(value)}
        if not numbers or self._failed or self._closing:
            return
        try:
            self._lines.put_nowait((numbers, step))
        except queue.Full:
            if not self._dropped:
                self._say(f"tracking={self._name}: does not keep up, {QUEUE_LINES} lines wait; further ones are dropped until it does")
            self._dropped += 1

    def finish(self, seconds: float = FINISH_SECONDS) -> None:
        """Let the tracker write what waits and close it; after that many seconds it is left as it is. Further calls do nothing."""
        if self._closing:
            return
        self._closing, waiting = True, self._lines.qsize()
        with contextlib.suppress(queue.Full):  # without room for the mark that ends it, the thread sees that it is closing
            self._lines.put_nowait(None)
        self._thread.join(seconds)
        self._tell()
        if self._thread.is_alive():
            waiting = min(waiting, self._lines.qsize())
            self._say(f"tracking={self._name}: not done after {seconds:g} s, left out with {waiting} lines not written")
        elif self._dropped:
            self._say(f"tracking={self._name}: {self._dropped} lines were dropped; metrics.jsonl has them all")

    def _tell(self) -> None:
        while not self._notes.empty():
            self._say(self._notes.get())

    def _work(self) -> None:
        try:
            _find_process_state()
            tracker, note = self._open()
            self._notes.put(f"tracking={self._name}: {note}")
            if self._record.is_new or self._name not in TOLD_ONCE:
                tracker.store_init_configuration(dict(self._hyperparameters))
            self._record.save()
            while (line := self._next()) is not None:
                values, step = line
                if fresh := self._record.not_yet(values, step):
                    tracker.log(fresh, step=step)
            tracker.finish()
        except (Exception, SystemExit) as error:  # whatever a tracker raises, training goes on
            self._failed = True
            reason = " ".join(str(error).split())[:300]
            self._notes.put(
                f"tracking={self._name}: left out, since it failed ({type(error).__name__}{': ' if reason else ''}{reason}); "
                f"training goes on, metrics.jsonl has everything. {REMEDIES[self._name]}"
            )

    def _next(self) -> tuple[dict[str, float], int] | None:
        """The next line; None at the end."""
        while True:
            try:
                return self._lines.get(timeout=1.0)
            except queue.Empty:
                if self._closing:
                    return None


class _Record:
    """Which step of which metric a tracker was last given, kept in a file: a run that goes on from an earlier step sends none twice.

    It is written before the line is handed over: a kill may cost a tracker its last lines, and never doubles one.

    Args:
        path: of the file.
        rewinds: whether the tracker itself forgets what came after the step that a run goes on from.
    """

    def __init__(self, path: Path, rewinds: bool) -> None:
        self._path = path
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # there is none; or a crash of the machine emptied it, then some steps come twice
            kept = None
        kept = kept if isinstance(kept, dict) else {}
        self.is_new = not kept
        self.run: str | None = kept.get("run")
        """The tracker's own name for the run, where it chooses one."""
        self._last: dict[str, int] = kept.get("last", {})
        self._before = {} if rewinds else dict(self._last)

    def not_yet(self, values: dict[str, float], step: int) -> dict[str, float]:
        """Of the values those that no earlier process handed over; they count as handed over from now on."""
        fresh = {key: value for key, value in values.items() if step > self._before.get(key, -1)}
        if fresh:
            self._last.update(dict.fromkeys(fresh, step))
            self.save()
        return fresh

    def save(self) -> None:
        """Write the file."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        aside.write_text(json.dumps({"run": self.run, "last": self._last}), encoding="utf-8")
        os.replace(aside, self._path)


def open_tracker(
    config: TrackingConfig, run_id: str, run_directory: Path, run_config: Mapping[str, Any], resume_step: int, say: Callable[[str], None]
) -> Tracker | None:
    """Open the tracker that a config names; returns at once.

    Args:
        config: the section `tracking`.
        run_id: what the tracker calls the run.
        run_directory: its files lie in a folder of the tracker's name in here, but for what the environment says otherwise.
        run_config: the run's config as nested plain data, handed over as hyperparameters.
        resume_step: the step that training goes on from, 0 for a new run.
        say: takes the lines for people.

    Returns:
        None for `none`, and where the tracker's package is not installed, which is said.
    """
    if config.name == "none":
        return None
    spec = importlib.util.find_spec(config.name)
    if spec is None or spec.origin is None:  # without an origin it is only a folder of that name, as trackers leave them
        say(f"tracking={config.name}: left out, since it is not installed: pip install {config.name}. metrics.jsonl has everything")
        return None
    record = _Record(run_directory.absolute() / config.name / "logged.json", rewinds=config.name == "tensorboard")
    run = _Run(config.project, run_id, run_directory.absolute(), resume_step, record)
    return Tracker(config.name, lambda: OPENERS[config.name](run), record, flatten(run_config), say)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Hyperparameters by dotted name. Lists and null become JSON: trackers take numbers and text."""
    flat: dict[str, int | float | str | bool] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (int, float, str, bool)) else json.dumps(value, default=str)
    return flat


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# Opening, in the tracker's thread. Each returns accelerate's tracker, started, and a note for people.


def _find_process_state() -> None:
    """Have accelerate's PartialState made, which its trackers ask, without a word to other processes.

    Where there is a process group it takes the rank from that. Where there is none but torchrun's LOCAL_RANK, it would make one
    and wait for processes that never come (`PartialState.__init__`).
    """
    import torch.distributed
    from accelerate.state import PartialState

    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    local_rank = None if grouped else os.environ.pop("LOCAL_RANK", None)
    try:
        PartialState()
    finally:
        if local_rank is not None:
            os.environ["LOCAL_RANK"] = local_rank


def _tensorboard(run: _Run) -> tuple[GeneralTracker, str]:
    from accelerate.tracking import TensorBoardTracker

    # What an earlier process wrote after the step that this one goes on from, readers pass over.
    tracker = TensorBoardTracker("tensorboard", logging_dir=run.directory, purge_step=run.resume_step + 1)
    tracker.start()
    return tracker, f"tensorboard --logdir {run.directory.parent}"


def _wandb(run: _Run) -> tuple[GeneralTracker, str]:
    from accelerate.tracking import WandBTracker

    wandb: Any = importlib.import_module("wandb")
    keyless = "WANDB_MODE" not in os.environ and not wandb.login(prompt=False, verify=False)
    patience = float(os.environ.get("WANDB_INIT_TIMEOUT", WANDB_SECONDS))
    (run.directory / "wandb").mkdir(parents=True, exist_ok=True)  # else wandb writes to a temporary folder
    tracker = WandBTracker(
        run.project,
        id=re.sub(r"[^\w.-]", "-", run.id)[:64],
        name=run.id,
        dir=str(run.directory),
        resume=None if run.record.is_new else "allow",
        mode="offline" if keyless else None,
        settings=wandb.Settings(console="off", silent=True, init_timeout=patience),
    )
    tracker.start()
    if not tracker.tracker.offline:
        return tracker, tracker.tracker.url
    note = "there is no API key, so it writes files" if keyless else "it writes files"
    return tracker, f"{note}; to upload them: wandb sync {run.directory / 'wandb' / 'offline-run-*'}"


def _mlflow(run: _Run) -> tuple[GeneralTracker, str]:
    from accelerate.tracking import MLflowTracker

    mlflow: Any = importlib.import_module("mlflow")
    directory, artifacts, uri = run.directory / "mlflow", None, os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        directory.mkdir(parents=True, exist_ok=True)
        uri, artifacts = f"sqlite:///{directory / 'mlflow.db'}", (directory / "artifacts").as_uri()
    mlflow.set_tracking_uri(uri)
    tracker = MLflowTracker(run.project, logging_dir=artifacts, run_id=run.record.run, run_name=run.id)
    tracker.start()
    run.record.run = tracker.tracker.info.run_id
    return tracker, f"mlflow ui --backend-store-uri {uri}" if artifacts else uri


def _trackio(run: _Run) -> tuple[GeneralTracker, str]:
    from accelerate.tracking import TrackioTracker

    ours = "TRACKIO_DIR" not in os.environ
    if ours:
        os.environ["TRACKIO_DIR"] = str(run.directory / "trackio")
    try:
        trackio: Any = importlib.import_module("trackio")  # reads TRACKIO_DIR, this once
    finally:
        if ours:
            del os.environ["TRACKIO_DIR"]
    tracker = TrackioTracker(run.project, name=run.id, resume="never" if run.record.is_new else "allow", embed=False)
    tracker.start()
    return tracker, f"TRACKIO_DIR={trackio.TRACKIO_DIR} trackio show --project {run.project}"


OPENERS: dict[str, Callable[[_Run], tuple[GeneralTracker, str]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
REMEDIES = {
    "tensorboard": "Try: pip install --upgrade tensorboard",
    "wandb": "WANDB_MODE=offline writes files and needs no network; else try: wandb login, pip install --upgrade wandb",
    "mlflow": "Without MLFLOW_TRACKING_URI it writes files and needs no server; else try: pip install --upgrade mlflow",
    "trackio": "Try: pip install --upgrade trackio",
}
