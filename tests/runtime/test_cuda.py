"""CUDA's policy, with torch.cuda's answers played; runs on a real GPU are in test_cuda_runs.py."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from gpt.config import DeviceConfig
from gpt.errors import UserError
from gpt.model.kernels import kernels_of
from gpt.model.loss import chunk_size
from gpt.runtime.compiling import should_compile
from gpt.runtime.cuda import PEAK_TFLOPS, Cuda
from gpt.runtime.device import find_device
from gpt.runtime.mps import Mps

GPU = Cuda("GPU", torch.bfloat16)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with a GPU of that name."""
    before = torch.get_float32_matmul_precision()

    def plays(name: str, has_bf16: bool = True) -> None:
        def is_bf16_supported(including_emulation: bool = True) -> bool:
            return has_bf16 or including_emulation  # as torch says it of every GPU

        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: SimpleNamespace(type="cuda"))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(total_memory=80 << 30))

    yield plays
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("precision", "has_bf16", "dtype", "of_fp32"),
    [
        ("auto", True, torch.bfloat16, "high"), ("bf16", True, torch.bfloat16, "high"), ("fp32", True, torch.float32, "highest"),
        ("auto", False, torch.float32, "high"), ("bf16", False, torch.bfloat16, "high"), ("fp32", False, torch.float32, "highest"),
    ],
)  # fmt: skip
def test_fp32_is_fp32_only_where_it_was_asked_for(precision, has_bf16, dtype, of_fp32, gpu):
    gpu("NVIDIA A100-SXM4-80GB", has_bf16)
    torch.set_float32_matmul_precision("medium")
    assert find_device(DeviceConfig("cuda"), precision).dtype == dtype
    assert torch.get_float32_matmul_precision() == of_fp32


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A10G", 70), ("NVIDIA A40", 149.7), ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250), ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_longest_name(name, tflops, gpu):
    gpu(name)
    found = find_device(DeviceConfig("auto"))
    assert found.peak_flops == pytest.approx(tflops * 1e12)
    assert found.measured_peak() == found.chip_peak_flops() == found.peak_flops
    assert found.description == name
    assert find_device(DeviceConfig("auto"), "fp32").peak_flops is None, "the table is of bf16"


@pytest.mark.parametrize(
    "name",
    [
        "Tesla V100-SXM2-16GB", "NVIDIA A10", "NVIDIA L40", "NVIDIA RTX A4000", "NVIDIA RTX A3000 Laptop GPU", "NVIDIA GB200", "NVIDIA H20",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 D",
    ],
)  # fmt: skip
def test_a_chip_with_another_name_or_a_slice_of_one_has_no_peak(name, gpu):
    gpu(name)
    assert find_device(DeviceConfig("cuda")).peak_flops is None


def test_no_name_of_a_chip_is_shadowed_by_a_shorter_one(gpu):
    for chip, tflops in PEAK_TFLOPS.items():
        gpu(f"NVIDIA {chip}")
        assert find_device(DeviceConfig("cuda")).peak_flops == pytest.approx(tflops * 1e12), chip


def test_memory_is_the_gpus_own(gpu, monkeypatch):
    gpu("NVIDIA L4")
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda: 3 << 30)
    found = find_device(DeviceConfig("cuda"))
    assert (found.memory_limit(), found.memory_bytes()) == (80 << 30, 3 << 30)


def test_without_triton_it_runs_eager_and_says_why(monkeypatch):
    has, find_spec = True, importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: (has or None) if name == "triton" else find_spec(name))
    assert GPU.compile_obstacle() is None
    assert should_compile("auto", GPU) == (True, "compiled block by block")
    has = False
    said = "not compiled: Triton, which makes the kernels of a GPU, is not installed, so the run is slower"
    assert should_compile("auto", GPU) == should_compile(True, GPU) == (False, said)


def test_what_the_run_asks_of_it():
    assert GPU.process_group == "nccl"
    assert all((GPU.pins_memory, GPU.fused_adamw, GPU.times_itself, GPU.says_when_full, GPU.compiles_ahead, GPU.decodes))
    assert not any((GPU.is_host, GPU.fixed_graphs))
    assert GPU.compile_options() == {"dynamic": False}
    assert GPU.after_first_step() is GPU.rehearsal() is GPU.explain(RuntimeError("NCC_EMOD025")) is None


def test_each_process_takes_the_device_of_its_number(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", taken.append)
    GPU.claim(3)
    assert taken == [3]


def test_another_device_than_the_one_that_is_there_is_refused(gpu):
    gpu("NVIDIA L4")
    with pytest.raises(UserError, match=r"^device=mps: there is none here; found: cuda\. device=auto takes what there is$"):
        find_device(DeviceConfig("mps"))
    assert find_device(DeviceConfig("cpu")).type == "cpu"


def test_a_torch_without_cuda_is_named(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    for built, reason in ((False, " (this torch was built without CUDA)"), (True, "")):
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda built=built: built)
        with pytest.raises(UserError, match=rf"^device=cuda: there is none here{re.escape(reason)}; found: cpu\. device=auto"):
            find_device(DeviceConfig("cuda"))


# Other accelerators


def test_an_accelerator_without_code_here_is_refused(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: SimpleNamespace(type="xpu"))
    with pytest.raises(UserError, match=r"^device=auto: torch offers xpu, for which there is no code here; use device=cpu$"):
        find_device(DeviceConfig("auto"))
    assert find_device(DeviceConfig("cpu")).type == "cpu"


@pytest.mark.parametrize(("precision", "dtype"), [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_an_apple_gpu_computes_in_fp32_unless_asked_and_is_not_compiled(precision, dtype, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: SimpleNamespace(type="mps"))
    found = find_device(DeviceConfig("auto"), precision)
    assert isinstance(found, Mps)
    assert (found.dtype, found.peak_flops, found.memory_bytes(), found.memory_limit()) == (dtype, None, None, None)
    assert not any((found.fused_adamw, found.times_itself, found.pins_memory))
    assert should_compile(True, found) == (False, "not compiled: torch.compile on mps is not used, so the run is slower")


# What suits which


@pytest.mark.parametrize(
    ("kind", "vocab_size", "rows", "tokens"),
    [
        ("cpu", 50257, 16384, 512), ("cpu", 257, 100, 512),
        ("cuda", 257, 16384, 4096), ("cuda", 50257, 16384, 1280), ("mps", 50257, 16384, 1280), ("cuda", 10**7, 16384, 128),
        ("neuron", 257, 16384, 4096), ("neuron", 50257, 16384, 1024), ("neuron", 50257, 3 * 1000, 1000), ("neuron", 50257, 96, 96),
    ],
)  # fmt: skip
def test_the_loss_is_made_in_pieces_that_suit_the_device(kind, vocab_size, rows, tokens):
    assert chunk_size(kind, vocab_size, rows) == tokens
    assert kernels_of(kind).even_chunks == (kind == "neuron")
    assert not kernels_of(kind).even_chunks or rows % tokens == 0
    assert kernels_of(kind).own_attention == kernels_of(kind).groups_with_mask == (kind == "cpu")
