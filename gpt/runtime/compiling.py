"""Whether torch.compile pays within a run, and compiling block by block in place."""

from __future__ import annotations

from typing import Literal

from gpt.model.loss import LinearCrossEntropy
from gpt.model.transformer import GPT
from gpt.runtime.device import Device

# Compiling costs about this many seconds on a cold cache; it saves a third of the time of what follows.
_PAYS_AFTER_SECONDS = 60
_ASSUMED_FLOPS = {"cpu": 2.5e11, "cuda": 2e14}  # eager, of a machine that is neither slow nor fast


def should_compile(setting: Literal["auto"] | bool, device: Device, training_flops: float | None) -> tuple[bool, str]:
    """Whether to compile, and the reason in words.

    Args:
        setting: the config's `compile`.
        device: where the run is.
        training_flops: of the whole run; None if its length is a time.
    """
    if setting is False:
        return False, "compile=false"
    if obstacle := device.compile_obstacle():
        return False, f"not compiled: {obstacle}, so the run is slower"
    if setting is True:
        return True, "compile=true"
    if training_flops is not None and training_flops < _PAYS_AFTER_SECONDS * _ASSUMED_FLOPS.get(device.type, 1e13):
        return False, "not compiled: the run is too short for it to pay"
    return True, "compiled block by block"


def compile_model(model: GPT, loss: LinearCrossEntropy) -> None:
    """Compile each block and the loss's softmax in place, for fixed shapes; parameter names stay as they are."""
    for block in model.blocks:
        block.compile(dynamic=False)
    loss.compile_softmax(dynamic=False)
