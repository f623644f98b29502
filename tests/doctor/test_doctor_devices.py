"""torch, the processor and the accelerators: torches that do not import, limits in the environment, stand-in devices and drivers."""

from __future__ import annotations

import contextlib
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from doctor_standins import executable, in_child, package

from gpt.commands import DoctorConfig
from gpt.doctor import accelerators, devices
from gpt.doctor.result import Check
from gpt.doctor.runner import run_checks

GIB = 1 << 30


# torch


@pytest.mark.parametrize(
    ("source", "found", "fix"),
    [
        ("raise ImportError('libgomp.so.1: cannot\\nopen file')", "does not import: libgomp.so.1: cannot open file", "--force-reinstall"),
        ("import sympyy", "No module named 'sympyy'", "pip install sympyy"),
        ("__version__ = '2.10.0+cu128'", "2.10.0+cu128; 2.11 or newer is needed", "pip install 'torch>=2.11' --upgrade"),
        ("", "not PyTorch", "rename or remove it"),
    ],
)  # fmt: skip
def test_a_torch_that_is_no_good(source, found, fix, tmp_path):
    result = in_child(devices.torch_build, path=package(tmp_path, "torch", source))
    assert result.state == "problem"
    assert found in result.found
    assert fix in result.fix


def test_no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    result = devices.torch_build(DoctorConfig())
    assert (result.state, result.found, result.fix) == ("problem", "torch is not installed", "pip install 'torch>=2.11'")


def test_a_torch_that_leaves_a_gpu_unused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert devices.torch_build(DoctorConfig(device="cpu")).state == "ok"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    executable(tmp_path, "nvidia-smi", "echo 'GPU 0: NVIDIA L4 (UUID: GPU-1)'; echo 'GPU 1: NVIDIA L4 (UUID: GPU-2)'")
    assert devices.nvidia_gpus() == ["NVIDIA L4", "NVIDIA L4"]
    result = devices.torch_build(DoctorConfig())
    assert (result.state, "leaves NVIDIA L4 unused" in result.found) == ("warning", True)
    assert result.fix == f"pip install --force-reinstall 'torch=={torch.__version__.partition('+')[0]}'"
    assert devices.torch_build(DoctorConfig(device="cpu")).state == "ok"
    executable(tmp_path, "nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    assert devices.nvidia_gpus() == []


def test_what_torch_is_built_for(monkeypatch):
    for name in ("hip", "cuda", "xpu"):
        monkeypatch.setattr(torch.version, name, None)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
    assert devices.torch_build(DoctorConfig(device="cpu")).found == f"{torch.__version__}, built for the CPU"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert devices.torch_build(DoctorConfig()).found.endswith("built for CUDA 13.0")
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert devices.torch_build(DoctorConfig()).found.endswith("built for ROCm 7.1")


# The processor


def test_threads_that_do_not_suit_the_cores():
    cores = "from gpt.runtime import cpu; cpu.usable_cores = lambda: 4"
    few = in_child(devices.processor, before=cores, OMP_NUM_THREADS="1")
    assert (few.state, few.found.endswith("on 1 thread, since OMP_NUM_THREADS=1")) == ("warning", True)
    assert "unset OMP_NUM_THREADS" in few.fix
    many = in_child(devices.processor, before=f"{cores}; import torch; torch.get_num_threads = lambda: 9", OMP_NUM_THREADS="9")
    assert (many.state, many.fix) == ("warning", "export OMP_NUM_THREADS=4")
    right = in_child(devices.processor, before=cores.replace("4", "1"), OMP_NUM_THREADS="1")
    assert right.state == "ok" or "little memory" in right.found or "others compute" in right.found
    assert " GFLOP/s in bf16" in right.found


@pytest.fixture
def no_measurement(monkeypatch):
    """As many threads as cores, nothing else at work, and a rate at once."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.1, 0.1))
    monkeypatch.setattr("gpt.runtime.peak.measured_peak_flops", lambda dtype: 1e12)
    monkeypatch.setattr("gpt.runtime.cpu.usable_cores", torch.get_num_threads)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))


def test_a_processor_that_others_use(no_measurement, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 5.0, 5.0))
    result = devices.processor(DoctorConfig())
    assert (result.state, "others compute here too (load 1000.0)" in result.found) == ("warning", True)
    assert "1000 GFLOP/s in bf16, 1000 in fp32" in result.found


def test_little_memory_in_a_container(no_measurement, tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:       67108864 kB\nMemFree:  1 kB\nMemAvailable:   33554432 kB\n")
    monkeypatch.setattr(devices, "MEMORY_INFO", tmp_path / "meminfo")
    monkeypatch.setattr(devices, "MEMORY_LIMIT", tmp_path / "memory.max")
    assert "32 GiB of 64 GiB memory free" in devices.processor(DoctorConfig()).found
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    result = devices.processor(DoctorConfig())
    assert (result.state, "1.0 GiB of 4.0 GiB memory free" in result.found) == ("warning", True)
    (tmp_path / "memory.max").write_text("max\n")
    assert devices.processor(DoctorConfig()).state == "ok"


def test_bf16_instructions(monkeypatch):
    for name in devices._LIMITING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert devices.bf16_instructions(DoctorConfig()).found == "AVX512-BF16: yes, AMX: no"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    limited = devices.bf16_instructions(DoctorConfig())
    assert (limited.state, limited.fix) == ("warning", "unset ONEDNN_MAX_CPU_ISA")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "no oneDNN" in devices.bf16_instructions(DoctorConfig()).found
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    result = devices.bf16_instructions(DoctorConfig())
    assert (result.state, result.fix) == ("warning", "leave precision=auto, which takes fp32 on this processor")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert devices.bf16_instructions(DoctorConfig()).state == "ok", "the accelerator computes"


# Accelerators


@pytest.fixture
def two_devices(monkeypatch):
    """The CPU as two accelerators of 8 GiB each; what a test may change of them."""
    devices = SimpleNamespace(free=[7 * GIB, 7 * GIB], names=["Chip A", "Chip A"])
    offered = {
        "current_accelerator": lambda check_available=False: torch.device("cpu"),
        "device_count": lambda: 2,
        "device_index": lambda index: contextlib.nullcontext(),
        "get_memory_info": lambda index: (devices.free[index], 8 * GIB),
        "synchronize": lambda: None,
    }
    for name, function in offered.items():
        monkeypatch.setattr(torch.accelerator, name, function)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: SimpleNamespace(get_device_name=lambda index: devices.names[index]))
    monkeypatch.setattr(accelerators, "_SIZE", 64)
    return devices


def at_rates(monkeypatch, *rates):
    left = iter(rates)
    monkeypatch.setattr(accelerators, "_matrix_rate", lambda kind: next(left))


def test_accelerators_are_named_and_measured(two_devices, monkeypatch):
    assert accelerators._matrix_rate("cpu") > 0
    at_rates(monkeypatch, 600e12, 612e12)
    result = accelerators.accelerators(DoctorConfig())
    assert (result.state, result.found) == ("ok", "2 x Chip A (cpu), 8.0 GiB each, 600 to 612 TFLOP/s in bf16")
    two_devices.names[1] = "Chip B"
    at_rates(monkeypatch, 600e12, 612e12)
    assert accelerators.accelerators(DoctorConfig()).found.endswith("not all alike, also Chip B")


def test_an_accelerator_that_others_hold(two_devices, monkeypatch):
    two_devices.free[1] = 1 * GIB
    at_rates(monkeypatch, 6e14, 6e14)
    result = accelerators.accelerators(DoctorConfig())
    assert (result.state, result.found.endswith("less than half of the memory is free on number 1")) == ("warning", True)


def test_an_accelerator_that_is_slower_than_the_others(two_devices, monkeypatch):
    at_rates(monkeypatch, 6e14, 3e14)
    result = accelerators.accelerators(DoctorConfig())
    assert (result.state, result.found.endswith("number 1 is slow, and all wait for it")) == ("warning", True)


def test_an_accelerator_that_computes_nonsense(two_devices, monkeypatch):
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape: randn(*shape) * 1e38)
    with pytest.raises(AssertionError, match="the device is faulty"):
        accelerators.accelerators(DoctorConfig())


def test_an_accelerator_that_is_not_used_is_not_touched(two_devices, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", None)
    assert accelerators.accelerators(DoctorConfig(device="cpu")).found == "n/a: device=cpu needs none"
    assert accelerators.flash_attention(DoctorConfig(device="cpu")).found.startswith("n/a")


def test_another_accelerator_than_the_one_asked_for(two_devices):
    result = accelerators.accelerators(DoctorConfig(device="mps"))
    assert (result.state, result.found, result.fix) == (
        "problem",
        "device=mps is not here; torch finds cpu",
        "device=auto takes what there is",
    )


def nothing_available(monkeypatch, built: str | None) -> None:
    kind = torch.device(built) if built else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None if check_available else kind)


def test_no_accelerator_is_no_problem_unless_one_is_asked_for(monkeypatch):
    nothing_available(monkeypatch, None)
    assert accelerators.accelerators(DoctorConfig()).found == "none; the CPU computes"
    assert accelerators.accelerators(DoctorConfig(device="cpu")).state == "ok"
    result = accelerators.accelerators(DoctorConfig(device="cuda"))
    assert (result.state, result.found) == ("problem", "device=cuda is not here: this torch was built without it")
    assert result.fix.startswith("pip install --force-reinstall 'torch==")
    assert accelerators.accelerators(DoctorConfig(device="neuron")).fix.startswith("see torch-neuronx and Neuron cores")


def test_a_driver_that_torch_cannot_use(tmp_path, monkeypatch):
    if torch.backends.cuda.is_built():
        pytest.skip("this torch is built for CUDA; the test needs one that cannot use it")
    nothing_available(monkeypatch, "cuda")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    executable(tmp_path, "nvidia-smi", "echo 'GPU 0: NVIDIA L4 (UUID: GPU-1)'")
    result = accelerators.accelerators(DoctorConfig())
    assert result.state == "problem"
    assert result.found == "NVIDIA L4 is there, but torch cannot use it: Torch not compiled with CUDA enabled"  # torch's own words
    assert "update its driver" in result.fix
    assert accelerators.accelerators(DoctorConfig(device="cpu")).state == "ok"


def test_flash_attention(two_devices, monkeypatch):
    cuda = torch.backends.cuda
    monkeypatch.setattr(cuda, "is_built", lambda: False)
    assert accelerators.flash_attention(DoctorConfig()).found.startswith("n/a")
    monkeypatch.setattr(cuda, "is_built", lambda: True)
    monkeypatch.setattr(cuda, "is_flash_attention_available", lambda: True)
    assert accelerators.flash_attention(DoctorConfig()).state == "ok"  # the CPU has the kernel as well
    monkeypatch.setattr(cuda, "flash_sdp_enabled", lambda: False)
    assert "switched off" in accelerators.flash_attention(DoctorConfig()).found
    monkeypatch.setattr(cuda, "is_flash_attention_available", lambda: False)
    result = accelerators.flash_attention(DoctorConfig())
    assert (result.state, result.found.startswith("not in this torch")) == ("warning", True)


def test_flash_attention_that_the_chip_lacks(two_devices, monkeypatch):
    def refuses(*args: object, **settings: object) -> None:
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuses)
    result = accelerators.flash_attention(DoctorConfig())
    assert (result.state, result.found) == ("warning", "does not run on this device: No available kernel. Aborting execution.")


def test_a_torch_whose_import_ends_the_process_does_not_end_the_doctor(tmp_path, monkeypatch):
    package(tmp_path, "torch", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    monkeypatch.syspath_prepend(tmp_path)
    checks = [Check("torch", devices.torch_build, if_stuck="another build"), Check("processor", devices.processor, needs="torch")]
    torch_row, processor_row = run_checks(checks, DoctorConfig())
    assert torch_row.result.found.startswith("the check's process was ended by SIGILL")
    assert processor_row.result.found == "not checked, for want of torch"
