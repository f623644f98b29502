"""What stands in the environment when torch is imported, and which machines are refused before it is.

Each case is a process of its own: packages are what their metadata says, torch is a file that prints what it finds and ends the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gpt.cli import main
from gpt.compose import compose_run
from gpt.config import DeviceConfig
from gpt.errors import UserError
from gpt.runtime import environment
from gpt.runtime.environment import _STRICT_EAGER_VARIABLE as STRICT_EAGER_VARIABLE
from gpt.runtime.environment import CACHE_VARIABLE, STRICT_VARIABLE, compile_cache, prepare_environment
from tests.doctor.doctor_standins import package
from tests.training.finetuning import SUMS, save_small_model, write_rows

ROOT = Path(__file__).parents[2]
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
OURS = (CACHE_VARIABLE, STRICT_VARIABLE, STRICT_EAGER_VARIABLE, AUTOLOAD, "TORCH_CPP_LOG_LEVEL")
TORCH = f"""
import json, os, sys
print("at torch's import:", json.dumps({{name: os.environ.get(name) for name in {OURS!r}}}), flush=True)
os._exit(0)
"""
ON_MACHINE = """
import sys
from pathlib import Path
from gpt.config import DeviceConfig
from gpt.errors import exit_code_of
from gpt.runtime import environment
environment._PRODUCT = Path(sys.argv[1])
def start():
    environment.prepare_environment(DeviceConfig("neuron"))
    import torch
sys.exit(exit_code_of(start))
"""
WRONG = "\nWRONG PACKAGE. Please install the package from Neuron Repository\n"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder that comes first on the import path, with a torch 2.14 that ends the process."""
    return package(tmp_path / "site", "torch", TORCH, "2.14.0+cpu")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Python with that folder, without anything of this process's own environment that a test could mistake for the child's."""

    def start(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        ours = {k: v for k, v in os.environ.items() if k not in OURS and not k.startswith(("PYTEST", "RANK", "WORLD_SIZE", "MASTER"))}
        ours |= {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}", "HOME": str(tmp_path), **variables}
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, env=ours, cwd=tmp_path, check=False)

    return start


def found_by_torch(done: subprocess.CompletedProcess[str]) -> dict[str, str | None]:
    """The variables that torch was imported with."""
    said = [line for line in done.stdout.splitlines() if line.startswith("at torch's import: ")]
    assert len(said) == 1, done.stdout + done.stderr
    return json.loads(said[0].partition(": ")[2])


# Variables


@pytest.mark.parametrize("command", ["pretrain", "finetune", "parity", "precompile", "generate", "evaluate", "worker", "file"])
def test_they_are_set_before_torch_is_imported(command, tmp_path, site, run):
    package(site, "torch_neuronx", version="2.14.3")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("text")
    config = compose_run("pretrain", ["run.id=r"]).to_dict()
    config["device"] |= {"name": "neuron", "cache_dir": str(tmp_path / "graphs")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    device, cache = ["device=neuron"], "graphs/neuron"
    match command:
        case "worker" | "file":
            worker = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"} if command == "worker" else {}
            done = run("-m", "gpt.launch", "config.yaml", **worker)
        case "generate" | "evaluate":
            text = ["data=text", "data.paths=[text.txt]"] if command == "evaluate" else []
            done = run("-m", "gpt", command, "model=model", *device, *text)
            cache = ".cache/gpt/neuron"  # they have no key for it
        case _:
            start = ["init=model"] if command in ("finetune", "parity") else []
            done = run("-m", "gpt", command, *start, *device, f"device.cache_dir={tmp_path / 'graphs'}")
    assert found_by_torch(done) == {
        CACHE_VARIABLE: str(tmp_path / cache), STRICT_VARIABLE: "1", STRICT_EAGER_VARIABLE: "1", AUTOLOAD: None,
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }  # fmt: skip


def test_what_people_set_themselves_stays_but_for_what_the_config_says(site, run):
    package(site, "torch_neuronx", version="2.14.3")
    own = {CACHE_VARIABLE: "/mine", "TORCH_CPP_LOG_LEVEL": "INFO", STRICT_VARIABLE: "1"}
    found = found_by_torch(run("-m", "gpt", "pretrain", "device=neuron", "device.strict=false", **own))
    assert found == {**own, AUTOLOAD: None, STRICT_VARIABLE: "0", STRICT_EAGER_VARIABLE: "0"}


def test_a_rehearsal_keeps_the_real_backend_out(site, run):
    package(site, "torch_neuronx", version="2.9.0")  # which is no obstacle to it
    found = found_by_torch(run("-m", "gpt", "pretrain", "device=neuron_sim"))
    assert (found[AUTOLOAD], found[STRICT_VARIABLE]) == ("0", "1")


@pytest.mark.parametrize(("device", "is_installed", "is_set"), [("auto", True, True), ("auto", False, False), ("cpu", True, False)])
def test_they_are_set_where_trainium_may_be_used(device, is_installed, is_set, site, run):
    if is_installed:
        package(site, "torch_neuronx", version="2.14.3")
    found = found_by_torch(run("-m", "gpt", "pretrain", f"device={device}"))
    assert (any(found.values()), found[STRICT_VARIABLE] == "1") == (is_set, is_set)


def test_a_cache_without_a_home_is_refused_by_its_key():
    assert compile_cache(DeviceConfig(cache_dir="/somewhere")) == Path("/somewhere/neuron")
    with pytest.raises(UserError, match=r"^device.cache_dir=~nobody-of-that-name/x: .*Set it to a folder"):
        compile_cache(DeviceConfig(cache_dir="~nobody-of-that-name/x"))


# What is installed, and where


@pytest.mark.parametrize(
    ("torch", "neuronx", "beside", "machine", "problem"),
    [
        ("2.14.0+cpu", "2.14.3", "", "trn2.48xlarge", None),
        ("2.13.1", "2.13.3.1.0", "", "trn3.48xlarge", None),
        ("2.14.0", "2.14.3", "", "Standard PC (Q35 + ICH9, 2009)", None),
        ("2.14.0", None, "", "trn2.48xlarge", "torch-neuronx is not installed; docs/trainium.md says how"),
        (
            "2.9.1",
            "2.9.0.2.13.0",
            "",
            "trn2.48xlarge",
            "torch-neuronx 2.9.0.2.13.0 is the XLA package, which is out of support for training",
        ),
        ("2.14.0", "1.0", "", "", "torch-neuronx 1.0 is PyPI's placeholder; install 2.13 or newer"),
        ("2.13.0+cpu", "2.14.3", "", "trn2.3xlarge", "torch-neuronx 2.14.3 does not go with torch 2.13.0+cpu; install torch 2.14, or"),
        ("2.14.0", "2.13.3", "", "trn2.3xlarge", "torch-neuronx 2.13.3 does not go with torch 2.14.0; install torch 2.13, or"),
        ("2.14.0", "2.14.3", "torch_xla", "trn2.3xlarge", "torch_xla is installed beside the native torch-neuronx"),
        ("2.14.0", "2.14.3", "", "trn1.32xlarge", "this is trn1.32xlarge, which only the XLA package runs on, and that is out of support"),
        ("2.14.0", "2.14.3", "", "trn1n.32xlarge", "this is trn1n.32xlarge"),
        ("2.14.0", "2.14.3", "", "inf2.xlarge", "this is inf2.xlarge"),
    ],
)
def test_only_the_native_package_of_this_torch_on_trn2_and_trn3_goes_on(torch, neuronx, beside, machine, problem, tmp_path, run):
    package(tmp_path / "site", "torch", TORCH, torch)
    (tmp_path / "product").write_text(f"{machine}\n")
    if neuronx is not None:
        package(tmp_path / "site", "torch_neuronx", version=neuronx, metadata=WRONG if neuronx == "1.0" else "")
    if beside:
        package(tmp_path / "site", beside)
    done = run("-c", ON_MACHINE, str(tmp_path / "product"))
    if problem is None:
        assert found_by_torch(done)[STRICT_VARIABLE] == "1"
    else:
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith(f"gpt: device=neuron: {problem}")
        assert done.stderr.count("\n") == 1


def test_auto_refuses_what_it_would_have_used(site, run):
    """A CPU that was not asked for, and takes forever, is no favour; device=cpu takes it."""
    package(site, "torch_neuronx", version="2.9.0.2.13.0")
    done = run("-m", "gpt", "pretrain")
    assert done.returncode == 2
    assert done.stderr.startswith("gpt: device=auto: torch-neuronx 2.9.0.2.13.0 is the XLA package")


def test_weights_are_read_before_the_device_is_missed(tmp_path, monkeypatch, capsys):
    """The shape of `init` needs torch, no device; what is wrong with the device is said, once all else is right."""
    monkeypatch.setattr(environment, "neuron_version", lambda: None)
    for name in OURS:
        monkeypatch.setenv(name, "kept")
        monkeypatch.delenv(name)
    rows = write_rows(tmp_path / "rows.jsonl", SUMS)
    fine_tuning = [f"init={save_small_model(tmp_path / 'model')}", "data=jsonl", f"data.paths=[{rows}]", f"run.dir={tmp_path / 'runs'}"]
    assert compose_run("finetune", [*fine_tuning, "device=neuron"]).device.name == "neuron"
    assert main(["finetune", *fine_tuning, "device=neuron"]) == 2
    assert capsys.readouterr().err.startswith("gpt: device=neuron: torch-neuronx is not installed")
    assert not (tmp_path / "runs").exists()


def test_the_machine_is_asked_for_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_PRODUCT", tmp_path / "product")
    assert environment.instance_type() == ""
    (tmp_path / "product").write_text("trn2.3xlarge\n")
    assert environment.instance_type() == "trn2.3xlarge"


def test_another_device_leaves_the_environment_alone(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(environment, "neuron_version", lambda: "2.9")
    before = dict(os.environ)
    for name in ("cpu", "cuda", "mps"):
        prepare_environment(DeviceConfig(name))
    assert os.environ == before
