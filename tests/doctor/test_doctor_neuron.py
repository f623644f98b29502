"""Trainium: stand-ins for the package's metadata, for torch_xla, for neuron-ls and for the machine's name."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from doctor_standins import executable, package

from gpt.commands import DoctorConfig
from gpt.doctor import neuron
from gpt.runtime import environment

NEURON = DoctorConfig(device="neuron")
MINOR = torch.__version__.rpartition(".")[0]
# What neuron-ls --json-output prints on a trn2.3xlarge.
CHIP = {
    "neuron_device": 0, "bdf": "0000:00:1e.0", "connected_to": None, "nc_count": 8, "logical_neuroncore_config": 2,
    "memory_size": 96 << 30, "neuroncore_ids": [0, 1, 2, 3], "neuron_processes": [], "instance_type": "trn2.3xlarge",
}  # fmt: skip


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a device nor a tool, nor a name; packages and tools may be put into tmp_path/site and tmp_path/bin."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "product").write_text("Standard PC\n")
    monkeypatch.setattr(neuron, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(neuron, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(neuron, "TOOLS", str(tmp_path / "opt"))
    monkeypatch.setattr(neuron, "ENVIRONMENTS", str(tmp_path / "venv_*"))
    monkeypatch.setattr(environment, "_PRODUCT", tmp_path / "product")
    monkeypatch.setattr(sys, "version_info", (3, 12, 3, "final", 0))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for name in ("NEURON_RT_VISIBLE_CORES", "NEURON_RT_NUM_CORES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "site")


def installed(tmp_path: Path, version: str, name: str = "torch_neuronx", metadata: str = "") -> None:
    package(tmp_path / "site", name, version=version, metadata=metadata)


# The package


def test_without_a_trainium_nothing_is_missing():
    assert neuron.package(DoctorConfig()).found == "n/a: not installed, and no Trainium here"
    assert neuron.cores(DoctorConfig()).found == "n/a: no Trainium here"


@pytest.mark.parametrize("sign", ["asked", "device", "machine"])
def test_a_package_that_is_missed(sign, tmp_path):
    if sign == "device":
        (tmp_path / "dev" / "neuron0").touch()
    if sign == "machine":
        (tmp_path / "product").write_text("trn2.48xlarge\n")
    result = neuron.package(NEURON if sign == "asked" else DoctorConfig())
    assert (result.state, result.found) == ("problem", "torch-neuronx is not installed, and this is for Trainium")
    assert result.fix.startswith("pip install 'torch-neuronx==2.")
    assert neuron._INDEX in result.fix
    for version in ("2_13", "2_14"):
        (tmp_path / f"venv_{version}").mkdir()
    assert neuron.package(NEURON).fix == f"source {tmp_path / 'venv_2_14'}/bin/activate"


def test_the_native_package(tmp_path):
    installed(tmp_path, f"{MINOR}.3")
    result = neuron.package(NEURON)
    assert (result.state, result.found) == ("ok", f"native, {MINOR}.3, with torch {environment.version_of('torch')}")


def test_the_placeholder_of_pypi(tmp_path):
    installed(tmp_path, "1.0", metadata="\nWRONG PACKAGE. Please install the package from Neuron Repository\n")
    result = neuron.package(DoctorConfig())
    assert (result.state, result.found) == ("problem", "1.0 is the placeholder of PyPI, not the package")
    assert result.fix.startswith("pip uninstall -y torch-neuronx\npip install ")


def test_the_old_package(tmp_path):
    installed(tmp_path, "2.9.0.2.13.0")
    result = neuron.package(DoctorConfig())
    assert (result.state, result.found) == ("problem", "2.9.0.2.13.0 is the old XLA package, out of support for training")


def test_all_that_is_wrong_with_it_is_said_at_once(tmp_path, monkeypatch):
    installed(tmp_path, "2.99.1")
    package(tmp_path / "site", "torch_xla")
    monkeypatch.setattr(sys, "version_info", (3, 11, 7, "final", 0))
    result = neuron.package(DoctorConfig())
    assert result.state == "problem"
    for said in (f"torch is {environment.version_of('torch')}, not 2.99", "torch_xla is here too", "Python is 3.11, not 3.12 to 3.14"):
        assert said in result.found
    for said in ("pip install 'torch==2.99.*', or pip install 'torch-neuronx==2.", "pip uninstall -y torch-xla", "python3.14 -m venv"):
        assert said in result.fix


def test_torch_xla_alone_spoils_it(tmp_path):
    installed(tmp_path, f"{MINOR}.3")
    package(tmp_path / "site", "torch_xla")
    result = neuron.package(DoctorConfig())
    assert (result.state, result.fix) == ("problem", "pip uninstall -y torch-xla libneuronxla")


# Driver and cores


def says(tmp_path: Path, *chips: dict[str, object]) -> None:
    (tmp_path / "said.json").write_text(json.dumps(chips))
    executable(tmp_path / "bin", "neuron-ls", f'[ "$1" = --json-output ] && cat {tmp_path / "said.json"}')


def test_cores_are_counted(tmp_path, monkeypatch):
    says(tmp_path, CHIP, {**CHIP, "neuron_device": 1})
    (tmp_path / "version").write_text("2.24.7\n")
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "0-3")
    result = neuron.cores(DoctorConfig())
    found = "2 devices, 8 logical cores, 192 GiB, trn2.3xlarge, driver 2.24.7, NEURON_RT_VISIBLE_CORES=0-3"
    assert (result.state, result.found) == ("ok", found)


def test_the_tool_is_found_where_aws_puts_it(tmp_path):
    says(tmp_path, CHIP)
    (tmp_path / "bin").rename(tmp_path / "opt")
    assert neuron.cores(DoctorConfig()).found.startswith("1 device, 4 logical cores")


def test_who_holds_them(tmp_path):
    holder = {"pid": 4711, "command": "python train.py --size 124M --with-many-more-arguments", "neuroncore_ids": [0]}
    says(tmp_path, {**CHIP, "neuron_processes": [holder]}, {**CHIP, "neuron_processes": [holder, {"pid": 12, "command": "python x.py"}]})
    result = neuron.cores(DoctorConfig())
    assert result.state == "warning"
    assert "held by process 4711 (python train.py --size 124M --with-ma...), process 12 (python x.py)" in result.found
    assert "kill 4711 12" in result.fix


@pytest.mark.parametrize("machine", ["trn1.32xlarge", "inf2.xlarge"])
def test_trn1_is_told_why(machine, tmp_path):
    says(tmp_path, {**CHIP, "instance_type": machine})
    said = neuron.cores(DoctorConfig())
    assert (said.state, said.fix) == ("problem", "take trn2 or trn3; here train with device=cpu")
    assert said.found == f"this is {machine}, which has only the XLA package, which AWS no longer supports for training"
    (tmp_path / "product").write_text(f"{machine}\n")
    (tmp_path / "bin" / "neuron-ls").unlink()
    assert neuron.cores(DoctorConfig()) == said


def test_a_driver_that_is_not_loaded(tmp_path):
    script = "echo 'neuron-ls: No neuron device found' >&2; exit 1"
    executable(tmp_path / "bin", "neuron-ls", script)
    assert neuron.cores(DoctorConfig()).state == "ok", "a tool alone makes no Trainium"
    result = neuron.cores(NEURON)
    assert (result.state, result.found) == ("problem", "neuron-ls fails: neuron-ls: No neuron device found")
    assert result.fix.startswith("sudo modprobe neuron")
    (tmp_path / "dev" / "neuron0").touch()
    assert neuron.cores(DoctorConfig()).state == "problem"
    says(tmp_path)
    assert neuron.cores(DoctorConfig()).found == "neuron-ls lists no device"


def test_no_tool_and_no_device(tmp_path):
    assert neuron.cores(NEURON).found.startswith("neither the driver's devices")
    (tmp_path / "dev" / "neuron0").touch()
    result = neuron.cores(NEURON)
    assert (result.state, result.found, result.fix) == (
        "warning", "1 device, but no neuron-ls to ask", "sudo apt-get install aws-neuronx-tools",
    )  # fmt: skip


def test_a_tool_that_speaks_otherwise(tmp_path):
    executable(tmp_path / "bin", "neuron-ls", "echo 'instance-type: trn2.3xlarge'")
    result = neuron.cores(DoctorConfig())
    assert (result.state, result.found) == ("problem", "neuron-ls is not understood: instance-type: trn2.3xlarge")


@pytest.mark.parametrize("device", ["cpu", "neuron_sim"])
def test_who_asks_for_another_device_needs_no_trainium(device, tmp_path):
    """So an image for Trainium can be built, and tried, on a Trainium machine, whose devices a build does not see."""
    (tmp_path / "product").write_text("trn2.48xlarge\n")
    executable(tmp_path / "bin", "neuron-ls", "echo 'neuron-ls: No neuron device found' >&2; exit 1")
    assert neuron.cores(DoctorConfig()).state == "problem"
    for check in (neuron.cores, neuron.package):
        assert check(DoctorConfig(device=device)).state == "ok"
