"""launch=emulated with a run that is played: hosts, interruptions, limits and ends, in namespaces where these are allowed, and without."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from gpt.aws import emulator
from gpt.aws.emulated_hosts import find_isolation, namespaces_problem
from gpt.aws.emulator import emulate
from gpt.compose import compose_run
from gpt.errors import UserError
from tests.aws.played_wheel import WHEEL, played_wheel

ROOT = Path(__file__).parents[2]
NOT_ALLOWED = namespaces_problem()
ISOLATIONS = [
    "portable",
    pytest.param("namespaces", marks=pytest.mark.skipif(NOT_ALLOWED is not None, reason=f"no namespaces: {NOT_ALLOWED}")),
]


@pytest.fixture(params=ISOLATIONS)
def isolation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Emulates a job whose run does `act`; returns the exit code."""
    monkeypatch.setattr("gpt.aws.training_job.build_wheel", lambda: (WHEEL, played_wheel()))
    monkeypatch.setattr(emulator, "_AFTER_FAILURE", 0.5)

    def play(act: str, *settings: str, isolation: str = "portable") -> int:
        places = [f"run.dir={tmp_path}", "run.id=r", f"launch.emulated.isolation={isolation}"]
        config = compose_run("pretrain", ["launch=emulated", "parallel=ddp", *places, *settings])
        config.train.sample_prompts = [act]
        return emulate(config)

    return play


def s3(tmp_path: Path, name: str = "") -> Path:
    return tmp_path / "r" / "emulated" / "s3" / "not-named" / name


def seen(tmp_path: Path, host: str = "algo-1") -> dict[str, Any]:
    return json.loads((tmp_path / "r" / f"seen-{host}.json").read_text())


def description(tmp_path: Path) -> dict[str, Any]:
    newest = max((tmp_path / "r" / "emulated").glob("*/description.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text(encoding="utf-8"))


# What hosts are given


def test_a_host_is_laid_out_as_sagemaker_does(play, tmp_path, isolation, capfd):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a ü.txt").write_text("text")
    settings = [f"launch.channels.extra={tmp_path / 'texts'}", "launch.environment.MINE=a 'b' \"c\" = ü"]
    assert play("train", *settings, isolation=isolation) == 0
    told = seen(tmp_path)
    environment, namespaces = told["environment"], isolation == "namespaces"
    root = environment["SM_MODEL_DIR"].removesuffix("/model")
    assert (root == "/opt/ml") == namespaces
    assert (told["host"] == "algo-1") == namespaces
    assert (told["parent"] == 1) == namespaces, "in namespaces the entrypoint is process 1"
    assert told["config"]["run"]["dir"] == f"{root}/checkpoints"
    assert environment["MINE"] == "a 'b' \"c\" = ü"
    assert environment["SM_CHANNEL_EXTRA"] == f"{root}/input/data/extra"
    assert "AWS_SECRET_ACCESS_KEY" not in environment
    assert json.loads(environment["SM_INPUT_DATA_CONFIG"])["extra"]["TrainingInputMode"] == "File"
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    (upload,) = s3(tmp_path, "inputs").glob("*/a ü.txt")
    assert upload.read_text() == "text"
    said = capfd.readouterr().err
    assert "algo-1 | train on algo-1" in said
    assert f"({isolation}, this machine's network)" in said


def test_credentials_stay_outside(play, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert play("train") == 0
    assert not {"AWS_SECRET_ACCESS_KEY", "HF_TOKEN"} & seen(tmp_path)["environment"].keys()


def test_several_hosts_have_their_numbers_and_their_own_cores(play, tmp_path, isolation):
    assert play("both write", "launch.instance_count=2", isolation=isolation) == 1  # there is no model
    hosts = yaml.safe_load((tmp_path / "r" / "seen.json").read_text())
    assert json.loads(hosts["environment"]["SM_HOSTS"]) == ["algo-1", "algo-2"]
    name, _, port = hosts["config"]["launch"]["endpoint"].partition(":")
    assert name == ("algo-1" if isolation == "namespaces" else "127.0.0.1")
    assert int(port) > 1023
    assert hosts["config"]["launch"]["nnodes"] == 2
    cores = len(os.sched_getaffinity(0))
    assert len(hosts["cores"]) == (cores // 2 if cores > 1 else 1)


@pytest.mark.skipif(NOT_ALLOWED is not None, reason=f"no namespaces: {NOT_ALLOWED}")
def test_an_isolated_job_has_no_network_and_yet_its_hosts_meet(play, tmp_path):
    assert play("train", "launch.network_isolation=true", "launch.instance_count=2", isolation="namespaces") == 0
    assert seen(tmp_path)["interfaces"] == ["lo"]
    assert "lo" in [name for _, name in socket.if_nameindex()]


def test_without_namespaces_isolation_is_said_to_be_missing(play, capfd):
    assert play("train", "launch.network_isolation=true") == 0
    assert "note: launch.network_isolation=true is not rehearsed" in capfd.readouterr().err


def test_a_machine_without_namespaces_is_told_apart(monkeypatch):
    monkeypatch.setattr("gpt.aws.emulated_hosts.namespaces_problem", lambda: "Operation not permitted")
    assert find_isolation("auto") == "portable"
    with pytest.raises(UserError, match=r"isolation=namespaces: this machine does not allow them \(Operation not permitted\)"):
        find_isolation("namespaces")


# What is left


def test_the_run_is_where_a_local_one_would_be_and_s3_holds_the_rest(play, tmp_path):
    assert play("train", "seed=7") == 0
    assert (tmp_path / "r" / "model" / "weights").read_text() == "model"
    assert (tmp_path / "r" / "checkpoints" / "step-00000001" / "weights").is_file()
    own = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert (own["seed"], own["run"], own["launch"]["name"]) == (7, {"id": "r", "dir": str(tmp_path)}, "emulated")
    request = json.loads(next((tmp_path / "r" / "emulated").glob("*/request.json")).read_text())
    output = s3(tmp_path, f"r/jobs/{request['TrainingJobName']}/output")
    assert (output / "model" / "weights").read_text() == "model"
    assert (output / "data" / "report.html").read_text() == "report"
    assert (s3(tmp_path, "r/checkpoints/r/checkpoints/step-00000001/weights")).is_file()
    assert description(tmp_path)["TrainingJobStatus"] == "Completed"
    assert "train on algo-1" in next((tmp_path / "r" / "emulated").glob("*/algo-1.log")).read_text()
    assert not list((tmp_path / "r" / "emulated").glob("*/hosts")), "disks of hosts are gone"


def test_the_same_run_goes_on_from_s3_under_another_job_name(play, tmp_path, capfd):
    assert play("train") == 0
    assert play("train") == 0
    assert len(list((tmp_path / "r").glob("start-*"))) == 2
    assert len(list((tmp_path / "r" / "emulated").glob("*/request.json"))) == 2
    assert "(3 were there)" in capfd.readouterr().err


def test_a_run_that_trained_here_is_not_taken_over(play, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").write_text("seed: 1")
    with pytest.raises(UserError, match=r"^run.id=r: .* holds a run that trained without launch=emulated"):
        play("train")


def test_a_run_that_went_on_here_is_not_thrown_back(play, tmp_path):
    assert play("train") == 0
    (tmp_path / "r" / "checkpoints" / "step-00000009").mkdir()
    with pytest.raises(UserError, match=r"trained without launch=emulated; choose another run.id, or go on with it here: resume="):
        play("train")


def test_a_run_that_is_being_worked_on_is_left_alone(play, tmp_path):
    from filelock import FileLock

    (tmp_path / "r").mkdir()
    with FileLock(tmp_path / "r" / ".lock"), pytest.raises(UserError, match=r"^run.id=r: another process is working in"):
        play("train")


def test_inputs_of_the_real_s3_are_refused_with_a_remedy(play, tmp_path):
    with pytest.raises(
        UserError, match=r"the channel train is s3://bucket/texts/, which a rehearsal cannot read; give a local folder, or put"
    ):
        play("train", "data=text", "data.paths=[s3://bucket/texts/]")
    assert not (tmp_path / "r").exists()


def test_a_dry_run_is_of_what_is_sent(play, tmp_path):
    with pytest.raises(UserError, match=r"^launch\.dry_run=true is of launch=sagemaker, and this is launch=emulated, which sends nothing"):
        play("train", "launch.dry_run=true")
    assert not (tmp_path / "r").exists()


# Failures


@pytest.mark.parametrize("act", ["one fails", "one fails alone"])
def test_the_first_host_to_fail_says_why(play, tmp_path, isolation, capfd, act):
    text = "data: 'x' = \"ü\" is wrong"
    code = play(f"{act}:{text}", "launch.instance_count=2", "launch.emulated.notice=1s", isolation=isolation)
    assert code == (2 if act == "one fails" else 1)
    assert description(tmp_path)["FailureReason"] == f"AlgorithmError: {text}, exit code: {code}"
    assert f"emulated: Failed with exit code {code}: {text}" in capfd.readouterr().err


def test_hosts_that_write_different_checkpoints_are_noticed(play, tmp_path, capfd):
    play("both write", "launch.instance_count=2")
    assert "warning: hosts 1 and 2 both write checkpoints/r/seen.json, with different content" in capfd.readouterr().err


def test_what_a_host_writes_before_anything_is_copied_is_copied(play, tmp_path, monkeypatch):
    make = emulator.CheckpointSync

    def slowly_made(*args: Any) -> Any:
        time.sleep(1)  # longer than a host takes to write
        return make(*args)

    monkeypatch.setattr(emulator, "CheckpointSync", slowly_made)
    assert play("train") == 0
    assert [path.parent.parent.name for path in s3(tmp_path).rglob("seen-*.json") if "output" not in path.parts] == ["checkpoints"]


# Interruptions and limits


def test_a_spot_interruption_is_survived_twice(play, tmp_path, isolation, capfd):
    again = ["launch.emulated.interrupt_after=1.5s", "launch.emulated.interruptions=2"]
    assert play("stop when told", *again, isolation=isolation) == 1  # it leaves no model at last
    assert {path.name for path in (tmp_path / "r").glob("s*-*")} >= {"saved-1", "saved-2", "start-1", "start-2", "start-3"}
    said = capfd.readouterr().err
    assert said.count("SIGTERM to every host, SIGKILL after 120 s") == 2
    assert "spot interruption 2 of 2" in said
    assert description(tmp_path)["Interruptions"] == 2
    assert json.loads(next((tmp_path / "r" / "emulated").glob("*/request.json")).read_text())["EnableManagedSpotTraining"] is True


def test_who_does_not_heed_the_notice_is_killed(play, tmp_path, isolation, capfd):
    began = time.monotonic()
    settings = ["launch.max_runtime=2s", "launch.emulated.notice=1s"]
    assert play("be deaf", *settings, isolation=isolation) == 143
    assert time.monotonic() - began < 20
    said = capfd.readouterr().err
    assert "launch.max_runtime=2s is over: SIGTERM to every host, SIGKILL after 1 s" in said
    assert "SIGKILL to algo-1" in said
    assert "MaxRuntimeExceeded; continue with: gpt pretrain resume=" in said
    assert description(tmp_path)["TrainingJobStatus"] == "Stopped"
    assert description(tmp_path)["SecondaryStatus"] == "MaxRuntimeExceeded"
    assert (tmp_path / "r" / "ready").exists(), "what had been synchronised is there"


# As a user starts and stops it


def started(tmp_path: Path, isolation: str, act: str) -> subprocess.Popen[str]:
    """The emulation in a process of its own, when its run is ready."""
    code = (
        "import sys; from gpt.aws import training_job, emulator; from tests.aws.played_wheel import WHEEL, played_wheel; "
        "from gpt.compose import compose_run; training_job.build_wheel = lambda: (WHEEL, played_wheel()); "
        f"c = compose_run('pretrain', ['launch=emulated', 'run.dir={tmp_path}', 'run.id=r', 'launch.emulated.isolation={isolation}', "
        f"'launch.emulated.notice=20s']); c.train.sample_prompts = [{act!r}]; sys.exit(emulator.emulate(c))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 30
    while not list((tmp_path / "r").glob("emulated/*/hosts/algo-1/checkpoints/r/ready")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def left_of(tmp_path: Path) -> list[psutil.Process]:
    """Processes of the hosts that still run."""
    (request,) = (tmp_path / "r" / "emulated").glob("*/request.json")
    name = json.loads(request.read_text(encoding="utf-8"))["TrainingJobName"]

    def is_ours(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return process.environ().get("TRAINING_JOB_NAME") == name and process.status() != psutil.STATUS_ZOMBIE
        return False

    return [process for process in psutil.process_iter() if is_ours(process)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_stops_the_hosts_and_leaves_nothing_behind(tmp_path, isolation, number, code):
    process = started(tmp_path, isolation, "stop when told")
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code, said
    assert "once more ends it at once: SIGTERM to every host" in said
    assert (tmp_path / "r" / "saved-1").exists()
    assert description(tmp_path)["TrainingJobStatus"] == "Stopped"
    assert not left_of(tmp_path)


def test_a_second_ctrl_c_ends_it_at_once(tmp_path, isolation):
    process = started(tmp_path, isolation, "be deaf")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode != 0
    assert not left_of(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a host that the emulator is gone")
def test_hosts_end_with_a_killed_emulator(tmp_path, isolation):
    process = started(tmp_path, isolation, "stop when told")
    assert left_of(tmp_path)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while left_of(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_threads_do_not_survive(play):
    play("train")
    assert not [thread for thread in threading.enumerate() if thread.name in ("algo-1", "checkpoint sync")]
