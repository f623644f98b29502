"""Runs on two machines that share no disk: each has its own run.dir and its own cache, and the run directory is on the first one's."""

import os
import signal
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
    started = []
    config.launch.nnodes, config.launch.endpoint = 2, f"127.0.0.1:{free_port()}"
    for rank in range(2):
        disk = tmp_path / f"machine-{rank}"
        disk.mkdir(exist_ok=True)
        config.launch.node_rank, config.launch.nproc = rank, processes
        config.run.dir, config.data.cache_dir = str(disk / "runs"), str(disk / "cache")
        file = disk / "config.yaml"
        file.write_text(yaml.safe_dump(config.to_dict()))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GPT_FAILURE_FILE": str(disk / "failure")}
        command = [sys.executable, "-m", "gpt.launch", str(file)]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=disk))
    return started


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
    (worker,) = [child for child in psutil.Process(machines[1].pid).children() if "gpt.launch" in " ".join(child.cmdline())]
    worker.send_signal(signal.SIGKILL)
    ends(machines)
    assert [machine.returncode for machine in machines] == [1, 1]
    assert (tmp_path / "machine-0" / "failure").read_text() == ""
    assert (tmp_path / "machine-1" / "failure").read_text().startswith("process 1 of the run was ended by SIGKILL; was it out of memory?")


def test_other_data_on_another_machine_is_refused(monkeypatch):
    monkeypatch.setattr(World, "share", lambda self, make: "that")
    refuse_unlike_machines("that", World())
    with pytest.raises(UserError, match=r"^data: .* are not those of the first machine \(fingerprint this, there that\)"):
        refuse_unlike_machines("this", World())
