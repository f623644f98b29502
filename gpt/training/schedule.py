"""The learning rate over a run: linear warm-up, then cosine, WSD (warm-up, stable, decay) or constant."""

from __future__ import annotations

import math

from gpt.config import ScheduleConfig


def learning_rate_factor(config: ScheduleConfig, step: int, total_steps: int | None, progress: float) -> float:
    """The learning rate of a step as a share of its peak.

    Args:
        config: which schedule.
        step: 0 for the first.
        total_steps: of the run; None if its length is a time.
        progress: how much of the run is done, 0 to 1.

    Returns:
        0 < factor <= 1 but for a last step that decays to 0.
    """
    warm = warm_up(config, step, total_steps, progress)
    warmup_share = config.warmup if config.warmup < 1 else 0.0
    if total_steps:
        warmup_share = (config.warmup if config.warmup >= 1 else config.warmup * total_steps) / total_steps
    if warm < 1:
        return warm
    if config.name == "constant":
        return 1.0
    if config.name == "cosine":
        done = (progress - warmup_share) / (1 - warmup_share) if warmup_share < 1 else 1.0
        decayed = 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
    else:
        decayed = min(1.0, (1 - progress) / config.decay) if config.decay else 1.0
    return config.final + (1 - config.final) * max(decayed, 0.0)


def warm_up(config: ScheduleConfig, step: int, total_steps: int | None, progress: float, since: tuple[int, float] = (0, 0.0)) -> float:
    """How far the warm-up is that began after so many steps, and this share of the run; 0 to 1.

    The other arguments are those of `learning_rate_factor`.
    """
    if config.warmup >= 1 or total_steps is not None:
        warmup_steps = config.warmup if config.warmup >= 1 else config.warmup * (total_steps or 0)
        warm = (step - since[0] + 1) / warmup_steps if warmup_steps else 1.0
    else:
        warm = max(progress - since[1], 1e-3) / config.warmup if config.warmup else 1.0
    return min(warm, 1.0)
