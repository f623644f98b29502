"""torch itself, and the processor with its rate of a large matrix product and what it has for bf16."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from gpt.commands import DoctorConfig
from gpt.doctor.result import Result, gib, one_line

OLDEST_TORCH = (2, 11)
_INSTALL = f"pip install 'torch>={'.'.join(map(str, OLDEST_TORCH))}'"
_LIMITING = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_UNLIMITED = ("avx512", "avx512_core_bf16", "avx512_core_amx", "avx512_core_fp16", "avx10_1_512_amx")  # values of them that keep bf16
ON_CPU = ("cpu", "neuron_sim")  # devices for which no accelerator is needed
_LEAST_MEMORY = 2 << 30
CPU_INFO, MEMORY_INFO, MEMORY_LIMIT = Path("/proc/cpuinfo"), Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")


def torch_build(config: DoctorConfig) -> Result:
    """Whether torch can be imported, its version, and what it was built for."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name == "torch":
            return Result("problem", "torch is not installed", _INSTALL)
        return Result("problem", f"torch does not import: {one_line(error)}", f"pip install {error.name}")
    except Exception as error:  # a library that is missing or too old, in whatever words
        return Result("problem", f"torch does not import: {one_line(error)}", _INSTALL.replace("install", "install --force-reinstall"))
    version = getattr(torch, "__version__", "")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        where = getattr(torch, "__path__", None) or getattr(torch, "__file__", "nowhere")
        return Result("problem", f"what is imported as torch is not PyTorch: {where}", "rename or remove it")
    if (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        return Result("problem", f"{version}; {'.'.join(map(str, OLDEST_TORCH))} or newer is needed", f"{_INSTALL} --upgrade")
    found = f"{version}, built for {_build(torch)}"
    nvidia = nvidia_gpus()
    if nvidia and not torch.version.cuda and config.device not in ON_CPU:
        return Result("warning", f"{found}, which leaves {nvidia[0]} unused", cuda_build())
    return Result("ok", found)


def cuda_build() -> str:
    """How to install the torch there is as it is built for CUDA: PyPI has that one for Linux, PyTorch's own index others."""
    version = importlib.metadata.version("torch").partition("+")[0]
    return f"pip install --force-reinstall 'torch=={version}'"


def _build(torch: Any) -> str:
    version = torch.version
    for title, number in (("ROCm", version.hip), ("CUDA", version.cuda), ("XPU", version.xpu)):
        if number:
            return f"{title} {number}"
    return "the CPU and MPS" if torch.backends.mps.is_built() else "the CPU"


def nvidia_gpus() -> list[str]:
    """The GPUs that NVIDIA's driver lists, by name, whatever torch makes of them."""
    if shutil.which("nvidia-smi") is None:
        return []
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=15, check=False)
        if done.returncode == 0:
            return re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", done.stdout, re.MULTILINE)
    return []


def processor(config: DoctorConfig) -> Result:
    """The processor's cores, memory and measured rates; threads that are more or fewer than its cores."""
    import torch

    from gpt.runtime.cpu import set_threads, usable_cores
    from gpt.runtime.peak import measured_peak_flops

    cores = usable_cores()
    set_threads(0, 1)
    threads = torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # before the measurement, which is a load itself
    rates = [f"{measured_peak_flops(dtype) / 1e9:.0f}" for dtype in (torch.bfloat16, torch.float32)]
    available, total = _memory()
    memory = f"{gib(available)} of {gib(total)} memory free" if available and total else "memory unknown"
    speed = f"{rates[0]} GFLOP/s in bf16, {rates[1]} in fp32, on {threads} thread{'s' * (threads > 1)}"
    found = f"{_processor_name()}, {cores} cores, {memory}; {speed}"
    if threads > cores:
        return Result("warning", f"{found}, more than there are cores, which slows all of them", f"export OMP_NUM_THREADS={cores}")
    if threads < cores and config.device in ("auto", *ON_CPU):
        return Result(
            "warning",
            f"{found}, since OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}",
            "unset OMP_NUM_THREADS (or set device.threads)",
        )
    if load > cores:
        found += f"; others compute here too (load {load:.1f})"
        return Result("warning", found, "end them, or give runs fewer threads: device.threads=<n>")
    if available and available < _LEAST_MEMORY:
        return Result("warning", f"{found}; little memory", "end what else runs here, or take a smaller train.micro_batch and model")
    return Result("ok", found)


def _processor_name() -> str:
    if CPU_INFO.is_file() and (name := re.search(r"^model name\s*:\s*(.+)$", CPU_INFO.read_text(errors="replace"), re.MULTILINE)):
        return " ".join(name[1].split())
    return platform.processor() or platform.machine()


def _memory() -> tuple[int | None, int | None]:
    """Bytes of memory that are free, and that there are, within the limit of the container."""
    if not MEMORY_INFO.is_file():
        return None, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    lines = dict(re.findall(r"^(\w+):\s+(\d+) kB$", MEMORY_INFO.read_text(), re.MULTILINE))
    available, total = int(lines["MemAvailable"]) * 1024, int(lines["MemTotal"]) * 1024
    limit = MEMORY_LIMIT.read_text().strip() if MEMORY_LIMIT.is_file() else "max"
    if limit != "max" and int(limit) < total:
        total = int(limit)
        used = MEMORY_LIMIT.with_name("memory.current")
        available = min(available, max(0, total - int(used.read_text())) if used.is_file() else total)
    return available, total


def bf16_instructions(config: DoctorConfig) -> Result:
    """Whether the processor multiplies bf16 (AVX512-BF16 or AMX), and torch may use it; without, bf16 is emulated and slower than fp32."""
    import torch

    avx512, amx = torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()
    found = f"AVX512-BF16: {_yes(avx512)}, AMX: {_yes(amx)}"
    if (avx512 or amx) and (name := next((n for n in _LIMITING if os.environ.get(n, "").lower() not in ("", "all", *_UNLIMITED)), None)):
        return Result("warning", f"{found}, but {name}={os.environ[name]} keeps torch from using all of it", f"unset {name}")
    if (avx512 or amx) and not torch.backends.mkldnn.is_available():
        return Result("warning", f"{found}, but this torch has no oneDNN to use it", f"{_INSTALL} --force-reinstall (PyTorch's own build)")
    if avx512 or amx or torch.accelerator.is_available():
        return Result("ok", found)
    return Result("warning", f"{found}; products in bf16 are emulated here", "leave precision=auto, which takes fp32 on this processor")


def _yes(there: bool) -> str:
    return "yes" if there else "no"
