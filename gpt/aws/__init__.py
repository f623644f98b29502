"""A run as a SageMaker training job: what it asks for, what runs inside it, and a rehearsal of it without AWS. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["as_model_trainer"]

if TYPE_CHECKING:
    from gpt.aws.model_trainer import as_model_trainer


def __getattr__(name: str) -> object:
    if name == "as_model_trainer":  # not before it is asked for: those who are `gpt.aws.config` are many
        from gpt.aws.model_trainer import as_model_trainer

        return as_model_trainer
    raise AttributeError(f"module 'gpt.aws' has no attribute {name!r}")
