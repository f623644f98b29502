"""AWS Trainium: the package, the driver, the cores and who holds them. Written after AWS's documentation; has not run on a Trainium.

TorchNeuron, the native backend, is torch-neuronx 2.13 and newer; what came before is the XLA package, which is out of support for training;
what PyPI has under the name is a placeholder that only says where the package is.
"""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt.commands import DoctorConfig
from gpt.doctor.result import Result, gib, one_line
from gpt.runtime.environment import OLDEST_NATIVE, instance_type, is_placeholder, minor, neuron_version, version_of

DEVICES = Path("/dev")  # where the driver puts neuron0, neuron1 ...
DRIVER = Path("/sys/module/neuron/version")
TOOLS = "/opt/aws/neuron/bin"  # not on everybody's PATH
_PYTHONS = ((3, 12), (3, 14))
ENVIRONMENTS = "/opt/aws_neuronx_venv_torch_neuronx_*"  # of AWS's machine image, one for each version
_INDEX = "https://pip.repos.neuron.amazonaws.com"
_XLA_ONLY = ("trn1", "inf")
_XLA_REASON = "has only the XLA package, which AWS no longer supports for training"


def package(config: DoctorConfig) -> Result:
    """Which torch-neuronx is installed, and whether torch, Python and the other packages go with it."""
    version = neuron_version()
    if version is None:
        if not _expected(config):
            return Result("ok", "n/a: not installed, and no Trainium here")
        python = _python_trouble()
        text = "; ".join(["torch-neuronx is not installed, and this is for Trainium", *(python[:1] if python else ())])
        return Result("problem", text, "\n".join([*(python[1:] if python else ()), _install()]))
    if is_placeholder():
        return Result("problem", f"{version} is the placeholder of PyPI, not the package", f"pip uninstall -y torch-neuronx\n{_install()}")
    if minor(version) < OLDEST_NATIVE:
        text = f"{version} is the old XLA package, out of support for training"
        return Result("problem", text, f"python -m venv .venv && source .venv/bin/activate\n{_install()}")
    troubles: list[tuple[str, str]] = []
    if python := _python_trouble():
        troubles.append(python)
    torch = version_of("torch") or "none"
    wanted = ".".join(map(str, minor(version)))
    if minor(torch) != minor(version):
        troubles.append((f"torch is {torch}, not {wanted}", f"pip install 'torch=={wanted}.*', or {_install(torch)}"))
    if importlib.util.find_spec("torch_xla") is not None:
        troubles.append(("torch_xla is here too, and the two exclude each other", "pip uninstall -y torch-xla libneuronxla"))
    if troubles:
        return Result("problem", "; ".join([f"native, {version}", *(t for t, _ in troubles)]), "\n".join(fix for _, fix in troubles))
    return Result("ok", f"native, {version}, with torch {torch}")


def cores(config: DoctorConfig) -> Result:
    """What the Neuron driver and neuron-ls say: devices, cores, memory, and the processes that hold them."""
    machine = instance_type()
    if machine.startswith(_XLA_ONLY):
        return Result("problem", f"this is {machine}, which {_XLA_REASON}", "take trn2 or trn3; here train with device=cpu")
    tool = shutil.which("neuron-ls") or shutil.which("neuron-ls", path=TOOLS)
    present = sorted(DEVICES.glob("neuron[0-9]*"))
    if tool is None:
        if present:
            return Result("warning", f"{_counted(present)}, but no neuron-ls to ask", "sudo apt-get install aws-neuronx-tools")
        if not _expected(config):
            return Result("ok", "n/a: no Trainium here")
        return Result("problem", "neither the driver's devices (/dev/neuron0) nor neuron-ls are here", _driver_fix())
    done = subprocess.run([tool, "--json-output"], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        said = one_line((done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1], 160)
        if not present and not _expected(config):
            return Result("ok", f"n/a: no Trainium here (neuron-ls: {said})")
        return Result("problem", f"neuron-ls fails: {said}", _driver_fix())
    try:
        devices: list[dict[str, Any]] = json.loads(done.stdout)
        assert isinstance(devices, list)
    except (ValueError, AssertionError):
        return Result("problem", f"neuron-ls is not understood: {one_line(done.stdout, 80)}", "sudo apt-get install aws-neuronx-tools")
    if not devices:
        return Result("problem", "neuron-ls lists no device", _driver_fix())
    return _listed(devices)


def _listed(devices: list[dict[str, Any]]) -> Result:
    machine = str(devices[0].get("instance_type", ""))
    if machine.startswith(_XLA_ONLY):
        return Result("problem", f"this is {machine}, which {_XLA_REASON}", "take trn2 or trn3; here train with device=cpu")
    number = sum(device["nc_count"] // device.get("logical_neuroncore_config", 1) for device in devices)
    memory = sum(device["memory_size"] for device in devices)
    parts = [f"{_counted(devices)}, {number} logical cores, {gib(memory)}"]
    parts += [machine] if machine else []
    parts += [f"driver {DRIVER.read_text().strip()}"] if DRIVER.is_file() else []
    visible = {name: os.environ[name] for name in ("NEURON_RT_VISIBLE_CORES", "NEURON_RT_NUM_CORES") if name in os.environ}
    parts += [f"{name}={value}" for name, value in visible.items()]
    holders = {p["pid"]: one_line(p.get("command", "?"), 40) for device in devices for p in device.get("neuron_processes") or ()}
    if holders:
        who = ", ".join(f"process {pid} ({command})" for pid, command in holders.items())
        fix = f"wait for it to end, or: kill {' '.join(map(str, holders))}; or keep to other cores with NEURON_RT_VISIBLE_CORES"
        return Result("warning", f"{', '.join(parts)}; held by {who}", fix)
    return Result("ok", ", ".join(parts))


def _counted(devices: Sequence[object]) -> str:
    return f"{len(devices)} device{'s' * (len(devices) != 1)}"


def _expected(config: DoctorConfig) -> bool:
    """Whether there should be a Trainium: it is asked for, or this machine has one and no other device is asked for."""
    if config.device not in ("auto", "neuron"):
        return False
    return config.device == "neuron" or any(DEVICES.glob("neuron[0-9]*")) or instance_type().startswith("trn")


def _python_trouble() -> tuple[str, str] | None:
    """That the package has no wheel for this Python, and the fix."""
    if _PYTHONS[0] <= sys.version_info[:2] <= _PYTHONS[1]:
        return None
    low, high = (".".join(map(str, numbers)) for numbers in _PYTHONS)
    python = ".".join(map(str, sys.version_info[:2]))
    return f"Python is {python}, not {low} to {high}", f"python{high} -m venv .venv, and install there"


def _install(torch: str | None = None) -> str:
    """How to come by the package: it is in AWS's machine image already, or is installed for the torch there is."""
    if ready := sorted(glob.glob(ENVIRONMENTS)):
        return f"source {Path(ready[-1], 'bin/activate')}"
    version = max(minor(torch or version_of("torch") or ""), OLDEST_NATIVE)
    return f"pip install 'torch-neuronx=={version[0]}.{version[1]}.*' 'neuronx-cc==2.*' nki --extra-index-url {_INDEX}"


def _driver_fix() -> str:
    return "sudo modprobe neuron; if there is no such module: sudo apt-get install aws-neuronx-dkms aws-neuronx-tools"
