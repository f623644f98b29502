"""Where a run goes: how many processes, who may start them, how long they wait, and what their ends mean."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from gpt import launch as launching
from gpt.compose import compose_run
from gpt.config import RunConfig
from gpt.errors import UserError
from gpt.launch import launch, precompile, run_file
from gpt.runtime import device as devices

START = launching._start
WORKER = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., RunConfig]:
    return lambda *settings: compose_run("pretrain", ["device=cpu", f"run.dir={tmp_path / 'runs'}", *settings])


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, RunConfig]]:
    """What would have run: as the only process, as a worker, or as the starter of several (with their number)."""
    for name in (*WORKER, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    ran: list[tuple[str, RunConfig]] = []

    def plays(name: str) -> Callable[..., int]:
        return lambda config, processes="": ran.append((f"{name}{processes}", config)) or 0

    monkeypatch.setattr(launching, "_train", plays("train"))
    monkeypatch.setattr(launching, "_start", plays("start "))
    return ran


def as_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WORKER.items():
        monkeypatch.setenv(name, value)


# How many processes


@pytest.mark.parametrize(
    ("settings", "found", "ran"),
    [
        ([], 4, "train"),  # parallel=none is one process
        (["parallel=ddp"], None, "train"), (["parallel=ddp"], 1, "train"), (["parallel=ddp"], 4, "start 4"),
        (["parallel=fsdp"], 64, "start 64"),
        (["parallel=ddp", "launch.nproc=3"], None, "start 3"), (["parallel=ddp", "launch.nproc=3"], 4, "start 3"),
        (["parallel=ddp", "launch.nproc=4"], 4, "start 4"),
        (["launch.max_restarts=1"], 4, "start 1"),
        (["parallel=ddp", "launch.nnodes=2", "launch.endpoint=a:1", "run.id=r"], None, "start 1"),
    ],
)  # fmt: skip
def test_there_is_a_process_for_each_device(settings, found, ran, config, started, monkeypatch):
    monkeypatch.setattr(devices, "count_devices", lambda section: found)
    assert launch(config(*settings)) == 0
    assert [name for name, _ in started] == [ran]


def test_more_processes_than_devices_are_refused_before_any_starts(config, started, monkeypatch):
    monkeypatch.setattr(devices, "count_devices", lambda section: 4)
    with pytest.raises(
        UserError, match=r"^launch.nproc=5: each process needs a device, and there are 4 here; launch.nproc=auto takes them"
    ):
        launch(config("parallel=ddp", "launch.nproc=5"))
    assert not started


def test_a_process_of_a_launcher_trains_at_once(config, started, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "count_devices", lambda section: pytest.fail("a worker counts nothing"))
    as_worker(monkeypatch)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config("parallel=ddp", "launch.nproc=5").to_dict()))
    assert launch(config("parallel=ddp", "launch.nproc=5")) == run_file(file) == 0
    assert [name for name, _ in started] == ["train", "train"]


# Precompiling


@pytest.mark.parametrize("start", [precompile, launch])
def test_precompiling_is_a_short_run_that_leaves_no_trace(start, config, started, tmp_path):
    given = config("train.eval_every=7", "train.batch_tokens=2048", "tracking=tensorboard", "run.id=mine", "precompile=true")
    before = given.to_dict()
    assert start(given) == 0
    (name, run) = started[0]
    assert name == "train"
    assert (run.precompile, run.compile, run.resume, run.tracking.name) == (True, True, "never", "none")
    assert (run.train.budget, run.train.eval_every, run.train.eval_tokens, run.train.batch_tokens) == ("2steps", 0, 2048, 2048)
    assert run.run.id == "precompile"
    assert not Path(run.run.dir).exists()
    assert Path(run.run.dir) != tmp_path / "runs"
    assert given.to_dict() == before


def test_precompiling_without_compiling_is_refused(config, started):
    with pytest.raises(UserError, match=r"^compile=false: there is nothing to compile ahead"):
        precompile(config("compile=false"))
    assert not started


def test_precompiling_starts_as_many_processes_as_the_run(config, started, monkeypatch):
    monkeypatch.setattr(devices, "count_devices", lambda section: 4)
    assert precompile(config("parallel=ddp")) == 0
    assert started[0][0] == "start 4"


@pytest.mark.parametrize("start", [precompile, launch])
def test_precompiling_by_a_launcher_is_refused(start, config, started, monkeypatch):
    as_worker(monkeypatch)
    with pytest.raises(UserError, match=r"^gpt precompile starts its processes itself \(launch.nproc\): call it without torchrun"):
        start(config("precompile=true"))
    assert not started


def test_the_processes_of_precompiling_work(config, started, tmp_path, monkeypatch):
    as_worker(monkeypatch)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config("precompile=true", "train.budget=2steps").to_dict()))
    assert run_file(file) == 0
    assert started[0][0] == "train"


# Waiting


@pytest.mark.parametrize(("settings", "seconds"), [([], 600), (["launch.timeout=45s"], 45), (["launch.timeout=2h"], 7200)])
def test_processes_wait_for_each_other_as_long_as_is_said(settings, seconds, config, monkeypatch):
    from torch.distributed.launcher import api

    asked = []
    monkeypatch.setattr(api, "LaunchConfig", lambda **given: asked.append(given))
    monkeypatch.setattr(api, "elastic_launch", lambda settings, program: lambda *arguments: None)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    assert START(config("parallel=ddp", "launch.max_restarts=2", *settings), 3) == 0
    assert asked[0]["rdzv_configs"] == {"join_timeout": seconds, "is_host": True}
    assert (asked[0]["nproc_per_node"], asked[0]["max_restarts"], asked[0]["min_nodes"]) == (3, 2, 1)
    assert asked[0]["run_id"].startswith("pretrain-")


@pytest.mark.parametrize("value", ["5", "10steps", "-1s", "soon"])
def test_a_timeout_is_a_time(value, config):
    with pytest.raises(UserError, match=r"^launch\.timeout="):
        config(f"launch.timeout={value}")


def test_several_machines_need_a_name_for_the_run(config):
    with pytest.raises(UserError, match=r"^run\.id: on several machines.*give run.id=<name>$"):
        START(config("parallel=ddp", "launch.nnodes=2", "launch.endpoint=a:1"), 1)


# Ends


@pytest.mark.parametrize(
    ("exits", "code", "said"),
    [
        ([1], 1, ""), ([1, 2], 2, ""),  # the user's mistake is the one worth telling
        ([3, -signal.SIGTERM], 3, ""), ([-signal.SIGTERM, 3], 3, ""), ([-signal.SIGTERM], 143, ""),
        ([-signal.SIGKILL, -signal.SIGTERM], 1,
         "gpt: process 0 of the run was ended by SIGKILL; was it out of memory?, and the others with it\n"),
        ([1, -signal.SIGSEGV], 1, "gpt: process 1 of the run was ended by SIGSEGV, and the others with it\n"),
    ],
)  # fmt: skip
def test_the_end_of_the_processes_is_the_runs(exits, code, said, capsys):
    failures = {rank: SimpleNamespace(exitcode=exit, timestamp=rank) for rank, exit in enumerate(exits)}
    assert launching._failed(failures) == code
    assert capsys.readouterr().err == said


# What is kept of a failure


def test_machines_are_numbered_as_they_are_told(config):
    def address(rank: int) -> str | None:
        several = ["parallel=ddp", "launch.nnodes=12", "launch.endpoint=algo-1:7777", f"launch.node_rank={rank}", "run.id=r"]
        return launching._address(config(*several).launch)

    names = [address(rank) for rank in range(12)]
    assert names[0] == "algo-1", "the one that the others look up"
    assert sorted(map(str, names)) == names
    assert launching._address(config().launch) is None


FAIL = """
import sys, gpt.launch
from gpt.errors import UserError
def fail(path):
    error = {error}
    error.add_note("and a note")
    raise error
gpt.launch.run_file = fail
gpt.launch._run_file_keeping_failure("x")
"""


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        ("UserError('data.paths: no \\'ü\\' here')", "data.paths: no 'ü' here\nand a note"),
        ("RuntimeError('wrong')", "RuntimeError: wrong\nand a note\n(in fail, <string>:7; the log has the traceback)"),
    ],
)
def test_an_error_is_kept_where_it_is_asked_for(error, kept, tmp_path):
    file = tmp_path / "failure"
    environment = {**os.environ, "GPT_FAILURE_FILE": str(file)}
    subprocess.run([sys.executable, "-c", FAIL.format(error=error)], env=environment, capture_output=True, timeout=60, check=False)
    assert file.read_text(encoding="utf-8") == kept


def test_who_leaves_the_telling_to_others_marks_it_and_erases_nothing(tmp_path, monkeypatch):
    file = tmp_path / "failure"
    launching._keep_failure("nowhere")
    monkeypatch.setenv("GPT_FAILURE_FILE", str(file))
    launching._keep_failure("")
    assert file.read_text() == ""
    launching._keep_failure("the first error")
    launching._keep_failure("")
    assert file.read_text() == "the first error"


def test_machines_that_do_not_come_are_named(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GPT_FAILURE_FILE", str(tmp_path / "failure"))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{found.getsockname()[1]}"
    several = ["parallel=ddp", "launch.nnodes=2", f"launch.endpoint={endpoint}", "launch.timeout=2s", "run.id=r"]
    assert START(config(*several), 1) == 1
    assert capsys.readouterr().err == f"gpt: launch.endpoint={endpoint}: not all 2 machines came within 2 s\n"
    assert (tmp_path / "failure").read_text() == f"launch.endpoint={endpoint}: not all 2 machines came within 2 s"
