"""Runs on two machines that share no disk: each has its own run.dir and its own cache, and the run directory is on the first one's."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from gpt.config import RunConfig
from gpt.errors import UserError
from gpt.runtime.distributed import World
from gpt.training.resuming import refuse_unlike_machines
from gpt.training.trainer import Trainer
from tests.end_to_end.test_pretrain import wait_for_step
from tests.training.test_processes import TEXT, curve, launch

ROOT = Path(__file__).parents[2]
RUN = [*TEXT, "train.micro_batch=1", "precision=fp32"]  # with an average of the weights, so that a checkpoint is read at the end


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_machines(config: RunConfig, tmp_path: Path, processes: int = 1) -> list[subprocess.Popen[str]]:
    """The config's run on two machines, whose disks are tmp_path/machine-0 and machine-1."""
    config.launch.nnodes, config.launch.endpoint = 2, f"127.0.0.1:{free_port()}"
    config.launch.nproc = processes
    for rank in range(2):
        disk = tmp_path / f"machine-{rank}"
        disk.mkdir(exist_ok=True)
        config.launch.node_rank = rank
        config.run.dir, config.data.cache_dir = str(disk / "runs"), str(disk / "cache")
        (disk / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    return [start_machine(tmp_path / f"machine-{rank}") for rank in range(2)]


def start_machine(disk: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GPT_FAILURE_FILE": str(disk / "failure")}
    command = [sys.executable, "-m", "gpt.launch", str(disk / "config.yaml")]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=disk)


def worker_of(machine: subprocess.Popen[str]) -> psutil.Process:
    (worker,) = [child for child in psutil.Process(machine.pid).children() if "gpt.launch" in " ".join(child.cmdline())]
    return worker


def ends(machines: list[subprocess.Popen[str]]) -> list[str]:
    """What they said, once they have ended."""
    return [machine.communicate(timeout=200)[1] for machine in machines]


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("layout", "processes"), [("ddp", 1), pytest.param("fsdp", 2, marks=pytest.mark.slow)])
def test_machines_without_a_common_disk_train_as_one_does(layout, processes, text_run, tmp_path):
    settings = [*RUN, f"parallel={layout}", "run.id=r"]
    launch({"r": text_run(*settings)}, tmp_path / "one", 2 * processes)
    machines = start_machines(text_run(*settings), tmp_path, processes)
    said = ends(machines)
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert weights(tmp_path / "machine-0" / "runs" / "r") == weights(tmp_path / "runs" / "r")
    assert curve(tmp_path / "machine-0" / "runs" / "r", "val_loss") == curve(tmp_path / "runs" / "r", "val_loss")
    assert not (tmp_path / "machine-1" / "runs").exists(), "what the second machine writes would be synchronised with the first one's"
    assert (tmp_path / "machine-1" / "cache").is_dir()
    assert not list(tmp_path.glob("machine-*/failure"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_who_lacks_the_checkpoint_is_sent_it(layout, text_run, tmp_path):
    settings = [*RUN, f"parallel={layout}", "train.budget=60steps", "checkpoint.every=1h", "run.id=r"]
    launch({"r": text_run(*settings)}, tmp_path / "one", 2)
    machines = start_machines(text_run(*settings), tmp_path)
    wait_for_step(tmp_path / "machine-0" / "runs" / "r", 15, machines[0])
    machines[1].terminate()  # both stop
    ends(machines)
    assert [machine.returncode for machine in machines] == [143, 143]
    machines = start_machines(text_run(*settings), tmp_path)
    said = ends(machines)
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "resuming from" in said[0]
    assert weights(tmp_path / "machine-0" / "runs" / "r") == weights(tmp_path / "runs" / "r")
    assert not (tmp_path / "machine-1" / "runs").exists()


def test_the_machine_of_the_first_failure_says_why_and_the_other_says_that_nobody_need_ask_it(text_run, tmp_path):
    config = text_run(*RUN, "parallel=ddp", "train.budget=100000steps", "run.id=r")
    machines = start_machines(config, tmp_path)
    wait_for_step(tmp_path / "machine-0" / "runs" / "r", 3, machines[0])
    worker_of(machines[1]).kill()
    ends(machines)
    assert [machine.returncode for machine in machines] == [1, 1]
    assert (tmp_path / "machine-0" / "failure").read_text() == ""
    assert (tmp_path / "machine-1" / "failure").read_text().startswith("process 1 of the run was ended by SIGKILL; was it out of memory?")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_of_any_machine_that_dies_is_a_restart_of_all(rank, text_run, tmp_path):
    """Only the agent whose worker it was counts the restart."""
    settings = [*RUN, "parallel=ddp", "train.budget=60steps", "checkpoint.every=10steps", "run.id=r", "launch.timeout=60s"]
    launch({"r": text_run(*settings)}, tmp_path / "one", 2)
    machines = start_machines(text_run(*settings, "launch.max_restarts=1", "resume=never"), tmp_path)
    wait_for_step(tmp_path / "machine-0" / "runs" / "r", 20, machines[0])
    worker_of(machines[rank]).kill()
    said = ends(machines)
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "resuming from" in said[0]
    assert weights(tmp_path / "machine-0" / "runs" / "r") == weights(tmp_path / "runs" / "r")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "sentence"), [(1, "not all 2 machines came within 8 s"), (0, "the connection to the other machines is lost")]
)
def test_a_machine_that_stays_away_is_named(lost, sentence, text_run, tmp_path):
    settings = [*RUN, "parallel=ddp", "train.budget=100000steps", "run.id=r", "launch.max_restarts=1", "launch.timeout=8s"]
    machines = start_machines(text_run(*settings), tmp_path)
    wait_for_step(tmp_path / "machine-0" / "runs" / "r", 3, machines[0])
    machines[lost].kill()
    said = ends(machines)
    assert machines[1 - lost].returncode == 1
    assert sentence in said[1 - lost]
    assert "interrupted at step" in said[0], "the main process saves, whichever agent is gone"


def test_what_is_started_again_goes_on_though_it_must_not_resume(text_run, tmp_path, monkeypatch):
    settings = ["run.id=r", "resume=never", "schedule=constant"]
    Trainer(text_run(*settings, "train.budget=1steps")).fit()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Trainer(text_run(*settings, "train.budget=2steps")).fit().state.step == 2
    assert len(curve(tmp_path / "runs" / "r", "loss")) == 2, "a step of each"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(UserError, match=r"r exists, and resume=never; choose another run\.id"):
        Trainer(text_run(*settings, "train.budget=3steps")).fit()


@pytest.mark.slow
def test_a_machine_that_says_nothing_more_is_a_timeout_of_the_other(text_run, tmp_path):
    """Stopped between two steps or in one: whatever the other waits in has the run's timeout."""
    settings = [*RUN, "parallel=ddp", "train.budget=100000steps", "run.id=r", "launch.timeout=8s", "checkpoint.every=2steps"]
    machines = start_machines(text_run(*settings), tmp_path)
    wait_for_step(tmp_path / "machine-0" / "runs" / "r", 10, machines[0])
    worker = worker_of(machines[1])
    for process in (worker, psutil.Process(machines[1].pid)):
        process.suspend()
    try:
        _, said = machines[0].communicate(timeout=120)
        assert machines[0].returncode == 1
        assert "process 0 waited 8s (launch.timeout) for the others in vain while" in said
    finally:
        for process in (worker, machines[1]):
            process.kill()
        machines[1].communicate(timeout=60)


def test_other_data_on_another_machine_is_refused(monkeypatch):
    monkeypatch.setattr(World, "share", lambda self, make: "that")
    refuse_unlike_machines("that", World())
    with pytest.raises(UserError, match=r"^data: .* are not those of the first machine \(fingerprint this, there that\)"):
        refuse_unlike_machines("this", World())
