"""What must stand in the environment before torch is imported, and what must not be installed. Imports no torch.

Trainium's backend is loaded by torch's own import, and reads its variables then ("PyTorch Native on Neuron", AWS Neuron documentation).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
from pathlib import Path

from gpt.config import DeviceConfig
from gpt.errors import UserError

CACHE_VARIABLE = "TORCH_NEURONX_NEFF_CACHE_DIR"
STRICT_VARIABLE = "TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION"  # of graphs that do not compile
# Of single operations: those that have a kernel, and fail, are an error. Those that have none are named after the first step.
_STRICT_EAGER_VARIABLE = "TORCH_NEURONX_FALLBACK_ONLY_FOR_UNIMPLEMENTED_OPS"
OLDEST_NATIVE = (2, 13)  # torch-neuronx before it is the XLA package
_AUTOLOAD_VARIABLE = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_PRODUCT = Path("/sys/devices/virtual/dmi/id/product_name")  # on EC2 the type of the instance


def prepare_environment(config: DeviceConfig, check: bool = True) -> None:
    """Set what the device reads when torch is imported. Call it before that, in each process.

    Args:
        config: the section `device`.
        check: whether the device is about to be used.

    Raises:
        UserError: it is Trainium's turn, and what is installed cannot train on it; the message says why.
    """
    if config.name == "neuron_sim":
        os.environ[_AUTOLOAD_VARIABLE] = "0"  # there is room for one device of that name
    elif config.name not in ("auto", "neuron") or (config.name == "auto" and neuron_version() is None):
        return
    elif check and (problem := neuron_obstacle()):
        raise UserError(f"device={config.name}: {problem}")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns in each process that it cannot time the device
    os.environ.setdefault(CACHE_VARIABLE, str(compile_cache(config)))
    for variable in (STRICT_VARIABLE, _STRICT_EAGER_VARIABLE):
        os.environ[variable] = "1" if config.strict else "0"


def compile_cache(config: DeviceConfig) -> Path:
    """The folder in which compiled graphs are kept between runs."""
    try:
        return Path(config.cache_dir).expanduser() / "neuron"
    except RuntimeError as error:
        raise UserError(f"device.cache_dir={config.cache_dir}: {error} Set it to a folder") from error


def neuron_version() -> str | None:
    """Of the package torch-neuronx, or None where there is none."""
    return version_of("torch-neuronx")


def neuron_obstacle() -> str | None:
    """Why nothing can be trained on Trainium with what this machine has; None if nothing is known to be in the way."""
    machine = instance_type()
    if machine.startswith(("trn1", "inf")):
        return f"this is {machine}, which only the XLA package runs on, and that is out of support for training; take trn2 or trn3"
    found = neuron_version()
    if found is None:
        return "torch-neuronx is not installed; docs/trainium.md says how"
    if minor(found) < OLDEST_NATIVE:
        kind = "PyPI's placeholder" if is_placeholder() else "the XLA package, which is out of support for training"
        return f"torch-neuronx {found} is {kind}; install 2.13 or newer (docs/trainium.md)"
    torch = version_of("torch") or "0.0"
    if minor(torch) != minor(found):
        want = ".".join(map(str, minor(found)))
        return f"torch-neuronx {found} does not go with torch {torch}; install torch {want}, or the torch-neuronx of this torch"
    if importlib.util.find_spec("torch_xla") is not None:
        return "torch_xla is installed beside the native torch-neuronx, and the two exclude each other; pip uninstall torch-xla"
    return None


def instance_type() -> str:
    """Of this EC2 instance, such as trn2.48xlarge; elsewhere whatever the machine is called, or nothing."""
    try:
        return _PRODUCT.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def is_placeholder() -> bool:
    """Whether what is installed as torch-neuronx is the page that PyPI has of that name, which says so in its description."""
    return "WRONG PACKAGE" in str(importlib.metadata.metadata("torch-neuronx"))


def version_of(package: str) -> str | None:
    """Of an installed package, without importing it; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def minor(version: str) -> tuple[int, int]:
    """The first two numbers of a version; (0, 0) where there are none."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def git_commit() -> str | None:
    """The commit this code runs from, with `+` if files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        describe = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
