"""What a run needs of memory by the formulas of `gpt.runtime.memory`: with what trains of it, and the model that stands beside it."""

from __future__ import annotations

import math
from dataclasses import replace

from gpt.config import RunConfig
from gpt.errors import UserError
from gpt.finetuning.distillation import TeacherGiver
from gpt.finetuning.freezing import Plan
from gpt.inference.loading import read_shape
from gpt.model.config import LoRAConfig
from gpt.model.loss import chunk_size
from gpt.runtime.case import FLOAT, Case, case_of
from gpt.runtime.device import Device
from gpt.runtime.shapes import parameters


def run_case(
    config: RunConfig, plan: Plan, ranks: int, micro_batch: int, device: Device, compiled: bool, paired: bool = False,
    teacher: TeacherGiver | None = None,
) -> Case:  # fmt: skip
    """The case that a run is, once all trains that its plan names.

    Args:
        config, ranks, micro_batch, device, compiled: as of `case_of`.
        plan: of what trains.
        paired: whether it learns from rows of preference, with a reference beside it till that has seen all of them.
        teacher: of distillation, if it is loaded; else it is as large as its config says, and 0 where only transformers reads that.
    """
    trains = plan.trainable(len(plan.stages))
    case = case_of(config, ranks, micro_batch, device, compiled, trains if len(trains) < len(plan.names) else None)
    beside = 0.0
    if config.distill.teacher is not None:
        beside = _teacher_bytes(config.distill.teacher, config.allow_pickle, device, teacher)
    elif paired:
        beside = _reference_bytes(case)
    elif config.lm_weight:
        beside = _next_token_bytes(case, device)
    return replace(case, beside=beside)


def _teacher_bytes(path: str, allow_pickle: bool, device: Device, teacher: TeacherGiver | None) -> float:
    """Of a whole teacher in each process, in the dtype of its products."""
    if teacher is not None:
        return sum(p.nbytes for p in teacher.teacher.module.parameters())
    try:
        shape, _ = read_shape(path, allow_pickle, "distill.teacher")
    except UserError:  # of another architecture; if it cannot be had at all, loading it says so
        return 0.0
    return device.dtype.itemsize * sum(math.prod(p.shape) for p in parameters(shape))


def _next_token_bytes(case: Case, device: Device) -> float:
    """Of the next tokens' loss beside that of classes: both gradients, and a chunk's logits with what is made of them."""
    rows, model = case.tokens, case.model
    logits = min(rows, chunk_size(device.type, model.vocab_size, rows)) * model.vocab_size
    gradients = case.width * rows * model.d_model + FLOAT * model.vocab_size * model.d_model * case.learns("embeddings.tokens")
    return gradients + (2 * case.width if case.compiled else 23) * logits  # as `gpt.runtime.memory.passes` counts those of the head


def _reference_bytes(case: Case) -> float:
    """Of the first weights beside those that train: fp32 where they are divided, else only what changes, matrices in products' dtype."""
    if case.is_divided:
        return FLOAT * replace(case, lora=LoRAConfig(), trains=None).elements()
    return sum(p.local() * (case.width if p.is_matrix else FLOAT) for p in case.chosen(learning=True) if not p.is_adapter)
