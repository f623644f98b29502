"""Python, the disk and the limits: each check where it holds, and where its condition really fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from doctor_standins import in_child

from gpt.commands import DoctorConfig
from gpt.doctor import machine

Usage = namedtuple("Usage", "total used free")
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")  # a process that may mount its own file systems


def mounting(where: Path | str, size: str) -> tuple[str, ...]:
    """The command that runs another one with a small file system at a folder; skips where that is not allowed."""
    try:
        allowed = subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0
    except OSError:
        allowed = False
    if not allowed:
        pytest.skip("this system lets nobody mount a file system of his own")
    return (*NAMESPACE, "sh", "-c", f'mount -t tmpfs -o size={size} none "$0" && exec "$@"', str(where))


def test_this_python_is_new_enough(monkeypatch):
    assert machine.python(DoctorConfig()).state == "ok"
    monkeypatch.setattr(sys, "version_info", (3, 10, 14, "final", 0))
    result = machine.python(DoctorConfig())
    assert (result.state, result.fix) == ("problem", "python3.11 -m venv .venv, and install there")
    assert "3.11 or newer is needed" in result.found


def test_the_run_directory_is_measured_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_PLENTY_FREE", 0)
    monkeypatch.setattr(machine, "_LEAST_FREE", 0)
    monkeypatch.setattr(machine, "_SLOW_DISK", 0)
    result = machine.run_directory(DoctorConfig(run_dir=str(tmp_path / "not" / "yet")))
    assert result.state == "ok", result
    assert "GiB free, writes " in result.found
    assert not list(tmp_path.iterdir())


def test_a_run_directory_below_a_file(tmp_path):
    (tmp_path / "runs").touch()
    result = machine.run_directory(DoctorConfig(run_dir=str(tmp_path / "runs" / "mine")))
    assert (result.state, result.fix) == ("problem", "give runs another folder: run.dir=<folder>")
    assert result.found.endswith("cannot be written to: Not a directory")


def test_a_run_directory_that_takes_no_files(tmp_path):
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    )
    result = in_child(machine.run_directory, DoctorConfig(run_dir=str(tmp_path)), before=limit)
    assert (result.state, result.found) == ("problem", f"{tmp_path} cannot be written to: File too large")


def test_a_full_disk(tmp_path):
    result = in_child(machine.run_directory, DoctorConfig(run_dir=str(tmp_path)), within=mounting(tmp_path, "100m"))
    assert result.state == "problem"
    assert "0.1 GiB free" in result.found
    assert "gpt runs" in result.fix


def test_a_disk_that_is_soon_full(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 << 30, 96 << 30, 4 << 30))
    result = machine.run_directory(DoctorConfig(run_dir=str(tmp_path)))
    assert (result.state, "4.0 GiB free" in result.found, "checkpoint.keep_last=1" in result.fix) == ("warning", True, True)


def test_a_slow_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 << 30, 0, 100 << 30))
    monkeypatch.setattr(os, "fsync", lambda file: time.sleep(0.3))
    monkeypatch.setattr(machine, "_SECONDS", 0.5)
    result = machine.run_directory(DoctorConfig(run_dir=str(tmp_path)))
    assert (result.state, "slow for checkpoints" in result.found, "checkpoint.every" in result.fix) == ("warning", True, True)


def test_shared_memory_as_docker_gives_it(monkeypatch):
    if not machine.SHARED_MEMORY.is_dir():
        pytest.skip("there is no /dev/shm")
    result = in_child(machine.shared_memory, within=mounting(machine.SHARED_MEMORY, "64m"))
    assert (result.state, result.found) == ("warning", "64 MiB, too little for several GPUs")
    assert "--shm-size=8g" in result.fix
    result = in_child(machine.shared_memory, within=mounting(machine.SHARED_MEMORY, "2g"))
    assert (result.state, result.found) == ("ok", "2.0 GiB, 2.0 GiB free")


def test_no_shared_memory_and_a_full_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "shm")
    assert "mount -t tmpfs" in machine.shared_memory(DoctorConfig()).fix
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(8 << 30, 8 << 30, 10 << 20))
    result = machine.shared_memory(DoctorConfig())
    assert (result.state, result.found) == ("warning", "8.0 GiB, only 10 MiB of it free")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert machine.shared_memory(DoctorConfig()).state == "ok"


def test_few_open_files():
    low = "import resource; hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]; resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))"
    result = in_child(machine.open_files, before=low.format(hard="hard"))
    assert (result.state, result.fix.startswith("ulimit -n ")) == ("warning", True)
    assert result.found.startswith("256 (at most ")
    result = in_child(machine.open_files, before=low.format(hard="512"))
    assert (result.found, "limits.conf" in result.fix) == ("256 (at most 512)", True)
    result = in_child(machine.open_files, before=low.replace("256", "hard").format(hard="hard"))
    assert result.state == "ok"


def test_few_processes(tmp_path, monkeypatch):
    low = "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (500, resource.getrlimit(resource.RLIMIT_NPROC)[1]))"
    result = in_child(machine.process_limit, before=low)
    assert (result.state, result.found, result.fix) == ("warning", "500 processes and threads of this user", "ulimit -u 4096")
    (tmp_path / "pids.max").write_text("100\n")
    monkeypatch.setattr(machine, "TASK_LIMIT", tmp_path / "pids.max")
    monkeypatch.setattr(machine, "_LEAST_TASKS", 200)
    result = machine.process_limit(DoctorConfig())
    assert (result.state, result.found) == ("warning", "100 processes and threads in this container")
    (tmp_path / "pids.max").write_text("max\n")
    assert machine.process_limit(DoctorConfig()).state == "ok"
