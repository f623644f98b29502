"""Train, fine-tune and use GPT models: `from gpt import GPT, GPTConfig`, or the `gpt` command.

Names are resolved when first asked for, so that `gpt --help` and config errors need not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig", "Trainer", "__version__"]

if TYPE_CHECKING:
    from gpt.model.config import GPTConfig
    from gpt.model.transformer import GPT
    from gpt.training.trainer import Trainer


def __getattr__(name: str) -> object:
    if name == "GPT":
        from gpt.model.transformer import GPT

        return GPT
    if name == "GPTConfig":
        from gpt.model.config import GPTConfig

        return GPTConfig
    if name == "Trainer":
        from gpt.training.trainer import Trainer

        return Trainer
    raise AttributeError(f"module 'gpt' has no attribute {name!r}")
