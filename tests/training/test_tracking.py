"""Trackers: what arrives in them, that nothing arrives twice, and that training neither stops nor waits for one.

tensorboard is real and read back with its own reader. The others are stand-ins for the package alone, behind accelerate's real classes;
where the packages are installed, they are tried for real too.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gpt.compose import compose_run
from gpt.config import TrackingConfig
from gpt.training import tracking
from gpt.training.tracking import Tracker, flatten, open_tracker

CONFIG = {"seed": 7, "init": None, "model": {"d_model": 64, "name": "nano"}, "train": {"sample_prompts": ["a", "b"]}}
FLAT = {"seed": 7, "init": "null", "model.d_model": 64, "model.name": "nano", "train.sample_prompts": '["a", "b"]'}
NAMES = ("tensorboard", "wandb", "mlflow", "trackio")


class Calls(list[tuple[str, Any]]):
    """What a stand-in was asked, in order."""

    def __call__(self, name: str, value: Any = None) -> None:
        self.append((name, value))

    def named(self, name: str) -> list[Any]:
        return [value for called, value in self if called == name]


@pytest.fixture
def calls() -> Calls:
    return Calls()


def put(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, origin="stand-in")
    for key, value in attributes.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


class StandInRun:
    """Of wandb and of trackio."""

    offline, url = True, ""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls("log", (dict(values), step))

    def finish(self) -> None:
        self.calls("finish")


def stand_in(name: str, monkeypatch: pytest.MonkeyPatch, calls: Calls, has_key: bool = False) -> None:
    """Puts a stand-in where the tracker's package is imported from."""

    def init(**arguments: Any) -> StandInRun:
        calls("start", arguments)
        return StandInRun(calls)

    config = SimpleNamespace(update=lambda values, allow_val_change: calls("config", values))
    if name == "wandb":
        monkeypatch.delenv("WANDB_MODE", raising=False)
        put(monkeypatch, name, init=init, config=config, login=lambda prompt, verify: has_key, Settings=lambda **settings: settings)
    elif name == "trackio":
        monkeypatch.delenv("TRACKIO_DIR", raising=False)
        put(monkeypatch, name, init=init, config=config, TRACKIO_DIR="somewhere")
    else:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

        def start_run(**arguments: Any) -> SimpleNamespace:
            calls("start", arguments)
            return SimpleNamespace(info=SimpleNamespace(run_id=arguments["run_id"] or "chosen-by-mlflow"))

        put(
            monkeypatch,
            name,
            set_tracking_uri=lambda uri: calls("uri", uri),
            search_experiments=lambda filter_string: [],
            create_experiment=lambda **arguments: calls("experiment", arguments),
            start_run=start_run,
            log_params=lambda values: calls("config", values),
            log_metrics=lambda values, step: calls("log", (values, step)),
            end_run=lambda: calls("finish"),
            utils=SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)),
        )


def opened(name: str, directory: Path, said: list[str], resume_step: int = 0) -> Tracker:
    config = TrackingConfig(name=name, project="tests")  # type: ignore[arg-type]
    tracker = open_tracker(config, "run one", directory, CONFIG, resume_step, said.append)
    assert tracker is not None, said
    return tracker


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(directory))
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


# What arrives


def test_none_is_no_tracker(tmp_path):
    assert open_tracker(TrackingConfig(), "run", tmp_path, CONFIG, 0, pytest.fail) is None
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["none", *NAMES])
def test_each_is_chosen_by_name(name):
    assert compose_run("pretrain", [f"tracking={name}"]).tracking == TrackingConfig(name, "gpt")


def test_hyperparameters_are_flat_and_plain():
    assert flatten(CONFIG) == FLAT


def test_tensorboard_gets_what_is_finite_and_a_run_that_goes_on_replaces_what_came_after_its_checkpoint(tmp_path):
    said: list[str] = []
    first = opened("tensorboard", tmp_path, said)
    first.log({"step": 1, "loss": 3.0, "mfu": None, "grad_norm": math.nan, "ready": True, "note": "text", "tokens": 64}, 1)
    first.log({"step": 2, "loss": 2.0, "grad_norm": math.inf, "tokens": 128}, 2)
    first.log({"step": 3, "loss": 9.0}, 3)
    first.log({"step": 3, "val_loss": 9.5}, 3)
    first.finish()
    first.finish()  # again does nothing
    assert said == [f"tracking=tensorboard: tensorboard --logdir {tmp_path.parent}"]
    second = opened("tensorboard", tmp_path, said, resume_step=2)
    second.log({"loss": 1.0}, 3)
    second.log({"loss": 0.5}, 4)
    second.finish()
    assert scalars(tmp_path / "tensorboard") == {
        "loss": [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5)],
        "tokens": [(1, 64.0), (2, 128.0)],
        "val_loss": [],
    }
    written = list((tmp_path / "tensorboard").rglob("hparams.yml"))
    assert len(written) == 1  # the hyperparameters once
    assert "model.d_model: 64" in written[0].read_text()


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_others_get_the_same_and_never_a_step_twice(name, tmp_path, monkeypatch, calls):
    stand_in(name, monkeypatch, calls)
    said: list[str] = []
    first = opened(name, tmp_path, said)
    first.log({"step": 2, "loss": 3.0, "mfu": None, "grad_norm": math.nan}, 2)
    first.log({"step": 3, "loss": 2.0}, 3)
    first.log({"step": 3, "val_loss": 2.5}, 3)  # another line of the same step
    first.finish()
    assert [dict(config) for config in calls.named("config")] == [FLAT]
    assert calls.named("log") == [({"loss": 3.0}, 2), ({"loss": 2.0}, 3), ({"val_loss": 2.5}, 3)]
    assert calls[-1][0] == "finish"
    assert len(said) == 1
    calls.clear()
    second = opened(name, tmp_path, said, resume_step=1)
    for step in (2, 3, 4):
        second.log({"loss": 10.0 + step}, step)
        second.log({"val_loss": 20.0 + step}, step)
    second.finish()
    assert calls.named("log") == [({"loss": 14.0}, 4), ({"val_loss": 24.0}, 4)]
    (start,) = calls.named("start")
    assert start["run_id"] == "chosen-by-mlflow" if name == "mlflow" else start["resume"] == "allow"
    assert len(calls.named("config")) == (0 if name == "mlflow" else 1)  # mlflow refuses one that has changed


def test_wandb_without_a_key_writes_files_and_says_so(tmp_path, monkeypatch, calls):
    stand_in("wandb", monkeypatch, calls)
    said: list[str] = []
    opened("wandb", tmp_path, said).finish()
    (start,) = calls.named("start")
    assert (start["id"], start["name"], start["project"]) == ("run-one", "run one", "tests")
    assert (start["mode"], start["dir"], start["resume"]) == ("offline", str(tmp_path), None)
    assert (tmp_path / "wandb").is_dir()
    assert "no API key" in said[0]
    assert f"wandb sync {tmp_path / 'wandb' / 'offline-run-*'}" in said[0]


def test_wandb_with_a_key_is_left_to_its_own_mode(tmp_path, monkeypatch, calls):
    stand_in("wandb", monkeypatch, calls, has_key=True)
    monkeypatch.setattr(StandInRun, "offline", False)
    monkeypatch.setattr(StandInRun, "url", "where-it-is-seen")
    said: list[str] = []
    opened("wandb", tmp_path, said).finish()
    assert calls.named("start")[0]["mode"] is None
    assert said == ["tracking=wandb: where-it-is-seen"]


@pytest.mark.parametrize("server", [None, "sqlite:///elsewhere.db"])
def test_mlflow_writes_into_the_run_directory_unless_a_server_is_named(server, tmp_path, monkeypatch, calls):
    stand_in("mlflow", monkeypatch, calls)
    if server is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    opened("mlflow", tmp_path, []).finish()
    assert calls.named("uri") == [server or f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}"]
    (experiment,) = calls.named("experiment")
    assert experiment["name"] == "tests"
    assert experiment["artifact_location"] == (None if server else (tmp_path / "mlflow" / "artifacts").as_uri())


def test_trackio_is_told_of_its_folder_and_others_are_not(tmp_path, monkeypatch, calls):
    stand_in("trackio", monkeypatch, calls)
    seen: list[str] = []
    real = tracking.importlib.import_module
    monkeypatch.setattr(tracking.importlib, "import_module", lambda name: (seen.append(os.environ["TRACKIO_DIR"]), real(name))[1])
    opened("trackio", tmp_path, []).finish()
    assert seen == [str(tmp_path / "trackio")]
    assert "TRACKIO_DIR" not in os.environ


# What does not stop training


@pytest.mark.parametrize("name", NAMES)
def test_one_that_is_not_installed_is_named_with_the_remedy(name, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None)
    said: list[str] = []
    assert open_tracker(TrackingConfig(name=name), "run", tmp_path, CONFIG, 0, said.append) is None
    assert len(said) == 1
    assert f"pip install {name}" in said[0]


def test_a_folder_of_its_name_is_not_the_tracker(tmp_path, monkeypatch):
    (tmp_path / "here" / "trackio").mkdir(parents=True)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "here")])
    importlib.invalidate_caches()
    assert importlib.util.find_spec("trackio") is not None
    said: list[str] = []
    assert open_tracker(TrackingConfig(name="trackio"), "run", tmp_path, CONFIG, 0, said.append) is None
    assert "pip install trackio" in said[0]


class Fails(StandInRun):
    """Fails in one of its calls."""

    def __init__(self, calls: Calls, at: str, error: BaseException) -> None:
        super().__init__(calls)
        self.at, self.error = at, error

    def log(self, values: dict[str, Any], step: int) -> None:
        super().log(values, step)
        if self.at == "log":
            raise self.error

    def finish(self) -> None:
        if self.at == "finish":
            raise self.error


@pytest.mark.parametrize("at", ["start", "log", "finish"])
@pytest.mark.parametrize("error", [ConnectionError("no\nroute"), SystemExit(3)], ids=["error", "exit"])
def test_one_that_fails_is_named_once_and_left_out(at, error, tmp_path, monkeypatch, calls):
    stand_in("wandb", monkeypatch, calls)

    def init(**arguments: Any) -> StandInRun:
        if at == "start":
            raise error
        return Fails(calls, at, error)

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    said: list[str] = []
    threads: set[int] = set()

    def say(text: str) -> None:
        said.append(text)
        threads.add(threading.get_ident())

    tracker = open_tracker(TrackingConfig(name="wandb"), "run", tmp_path, CONFIG, 0, say)
    assert tracker is not None
    for step in range(1, 4):
        tracker.log({"loss": 1.0}, step)
        if at != "finish":
            tracker._thread.join(10)  # it has failed by then, and takes nothing more
    tracker.finish()
    tracker.log({"loss": 1.0}, 9)
    failures = [text for text in said if "left out" in text]
    assert len(failures) == 1
    assert type(error).__name__ in failures[0]
    assert "WANDB_MODE=offline" in failures[0]
    assert "\n" not in failures[0]
    assert threads == {threading.get_ident()}
    assert len(calls.named("log")) == {"start": 0, "log": 1, "finish": 3}[at]


def test_one_that_hangs_costs_no_time(tmp_path, monkeypatch, calls):
    stand_in("wandb", monkeypatch, calls)
    released = threading.Event()

    def hang(**arguments: Any) -> StandInRun:
        released.wait(60)
        return StandInRun(calls)

    monkeypatch.setattr(sys.modules["wandb"], "init", hang)
    monkeypatch.setattr(tracking, "QUEUE_LINES", 50)
    said: list[str] = []
    tracker = opened("wandb", tmp_path, said)
    started = time.monotonic()
    for step in range(200):
        tracker.log({"loss": 1.0}, step)
    assert time.monotonic() - started < 1.0
    assert len(said) == 1
    assert "dropped" in said[0]
    started = time.monotonic()
    tracker.finish(0.3)
    assert 0.2 < time.monotonic() - started < 3.0
    assert "50 lines not written" in said[-1]
    released.set()  # one that comes back writes what it has, and ends
    tracker._thread.join(10)
    assert not tracker._thread.is_alive()
    assert len(calls.named("log")) == 50


def test_what_it_could_not_keep_up_with_is_counted(tmp_path, monkeypatch, calls):
    stand_in("wandb", monkeypatch, calls)
    released = threading.Event()
    monkeypatch.setattr(StandInRun, "log", lambda self, values, step: (released.wait(60), calls("log", step)))
    monkeypatch.setattr(tracking, "QUEUE_LINES", 5)
    said: list[str] = []
    tracker = opened("wandb", tmp_path, said)
    for step in range(20):
        tracker.log({"loss": 1.0}, step)
    released.set()
    tracker.finish()
    written = len(calls.named("log"))
    assert 5 <= written <= 6
    assert said[-1] == f"tracking=wandb: {20 - written} lines were dropped; metrics.jsonl has them all"


def test_a_record_that_is_damaged_is_as_good_as_none(tmp_path, monkeypatch, calls):
    stand_in("wandb", monkeypatch, calls)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "logged.json").write_text('{"last": {"lo')
    tracker = opened("wandb", tmp_path, [], resume_step=4)
    tracker.log({"loss": 1.0}, 5)
    tracker.finish()
    assert calls.named("log") == [({"loss": 1.0}, 5)]
    assert json.loads((tmp_path / "wandb" / "logged.json").read_text()) == {"run": None, "last": {"loss": 5}}


# Processes: only one calls, and nothing waits for the others

PROCESS = """
import sys, torch.distributed as dist
from datetime import timedelta
from pathlib import Path
from gpt.config import TrackingConfig
from gpt.training.tracking import open_tracker

rank, grouped = int(sys.argv[1]), sys.argv[2] == "grouped"
if grouped:
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
if rank == 0:
    said = []
    tracker = open_tracker(TrackingConfig(name="tensorboard"), "run", Path(sys.argv[3]), {"a": 1}, 0, said.append)
    tracker.log({"loss": 1.5}, 1)
    tracker.finish(40)
    assert len(said) == 1 and "logdir" in said[0], said
import os
assert os.environ["LOCAL_RANK"] == str(rank)
assert dist.is_initialized() == grouped
if grouped:
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("group", ["grouped", "alone"])
def test_one_process_of_several_tracks_by_itself(group, tmp_path):
    """Under torchrun's variables: with a group of two of which one tracks, and with none, where making one would wait for the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in (0, 1) if group == "grouped" else (0,):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-c", textwrap.dedent(PROCESS), str(rank), group, str(tmp_path)]
        processes.append(subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True))
    try:
        for process in processes:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    assert scalars(tmp_path / "tensorboard") == {"loss": [(1, 1.5)]}


# The real ones, where they are installed


def logged_by(name: str, directory: Path) -> list[tuple[int, float]]:
    """The values of `loss` that a tracker has in its files, by step."""
    if name == "trackio":
        with sqlite3.connect(directory / "trackio" / "tests.db") as database:
            rows = database.execute("select step, metrics from metrics").fetchall()
        return sorted((step, json.loads(values)["loss"]) for step, values in rows if "loss" in json.loads(values))
    client = pytest.importorskip("mlflow").MlflowClient(f"sqlite:///{directory / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tests")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["model.d_model"] == "64"
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss")]


@pytest.mark.parametrize("name", ["mlflow", "trackio", "wandb"])
def test_the_real_one_without_a_network(name, tmp_path, monkeypatch):
    if importlib.util.find_spec(name) is None:  # not imported to find out: trackio reads its folder at that moment
        pytest.skip(f"{name} is not installed")
    for variable in ("MLFLOW_TRACKING_URI", "TRACKIO_DIR", "WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    said: list[str] = []
    for resume_step, steps in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        tracker = opened(name, tmp_path, said, resume_step)
        for step in steps:
            tracker.log({"loss": float(step)}, step)
        tracker.finish(60)
        assert not tracker._thread.is_alive(), said
        assert not any("left out" in text for text in said), said
    if name == "wandb":
        written = [path.read_bytes() for path in sorted((tmp_path / "wandb").rglob("*.wandb"))]
        assert [content.count(b"loss") > 0 for content in written] == [True, True]
    else:
        assert logged_by(name, tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
