"""The accelerators that torch finds, with memory and the rate of a large matrix product on each, and flash attention.

Through `torch.accelerator`, the same for every kind. Has run on machines without one, and on a stand-in, only.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

from gpt.commands import DoctorConfig
from gpt.doctor.devices import ON_CPU, cuda_build, nvidia_gpus
from gpt.doctor.result import Result, gib, one_line

_ONE_PER_PROCESS = ("neuron",)  # kinds of which a process can use the first one only
_SIZE, _PRODUCTS = 4096, 20  # of the square matrices, and how many are timed


@dataclass(frozen=True)
class _Found:
    """One accelerator: bytes of memory where torch tells them, operations a second in bf16."""

    name: str
    free: int | None
    total: int | None
    rate: float


def accelerators(config: DoctorConfig) -> Result:
    """Each accelerator's name, memory and measured bf16 rate; whether the one that is asked for is there."""
    if config.device in ON_CPU:
        return Result("ok", f"n/a: device={config.device} needs none")
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return _none(config)
    if config.device not in ("auto", found.type):
        return Result("problem", f"device={config.device} is not here; torch finds {found.type}", "device=auto takes what there is")
    number = torch.accelerator.device_count()
    devices = [_measured(found.type, index) for index in range(1 if found.type in _ONE_PER_PROCESS else number)]
    rates = [device.rate / 1e12 for device in devices]
    spread = f"{min(rates):.3g}" if len(rates) == 1 else f"{min(rates):.3g} to {max(rates):.3g}"
    first = devices[0]
    memory = f"{gib(first.total)}{' each' if number > 1 else ''}" if first.total else "memory unknown"
    text = f"{number} x {first.name} ({found.type}), {memory}, {spread} TFLOP/s in bf16"
    if different := {device.name for device in devices} - {first.name}:
        text += f"; not all alike, also {', '.join(sorted(different))}"
    taken = [str(i) for i, device in enumerate(devices) if device.free is not None and device.total and device.free < device.total / 2]
    if taken:
        fix = "end what holds the memory (nvidia-smi and the like name it), or leave these devices out, e.g. with CUDA_VISIBLE_DEVICES"
        return Result("warning", f"{text}; less than half of the memory is free on number {', '.join(taken)}", fix)
    if min(rates) < 0.7 * max(rates):
        slowest = rates.index(min(rates))
        return Result(
            "warning", f"{text}; number {slowest} is slow, and all wait for it", "see its power, its temperature and what else it does"
        )
    return Result("ok", text)


def _none(config: DoctorConfig) -> Result:
    """What to say where torch offers no accelerator."""
    import torch

    built = torch.accelerator.current_accelerator()  # what this torch was built for, there or not
    seen = nvidia_gpus()
    reason = ""
    if built is not None:
        try:
            torch.empty(1, device=built)
        except Exception as error:  # that it fails is known, the words are what is wanted
            reason = one_line(error, 160)
    if config.device != "auto":
        what, fix = f"device={config.device} is not here", "device=auto takes what there is"
        if config.device == "neuron":
            fix = f"see torch-neuronx and Neuron cores; {fix}"
        elif built is None:
            reason = "this torch was built without it"
            fix = f"{cuda_build()}; or {fix}" if config.device == "cuda" else fix
    elif seen and built is not None:
        what = f"{seen[0]} is there, but torch cannot use it"
        fix = "update its driver (nvidia-smi shows the version), or take a torch built for it"
    else:
        return Result("ok", "none; the CPU computes")
    return Result("problem", f"{what}{': ' if reason else ''}{reason}", fix)


def _measured(kind: str, index: int) -> _Found:
    import torch

    with contextlib.nullcontext() if kind in _ONE_PER_PROCESS else torch.accelerator.device_index(index):
        module: Any = torch.get_device_module(kind)
        name = module.get_device_name(index) if hasattr(module, "get_device_name") else kind
        try:
            free, total = torch.accelerator.get_memory_info(index)
        except RuntimeError:  # not every backend keeps these figures (NotImplementedError is one)
            free, total = None, None
        return _Found(name, free, total, _matrix_rate(kind))


def _matrix_rate(kind: str) -> float:
    """Operations a second of bf16 products on the current device of a kind."""
    import torch

    a, b = (torch.randn(_SIZE, _SIZE).to(torch.bfloat16).to(kind) for _ in range(2))
    product = a @ b
    for _ in range(2):  # the first ones also load the kernel
        product = a @ b
    torch.accelerator.synchronize()
    started = time.perf_counter()
    for _ in range(_PRODUCTS):
        product = a @ b
    torch.accelerator.synchronize()
    taken = time.perf_counter() - started
    assert bool(product.float().cpu().isfinite().all()), "a matrix product came out with infinities: the device is faulty"
    return 2 * _SIZE**3 * _PRODUCTS / taken


def flash_attention(config: DoctorConfig) -> Result:
    """CUDA and ROCm: whether flash attention is in this torch, not switched off, and runs on this device."""
    import torch

    cuda = torch.backends.cuda
    found = None if config.device in ON_CPU else torch.accelerator.current_accelerator(check_available=True)
    if found is None or not cuda.is_built():
        return Result("ok", "n/a: no CUDA device; other devices have kernels of their own")
    if not cuda.is_flash_attention_available():
        return Result(
            "warning",
            "not in this torch; a slower kernel is taken",
            "pip install --force-reinstall torch (PyTorch's own build)",
        )
    if not cuda.flash_sdp_enabled():
        return Result("warning", "switched off by torch.backends.cuda.enable_flash_sdp(False)", "remove that call (sitecustomize.py?)")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.zeros(1, 4, 256, 64, dtype=torch.bfloat16, device=found)  # (B, n_head, T, head_dim)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        torch.accelerator.synchronize()
    except RuntimeError as error:
        fix = "none needed: torch takes its memory-efficient kernel; flash attention needs an Ampere GPU or newer, and bf16"
        return Result("warning", f"does not run on this device: {one_line(error, 120)}", fix)
    return Result("ok", "runs (bf16, causal, head_dim 64)")
