"""What can go wrong while a run goes on: kills, signals, full disks, damaged files, clocks. docs/reliability.md says what happens."""

import datetime
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gpt.cli import main
from gpt.compose import compose_run
from gpt.config import RunConfig
from gpt.training.checkpoint import COMPLETE, STATE, find_damage, list_checkpoints, read_state
from gpt.training.metrics import read_metrics
from gpt.training.trainer import Trainer
from tests.end_to_end.test_pretrain import SMALL, assert_same_end, call, fork, limit_file_size, run, wait_for_step
from tests.processes import Forked, seconds_to_end
from tests.training.finetuning import SUMS, save_small_model, write_rows

ROOT = Path(__file__).parents[2]
KILLER = Path(__file__).with_name("killed_runs.py")


@pytest.fixture
def settings(tmp_path: Path, corpus: Path, cache_dir: Path) -> Callable[..., list[str]]:
    def make(*overrides: str) -> list[str]:
        places = [f"data.paths=[{corpus}]", f"data.cache_dir={cache_dir}", f"run.dir={tmp_path / 'runs'}"]
        return [*SMALL, "train.eval_every=0", *places, *overrides]

    return make


@pytest.fixture
def command(settings) -> Callable[..., list[str]]:
    return lambda *overrides: [sys.executable, "-m", "gpt", "pretrain", *settings(*overrides)]


@pytest.fixture
def config_of(settings) -> Callable[..., RunConfig]:
    return lambda *overrides: compose_run("pretrain", settings(*overrides))


def steps_of(run_directory: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run_directory / "metrics.jsonl") if "loss" in line]


def ended(process: Forked) -> subprocess.CompletedProcess[str]:
    _, said = process.communicate(timeout=120)
    return subprocess.CompletedProcess([], process.wait(), stderr=said)


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence that a run ended with."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("gpt: ")]
    return error


@pytest.mark.usefixtures("no_report")
def test_a_run_that_ends_with_its_first_step_has_a_line_of_metrics(config_of, tmp_path):
    """What the first step measured is dropped, for it takes longer, but not where it is all there is."""
    assert Trainer(config_of("run.id=r", "train.budget=1steps", "train.log_every=10")).fit().exit_code == 0
    assert steps_of(tmp_path / "runs" / "r") == [1]


# SIGKILL


def killed_over_and_over(config: RunConfig, folder: Path, kills: int) -> dict[str, int]:
    """Kill runs of a config at random instants; those that come to an end are the one that was not killed, bit for bit."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    killer = [sys.executable, str(KILLER), str(file), str(kills)]
    done = subprocess.run(killer, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_instants_a_run_ends_as_if_it_had_not_been(config_of, tmp_path, kills):
    counts = killed_over_and_over(config_of("train.budget=24steps", "checkpoint.every=1steps", "train.eval_every=8"), tmp_path, kills)
    assert counts["kills"] == kills
    assert counts["unfinished"] > 0, "some kills were to come while a checkpoint was being written"


@pytest.mark.slow
def test_killed_at_random_a_finetuning_with_dropout_and_an_average_ends_alike(tmp_path, cache_dir):
    model = save_small_model(tmp_path / "start")
    rows = write_rows(tmp_path / "rows.jsonl", SUMS)
    places = [f"data.paths=[{rows}]", f"init={model}", f"data.cache_dir={cache_dir}", f"run.dir={tmp_path / 'runs'}"]
    length = ["train.batch_tokens=256", "train.budget=30steps", "checkpoint.every=2steps", "train.eval_every=9", "train.sample_tokens=2"]
    settings = ["debug=golden", "data=jsonl", *places, *length, "train.ema=0.9", "model.dropout=0.1", "optimizer=muon"]
    assert killed_over_and_over(compose_run("finetune", settings), tmp_path, 20)["kills"] == 20


# SIGTERM


def terminated(process: subprocess.Popen[str] | Forked) -> tuple[float, str]:
    """Ask a run to end; the seconds that it took, and what it said."""
    took = seconds_to_end(process, signal.SIGTERM)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 143, stderr
    assert "Traceback" not in stderr
    assert "continue with: gpt pretrain resume=" in stderr
    return took, stderr


def interrupted_state(run_directory: Path, stderr: str):
    """Of the checkpoint that an interrupted run left, which must be whole, and its newest."""
    step, newest = list_checkpoints(run_directory / "checkpoints")[-1]
    assert find_damage(newest) is None
    assert f"interrupted at step {step};" in stderr
    return read_state(newest)


def wait_for_writing(run_directory: Path, process: Forked | subprocess.Popen[str]) -> None:
    """Until a checkpoint is being written."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if list(run_directory.glob("checkpoints/.step-*.new")):
            return
        time.sleep(0.0005)
    raise AssertionError("no checkpoint was written")


WHEN = {
    "training": ["train.eval_every=0"],
    "validating": ["train.eval_every=6", "train.eval_tokens=1000000"],
    "writing": ["train.eval_every=0", "checkpoint.every=3steps"],
}


def check_sigterm(process: Forked | subprocess.Popen[str], run_directory: Path, when: str, least_step: int = 6) -> None:
    wait_for_step(run_directory, least_step, process)
    if when == "writing":
        wait_for_writing(run_directory, process)
    took, stderr = terminated(process)
    assert took < 10
    state = interrupted_state(run_directory, stderr)
    assert state.step >= least_step
    if when == "validating":  # the line of the step comes before its validation, which takes longer than a test looks away
        assert (state.step, state.validated_step) == (least_step, 0)


@pytest.mark.parametrize("when", WHEN)
def test_sigterm_saves_and_ends(command, tmp_path, when):
    arguments = command("run.id=r", "train.budget=100000steps", "model.n_layer=6", *WHEN[when])
    check_sigterm(fork(arguments, tmp_path / "log"), tmp_path / "runs" / "r", when)


@pytest.mark.slow
@pytest.mark.parametrize("when", WHEN)
def test_sigterm_ends_the_default_job_within_ten_seconds(tmp_path, cache_dir, when):
    """`gpt pretrain` as it comes, but for lines of metrics at each step, to know where it is."""
    places = [f"data.cache_dir={cache_dir}", f"run.dir={tmp_path / 'runs'}", "run.id=r", "train.log_every=1"]
    assert run([sys.executable, "-m", "gpt", "prepare", places[0]]).returncode == 0
    arguments = [sys.executable, "-m", "gpt", "pretrain", *places, *WHEN[when]]
    check_sigterm(subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True), tmp_path / "runs" / "r", when)


# Full disks


TWELVE = ["model.n_layer=4", "train.budget=12steps", "checkpoint.every=2steps", "checkpoint.keep_last=9", "run.id=r"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus, cache_dir) -> Path:
    """A run of 12 steps with a checkpoint every other one, all kept."""
    runs = tmp_path_factory.mktemp("whole")
    places = [f"data.paths=[{corpus}]", f"data.cache_dir={cache_dir}", f"run.dir={runs}"]
    assert main(["pretrain", *SMALL, "train.eval_every=0", *places, *TWELVE]) == 0
    return runs / "r"


@pytest.fixture
def killed(whole, tmp_path) -> Path:
    """That run as it was when the checkpoint of step 8 had been saved and the process was killed soon after."""
    run_directory = tmp_path / "runs" / "r"
    shutil.copytree(whole, run_directory)
    for later, path in list_checkpoints(run_directory / "checkpoints"):
        if later > 8:
            shutil.rmtree(path)
    shutil.rmtree(run_directory / "model")
    return run_directory


def test_a_disk_that_is_full_for_a_while_costs_nothing_but_checkpoints(command, whole, killed, tmp_path):
    """Training goes on to its last step; with room again, it ends as if nothing had been."""
    kept = list_checkpoints(killed / "checkpoints")
    done = ended(fork(command(*TWELVE), tmp_path / "log", limit_file_size))
    error = error_of(done)
    assert "the checkpoint of step 12 could not be written" in error
    assert f"the last checkpoint is {kept[-1][1]}" in error
    assert re.search("warning: the checkpoint of step 10 could not be written .*; training goes on", done.stderr)
    assert steps_of(killed) == list(range(1, 13)), "training went on"
    assert list_checkpoints(killed / "checkpoints") == kept
    assert [find_damage(path) for _, path in kept] == [None] * len(kept)
    assert main(command(*TWELVE)[3:]) == 0
    assert_same_end(whole, killed)


def limit_to_metrics() -> None:
    """No file may grow beyond 4 MB, which checkpoints of these runs are far below."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))


def test_metrics_that_get_no_room_are_said_and_training_is_not_lost(command, whole, killed, tmp_path):
    lines = [line for line in read_metrics(killed / "metrics.jsonl") if line["step"] <= 8]
    lines[0]["note"] = "x" * (4_000_000 - 300 - sum(len(json.dumps(line)) for line in lines))
    (killed / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = ended(fork(command(*TWELVE), tmp_path / "log", limit_to_metrics))
    assert str(killed) in error_of(done)
    assert done.stderr.count("metrics.jsonl could not be written") == 1, done.stderr
    assert read_state(list_checkpoints(killed / "checkpoints")[-1][1]).step == 12
    assert steps_of(killed) == list(range(1, 9))
    assert main(command(*TWELVE)[3:]) == 0
    assert (killed / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


def test_metrics_that_get_room_again_are_all_there(tmp_path):
    """The last line was cut where the room ended, and goes on there."""
    script = """
import resource, signal, sys
from pathlib import Path
from gpt.training.metrics import MetricsFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
metrics, said = MetricsFile(Path(sys.argv[1])), []
for step in range(1, 9):
    room = 50 if step < 7 else resource.RLIM_INFINITY  # a line has 33 bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    said.append(metrics.write({"step": step, "note": "x" * 9}))
metrics.close()
assert [step for step, error in enumerate(said, 1) if error] == [2], said
"""
    file = tmp_path / "metrics.jsonl"
    subprocess.run([sys.executable, "-c", script, str(file)], check=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert [line["step"] for line in read_metrics(file)] == list(range(1, 9))


def test_a_log_that_cannot_be_written_stops_nothing(command, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(command("run.id=r", "train.budget=3steps"), stderr=full, timeout=120, check=False)
    assert steps_of(tmp_path / "runs" / "r") == [1, 2, 3]
    assert (tmp_path / "runs" / "r" / "model" / "model.safetensors").is_file()
    assert done.returncode in (0, 120), "120: Python itself could not empty its buffer"


# Damaged files


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
@pytest.mark.parametrize("name", ["optimizer/state.safetensors", "state.json"])
def test_from_a_damaged_checkpoint_the_one_before_it_is_taken(command, whole, killed, capsys, name, damage):
    newest = killed / "checkpoints" / "step-00000008"
    data = bytearray((newest / name).read_bytes())
    if damage == "truncated":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 4
    (newest / name).write_bytes(data)
    assert main(command(*TWELVE)[3:]) == 0
    said = capsys.readouterr().err
    assert f"{newest} is not whole ({name} " in said
    assert "step-00000006 at step 6" in said
    assert_same_end(whole, killed)


def files_of(run_directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in run_directory.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_field_of_another_version_is_refused_by_name(command, killed, capsys):
    """As that version writes it: listed in COMPLETE, so nothing is damaged."""
    newest = list_checkpoints(killed / "checkpoints")[-1][1]
    state = json.dumps(json.loads((newest / STATE).read_text()) | {"flux": 1})
    (newest / STATE).write_text(state)
    listed = json.loads((newest / COMPLETE).read_text())
    listed[STATE] = {"bytes": len(state), "sha256": hashlib.sha256(state.encode()).hexdigest()}
    (newest / COMPLETE).write_text(json.dumps(listed))
    before = files_of(killed)
    assert main(command(*TWELVE)[3:]) == 2
    assert "has the field flux, which this version of gpt does not know" in capsys.readouterr().err
    assert files_of(killed) == before


@pytest.mark.parametrize("text", ["", "model: [", "model: {n_layer: two}", None])
def test_a_damaged_config_is_named_and_nothing_is_replaced(command, killed, capsys, text):
    file = killed / "config.yaml"
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    before = files_of(killed)
    assert main(command(*TWELVE)[3:]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gpt: run.id=r: ")
    assert "config.yaml" in error
    assert files_of(killed) == before


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory, corpus, cache_dir) -> Path:
    """A run of 4 steps that may go on."""
    runs = tmp_path_factory.mktemp("four")
    places = [f"data.paths=[{corpus}]", f"data.cache_dir={cache_dir}", f"run.dir={runs}"]
    assert main(["pretrain", *SMALL, "train.eval_every=0", *places, "run.id=r", "schedule=constant", "train.budget=4steps"]) == 0
    return runs / "r"


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("tail", [b'{"step": 5, "lo', '{"step": 5, "note": "\u00fc'.encode()[:-1], b"\0" * 40, b'{"step": 4}\n{"step"'])
def test_metrics_that_a_kill_cut_short_lose_that_line_and_no_other(config_of, four_steps, tmp_path, tail):
    file = shutil.copytree(four_steps, tmp_path / "runs" / "r") / "metrics.jsonl"
    first = file.read_bytes()
    file.write_bytes(first + tail)
    Trainer(config_of("run.id=r", "schedule=constant", "train.budget=7steps")).fit()
    assert file.read_bytes().startswith(first)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert sorted({line["step"] for line in lines}) == list(range(1, 8))


# Clocks


def test_a_clock_that_goes_back_an_hour_changes_nothing(config_of, tmp_path, monkeypatch):
    class EarlierDatetime(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) - datetime.timedelta(hours=1)

    settings = ["train.budget=12steps", "checkpoint.every=2steps", "train.eval_every=4", "model.dropout=0.1"]
    Trainer(config_of(*settings, "run.id=steady")).fit()
    trainer = Trainer(config_of(*settings, "run.id=back"))
    step, now, now_ns = trainer._next_step, time.time, time.time_ns

    def turn_back(stop: bool) -> bool:
        if trainer.state.step == 5:
            monkeypatch.setattr(time, "time", lambda: now() - 3600)
            monkeypatch.setattr(time, "time_ns", lambda: now_ns() - 3600 * 10**9)
            monkeypatch.setattr(datetime, "datetime", EarlierDatetime)
            for path in (tmp_path / "runs" / "back").rglob("*"):  # files from the future
                os.utime(path, (now() + 3600, now() + 3600))
        return step(stop)

    trainer._next_step = turn_back
    trainer.fit()
    assert_same_end(tmp_path / "runs" / "steady", tmp_path / "runs" / "back")
    lines = [line for line in read_metrics(tmp_path / "runs" / "back" / "metrics.jsonl") if "loss" in line]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert 0 < seconds[-1] < 60
    assert all(value >= 0 for line in lines for key, value in line.items() if key.startswith(("time_", "share_", "tokens_per")))
    Trainer(config_of(*settings, "run.id=back", "train.budget=14steps", "schedule=constant")).fit()


def test_a_budget_of_time_is_that_of_the_monotonic_clock(config_of, monkeypatch):
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 3600 * (time.monotonic() % 2 > 1))
    result = Trainer(config_of("train.budget=3s")).fit()
    assert result.state.step > 0
    assert 3 <= result.state.seconds < 12


def test_durations_are_never_differences_of_the_wall_clock():
    """`time.time` is not used at all; `datetime` names runs and says when they began."""
    for path in (ROOT / "gpt").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\btime\.time(_ns)?\(|from time import", text), path
        if path.parent.name != "aws":  # whose clock tells the times of a job
            assert not re.search(r"(now\([^)]*\)\s*-\s)|(-\s*datetime\.datetime)|total_seconds\(", text), path


# The run directory


def test_a_second_process_is_refused_and_a_killed_one_does_not_block(command, tmp_path, capsys):
    settings = ["run.id=r", "checkpoint.every=2steps"]
    first = fork(command(*settings, "train.budget=100000steps"), tmp_path / "log")
    wait_for_step(tmp_path / "runs" / "r", 5, first)
    before = steps_of(tmp_path / "runs" / "r")
    assert f"another process is working in {tmp_path / 'runs' / 'r'}" in error_of(call(command(*settings)))
    assert steps_of(tmp_path / "runs" / "r")[: len(before)] == before, "the refused one touches nothing"
    assert first.poll() is None
    first.kill()
    first.wait()
    assert main(command(*settings, "train.budget=1steps")[3:]) == 0
    assert "resuming from" in capsys.readouterr().err


def test_a_run_directory_that_is_removed_meanwhile_is_made_again(command, tmp_path, monkeypatch):
    settings = ["run.id=r", "checkpoint.every=10steps"]
    run_directory = tmp_path / "runs" / "r"
    step = Trainer._next_step

    def step_and_remove(self: Trainer, stop: bool) -> bool:
        if self.state.step == 15:
            run_directory.rename(tmp_path / "gone")
        return step(self, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_next_step", step_and_remove)
        done = call(command(*settings, "train.budget=35steps"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("was removed while the run goes on") == 1
    assert steps_of(run_directory)[-1] == 35
    assert (run_directory / "model" / "model.safetensors").is_file()
    assert main(command(*settings, "train.budget=36steps")[3:]) == 0
    assert read_state(list_checkpoints(run_directory / "checkpoints")[-1][1]).step == 36
