"""Whether torch.compile pays within a run, getting it ready, and compiling block by block in place."""

from __future__ import annotations

import os
import subprocess
import threading
from typing import Literal

import torch

from gpt.model.loss import LinearCrossEntropy
from gpt.model.transformer import GPT
from gpt.runtime.device import Device

# Compiling takes about 15 s on a cold cache and saves a third of the time of what follows.
_PAYS_AFTER_SECONDS = 60
_ASSUMED_FLOPS = {"cpu": 2.5e11, "cuda": 2e14}  # eager, of a machine that is neither slow nor fast

# What torch.compile may ask of a C++ compiler on x86.
_VECTOR_FLAGS = "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mavx512vnni -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8 -mfma".split()


def should_compile(
    setting: Literal["auto"] | bool, device: Device, flops: float | None = None, seconds: float | None = None
) -> tuple[bool, str]:
    """Whether to compile, and the reason in words.

    Args:
        setting: the config's `compile`.
        device: where the run is.
        flops: of the whole run, if known. Not of what is left of it: a run that resumes must go on with the same kernels.
        seconds: of the whole run, if its length is a time.
    """
    if setting is False:
        return False, "compile=false"
    if obstacle := device.compile_obstacle():
        return False, f"not compiled: {obstacle}, so the run is slower"
    if setting is True:
        return True, "compile=true"
    if flops is not None:
        seconds = flops / _ASSUMED_FLOPS.get(device.type, 1e13)
    if seconds is not None and seconds < _PAYS_AFTER_SECONDS:
        return False, "not compiled: the run is too short for it to pay"
    return True, "compiled block by block"


class CompilerTrial:
    """Compiles something small in the background, while a run still reads its text.

    It shows whether the compiler works here at all, and has torch's C++ headers parsed, which the first compilation on a machine
    spends four seconds of one core on.

    Args:
        device: where the run is; there is something to do on a CPU only.
    """

    def __init__(self, device: Device) -> None:
        self._problem: str | None = None
        self._thread: threading.Thread | None = None
        if device.type == "cpu":
            self._thread = threading.Thread(target=self._compile, daemon=True)
            self._thread.start()

    def problem(self) -> str | None:
        """Wait for the trial; what went wrong in one line, or None."""
        if self._thread is not None:
            self._thread.join()
        return self._problem

    def _compile(self) -> None:
        try:
            _skip_vector_probes()
            torch.compile(torch.relu)(torch.ones(16))
        except Exception as error:  # whatever a compiler may do, the run can go on without it
            self._problem = " ".join(str(error).split())[:200]


def compile_model(model: GPT, loss: LinearCrossEntropy) -> None:
    """Compile each block and the loss's softmax in place, for fixed shapes; parameter names stay as they are."""
    for block in model.blocks:
        block.compile(dynamic=False)
    loss.compile_softmax(dynamic=False)


def _skip_vector_probes() -> None:
    """Save eight seconds of every start on x86.

    For each instruction set that the CPU has, torch.compile builds a test program and loads it in a new Python process, which
    imports torch. All that this can find out is that the compiler is too old to know the set, and asking it takes no time.
    """
    import torch._inductor.config as inductor

    command = [os.environ.get("CXX", "g++"), *_VECTOR_FLAGS, "-fsyntax-only", "-x", "c++", os.devnull]
    try:
        known = subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    except OSError:  # another compiler, which torch will find
        return
    if known and inductor.cpp.vec_isa_ok is None:
        inductor.cpp.vec_isa_ok = True
