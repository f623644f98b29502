"""Trainium's device as far as it can be tested without one: with torch_neuronx played by a module, and machines by their names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

from gpt.config import DeviceConfig, LaunchConfig
from gpt.errors import UserError
from gpt.runtime import device as devices
from gpt.runtime import environment, neuron
from gpt.runtime.cpu import Cpu
from gpt.runtime.device import Device, count_devices, find_decoding_device, find_device, widest_float
from gpt.runtime.environment import CACHE_VARIABLE, STRICT_VARIABLE
from gpt.runtime.neuron import CHIPS, Neuron, count_cores
from tests.doctor.doctor_standins import package

ROOT = Path(__file__).parents[2]
CORE = Neuron("a core", torch.bfloat16, CHIPS["trn2"].peak_flops, CHIPS["trn2"])
MINOR = ".".join(torch.__version__.split(".")[:2])
pytestmark = pytest.mark.skipif(Version(MINOR) < Version("2.13"), reason="TorchNeuron needs torch 2.13")


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named in tmp_path/product; packages may be put into tmp_path/site."""
    monkeypatch.setattr(environment, "_PRODUCT", tmp_path / "product")
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in (STRICT_VARIABLE, CACHE_VARIABLE, "NEURON_LOGICAL_NC_CONFIG", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "of the test")  # so that it is taken away again
        monkeypatch.delenv(name)


@pytest.fixture
def trainium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trn2 with the package of this torch, whose device torch has found."""
    (tmp_path / "product").write_text("trn2.48xlarge\n")
    package(tmp_path / "site", "torch_neuronx", version=f"{MINOR}.3")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: SimpleNamespace(type="neuron"))
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "neuron0").touch()
    monkeypatch.setattr("gpt.runtime.neuron._DEVICES", tmp_path / "dev")


# Finding it


@pytest.mark.usefixtures("trainium")
def test_without_the_drivers_files_there_is_none_and_nothing_is_touched(tmp_path, monkeypatch):
    (tmp_path / "dev" / "neuron0").unlink()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: pytest.fail("the device was touched"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: pytest.fail("the device was touched"))
    assert find_device(DeviceConfig()).type == "cpu"
    with pytest.raises(UserError, match="finds no core"):
        find_device(DeviceConfig("neuron"))


@pytest.mark.parametrize(
    ("machine", "precision", "logical", "peak", "gigabytes"),
    [
        ("trn2.48xlarge", "auto", "", 166.75e12, 24), ("trn2u.48xlarge", "auto", "2", 166.75e12, 24),
        ("trn3.48xlarge", "bf16", "", 167.75e12, 36),
        ("trn2.3xlarge", "fp32", "", None, 24), ("trn2.3xlarge", "auto", "1", 83.375e12, 12), ("trn9.48xlarge", "auto", "", None, None),
        ("", "auto", "", None, None),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("trainium")
def test_peak_and_memory_are_of_the_chip_or_unknown(machine, precision, logical, peak, gigabytes, tmp_path, monkeypatch):
    (tmp_path / "product").write_text(f"{machine}\n")
    if logical:
        monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", logical)
    found = find_device(DeviceConfig("neuron"), precision)
    assert isinstance(found, Neuron)
    assert found.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
    assert found.peak_flops == peak
    assert found.memory_limit() == (gigabytes and gigabytes << 30)
    assert found.chip_peak_flops() == peak
    assert found.description == f"Trainium ({machine or 'unknown machine'}), torch-neuronx {MINOR}.3"
    assert not found.simulated
    assert found.rehearsal() is None


@pytest.mark.usefixtures("trainium")
def test_auto_takes_it_and_cpu_does_not():
    assert find_device(DeviceConfig("auto")).type == "neuron"
    assert find_device(DeviceConfig("cpu")).type == "cpu"
    with pytest.raises(UserError, match=r"^device=cuda: there is none here.*; found: neuron\. device=auto takes what there is$"):
        find_device(DeviceConfig("cuda"))


@pytest.mark.usefixtures("trainium")
def test_what_is_in_its_way_is_said_when_it_is_found(tmp_path):
    (tmp_path / "product").write_text("trn1.2xlarge\n")
    with pytest.raises(UserError, match=r"^device=auto: this is trn1\.2xlarge, which only the XLA package runs on"):
        find_device(DeviceConfig("auto"))


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "torch-neuronx is not installed"),
        (f"{MINOR}.3", "torch-neuronx is installed, but finds no core: gpt doctor looks at the driver"),
    ],
)
def test_why_there_is_none_is_said(version, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    if version:
        package(tmp_path / "site", "torch_neuronx", version=version)
    with pytest.raises(UserError, match=rf"^device=neuron: there is none here \({re.escape(reason)}.*\); found: cpu\. device=auto"):
        find_device(DeviceConfig("neuron"))


# What the run asks of it


def test_it_is_compiled_whole_and_fixed_and_spared_what_it_lacks():
    assert CORE.compile_options() == {"backend": "neuron", "dynamic": False, "fullgraph": True}
    assert CORE.process_group == "cpu:gloo,neuron:neuron"
    assert not any((CORE.fused_adamw, CORE.pins_memory, CORE.says_when_full, CORE.compiles_ahead, CORE.decodes, CORE.is_host))
    assert CORE.fixed_graphs
    assert widest_float(SimpleNamespace(type="neuron")) == widest_float(torch.device("mps")) == torch.float32  # type: ignore[arg-type]
    assert widest_float(torch.device("cpu")) == widest_float(torch.device("cuda")) == torch.float64


def test_it_waits_two_hours_for_the_others_unless_told():
    assert LaunchConfig().patience(CORE.patience) == 2 * 3600
    assert LaunchConfig().patience(Cpu("CPU", torch.float32).patience) == 600
    assert LaunchConfig(timeout="3min").patience(CORE.patience) == 180


@pytest.mark.parametrize(
    ("before", "after"), [({}, "1"), ({"WORLD_SIZE": "4"}, "4"), ({"WORLD_SIZE": "64", "LOCAL_WORLD_SIZE": "16"}, "16")]
)
def test_cores_are_left_to_the_process_group(before, after, monkeypatch):
    """It assigns them when processes meet; who has touched the device before has another's."""
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: pytest.fail("the device was touched"))
    CORE.claim(3)
    assert os.environ["LOCAL_WORLD_SIZE"] == after


def test_memory_is_the_peak_that_the_package_counts(monkeypatch):
    stats = {"allocated_bytes.all.peak": 5 << 30, "allocated_bytes.all.current": 1 << 30}
    monkeypatch.setitem(sys.modules, "torch_neuronx", SimpleNamespace(memory_stats=lambda: stats))
    assert CORE.memory_bytes() == 5 << 30
    stats.clear()
    assert CORE.memory_bytes() is None


def test_what_ran_on_the_cpu_ends_a_strict_run_and_is_named_elsewhere(monkeypatch):
    fallbacks: list[str] = []
    monkeypatch.setitem(sys.modules, "torch_neuronx", SimpleNamespace(get_fallback_ops=lambda: fallbacks))
    monkeypatch.setenv(STRICT_VARIABLE, "1")
    assert CORE.after_first_step() is None
    fallbacks += ["aten::topk", "aten::sort"]
    said = "these operations have no kernel for the device and ran on the CPU, far slower: aten::sort, aten::topk"
    with pytest.raises(UserError, match=f"^{said}; device.strict=false lets them$"):
        CORE.after_first_step()
    monkeypatch.setenv(STRICT_VARIABLE, "0")
    assert CORE.after_first_step() == said


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            NotImplementedError("Could not run 'aten::sort.stable' with arguments"),
            "the device has no kernel for aten::sort.stable; device.st",
        ),
        (RuntimeError("[NCC_EMOD025] Dynamic shapes\n are not supported"), "a graph has a shape that is not fixed, which the compiler ref"),
        (RuntimeError("neuronx-cc: [F137] neuronx-cc was forcibly killed"), "the compiler was ended for want of memory on the host; try a"),
        (RuntimeError("[F137] out of memory on the host"), "the compiler was ended for want of memory on the host"),
        (RuntimeError("neuronx-cc returned -9"), "the compiler was ended for want of memory on the host; try a smaller train.micro_batch"),
        (RuntimeError("neuronx-cc failed with exit code -9"), "the compiler was ended for want of memory on the host"),
        (RuntimeError("aten::mm failed; CPU fallback disabled"), "an operation failed on the device, and device.strict=true does not let"),
        (
            RuntimeError("NCC_ILSM901: internal assertion"),
            "the device's compiler refused a graph; compile=false runs it operation",
        ),
        (
            RuntimeError("neuronx-cc failed with exit code 70"),
            "the device's compiler refused a graph; compile=false runs it operation",
        ),
    ],
    ids=lambda given: str(given)[:24],
)
def test_errors_of_the_compiler_are_put_into_words(error, told):
    said = CORE.explain(error)
    assert said is not None
    assert said.startswith(told)
    assert "\n" not in said


@pytest.mark.parametrize("error", [RuntimeError("aten::mm: mat1 and mat2 shapes cannot be multiplied"), NotImplementedError("not yet")])
def test_other_errors_are_left_alone(error):
    assert CORE.explain(error) is None


def test_other_devices_explain_nothing():
    assert Cpu("CPU", torch.float32).explain(RuntimeError("NCC_EMOD025")) is None


def test_what_torch_compile_says_around_an_error_is_left_out():
    outer = RuntimeError("backend='neuron' raised:\nNCC_EMOD025 deep within")
    outer.inner_exception = RuntimeError("NCC_ILSM901: internal\n  assertion\n  failed")  # type: ignore[attr-defined]
    said = CORE.explain(outer)
    assert said is not None
    assert said.endswith("far slower (NCC_ILSM901: internal)")


def test_dropout_is_doubted():
    assert CORE.prepare_training() == []
    (note,) = CORE.prepare_training(0.1)
    assert note.startswith("model.dropout=0.1: backward of attention with dropout was wrong")


def test_the_cache_is_the_packages_own_but_a_rehearsal_has_none(monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, "/graphs")
    assert CORE.compile_cache() == "/graphs"
    assert Neuron("played", torch.bfloat16, simulated=True).compile_cache() is None


# Making text


@pytest.mark.usefixtures("trainium")
def test_text_is_made_on_the_cpu_unless_the_device_was_asked_for():
    assert find_decoding_device(DeviceConfig("auto")).type == "cpu"
    assert find_decoding_device(DeviceConfig("auto"), "fp32").dtype == torch.float32
    with pytest.raises(UserError, match=r"^device=neuron: text gets longer at each step.*take device=cpu, or serve an export"):
        find_decoding_device(DeviceConfig("neuron"))


def test_text_is_made_where_it_can_be(monkeypatch):
    class Gpu(Device):
        type = "cuda"

    gpu = Gpu("GPU", torch.bfloat16)
    monkeypatch.setattr(devices, "find_device", lambda config, precision="auto": gpu)
    assert find_decoding_device(DeviceConfig("auto")) is gpu
    assert find_decoding_device(DeviceConfig("cuda")) is gpu


def test_the_command_refuses_a_rehearsal_of_text(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "gpt", "generate", f"model={tmp_path}", "device=neuron_sim"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("gpt: device=neuron_sim: text gets longer at each step")


# Counting cores


def plays_torch(site: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package(site, "torch", source)
    monkeypatch.setenv("PYTHONPATH", str(site))


def test_cores_are_counted_in_a_process_of_their_own(tmp_path, monkeypatch):
    seen = tmp_path / "seen.json"
    source = f"""
        import json, os
        json.dump({{"pid": os.getpid(), "strict": os.environ.get({STRICT_VARIABLE!r})}}, open({str(seen)!r}, "w"))
        print("2026-11-21 INFO: the runtime says hello")
        class accelerator:
            device_count = staticmethod(lambda: 64)
    """
    plays_torch(tmp_path / "path", source, monkeypatch)
    monkeypatch.setenv(STRICT_VARIABLE, "1")
    assert count_cores() == 64
    found = json.loads(seen.read_text())
    assert found["pid"] != os.getpid()
    assert found["strict"] == "1"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('nrt_init:\\nno device')", "RuntimeError: nrt_init: no device"),
        ("import os; os._exit(0)", "()"),
        ("import os; print('NRT:INFO bye', flush=True); os._exit(0)", "()"),
        ("import time; time.sleep(60)", "(torch has not answered in 0.3 s)"),
    ],
)
def test_cores_that_cannot_be_counted_are_a_sentence(source, said, tmp_path, monkeypatch):
    monkeypatch.setattr(neuron, "_COUNTING_SECONDS", 0.3 if "sleep" in source else 60)
    plays_torch(tmp_path / "path", source, monkeypatch)
    with pytest.raises(UserError, match=r"^device=neuron: its cores cannot be counted .*; give launch.nproc, or try gpt doctor$") as told:
        count_cores()
    assert said in str(told.value)


@pytest.mark.parametrize(("found", "name", "count"), [("neuron", "auto", 64), ("neuron", "neuron", 64), ("neuron", "cpu", None),
    ("cuda", "auto", 8), ("cuda", "cuda", 8), ("cuda", "neuron_sim", None), ("cpu", "auto", None), ("cpu", "cuda", None)])  # fmt: skip
def test_devices_are_counted_by_their_kind(found, name, count, monkeypatch):
    monkeypatch.setattr(devices, "_accelerator", lambda: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    monkeypatch.setattr(neuron, "count_cores", lambda: 64)
    assert count_devices(DeviceConfig(name)) == count
