"""Where a run runs. So far: here, in this process."""

from __future__ import annotations

from gpt.config import RunConfig


def launch(config: RunConfig) -> int:
    """Run a training run where its config says, and return the exit code."""
    from gpt.training.trainer import Trainer

    return Trainer(config).fit().exit_code
