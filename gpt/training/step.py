"""One optimizer step: forward and backward over micro-batches, one sum over all processes, one update; and the counts that it leaves.

The host does not wait for the device within a step. Whether a step's numbers are finite, or its loss a spike, is decided on the device, and
all processes decide alike, since they look at the same sums. What people see is read when a line of metrics is due.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gpt.data.batches import Batch
from gpt.model.loss import IGNORE, chunk_size, valid_rows
from gpt.model.objective import NextTokenLoss
from gpt.model.transformer import GPT
from gpt.runtime.device import Device, widest_float
from gpt.runtime.distributed import World
from gpt.runtime.parallel import accumulating, sum_partial_gradients, unwrapped
from gpt.training.clock import StepClock
from gpt.training.gradients import clip_factor, gradient_norm
from gpt.training.objectives import Giver, given
from gpt.training.weight_average import WeightAverage

# A loss is a spike if it is so many standard deviations above the mean of the latest ones, and so much in proportion (after OLMo-core's
# SkipStepOptimizer, which takes 6 deviations of the last 128 losses; here the averages are exponential, so that they are few numbers).
SPIKE_DEVIATIONS, SPIKE_SHARE, SPIKE_AFTER, SPIKE_DECAY = 6.0, 0.1, 32, 0.97


class Counts:
    """Numbers that steps add up on the device, in fp64 where it has that; a checkpoint holds them.

    Tokens are counted from the last `load` on only: over a run they are more than fp32, or 32 bits, can tell apart.

    Attributes:
        WHOLE, REAL: the fields of `TrainingState` that they are.
    """

    WHOLE = ("tokens", "interval_steps", "skipped_steps", "skipped_in_a_row", "spikes", "losses")
    REAL = ("interval_loss", "loss_mean", "loss_variance")

    def __init__(self, state: Any, device: Device) -> None:
        self._device = torch.device(device.type)
        self.values: dict[str, Tensor] = {}
        self.load(state)

    def load(self, state: Any) -> None:
        """Take the numbers of a `TrainingState`."""
        wide = widest_float(self._device)
        self._tokens_before = state.tokens
        for names, dtype in ((self.WHOLE, torch.int64), (self.REAL, wide)):
            self.values |= {name: torch.tensor(getattr(state, name), dtype=dtype, device=self._device) for name in names}
        self.values["tokens"].zero_()

    def store(self, state: Any) -> None:
        """Give the numbers to a `TrainingState`; waits for the device."""
        for names in (self.WHOLE, self.REAL):
            for name, value in zip(names, torch.stack([self.values[name] for name in names]).tolist(), strict=True):
                setattr(state, name, value)
        state.tokens += self._tokens_before

    def add(self, loss: Tensor, tokens: Tensor, apply: Tensor, is_spike: Tensor) -> None:
        """Count a step: its mean loss, its targets, whether it was applied (1 or 0), whether its loss is a spike."""
        c = self.values
        finite = torch.isfinite(loss)
        known = torch.where(finite, loss, 0.0)
        applied = apply.long()
        c["tokens"] += tokens.long()
        c["interval_loss"] += known * apply
        c["interval_steps"] += applied
        c["skipped_steps"] += 1 - applied
        c["skipped_in_a_row"] = (c["skipped_in_a_row"] + 1) * (1 - applied)
        c["spikes"] += is_spike
        weight = torch.where(c["losses"] == 0, 1.0, 1 - SPIKE_DECAY) * finite
        difference = known - c["loss_mean"]
        c["loss_mean"] = c["loss_mean"] + weight * difference
        c["loss_variance"] = (1 - weight) * (c["loss_variance"] + weight * difference**2)
        c["losses"] += finite

    def is_spike(self, loss: Tensor) -> Tensor:
        """Whether a step's mean loss is far above the latest ones."""
        c = self.values
        margin = torch.maximum(SPIKE_DEVIATIONS * c["loss_variance"].sqrt(), SPIKE_SHARE * c["loss_mean"])
        return (c["losses"] >= SPIKE_AFTER) & (loss > c["loss_mean"] + margin)


def rows_on_device(batch: Batch, those: slice, device: Device, outputs: int) -> tuple[Batch, Tensor | None]:
    """Some rows of a batch, and which of their targets count if they are few (`valid_rows`), on the device; `outputs`: of the head."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device.type, non_blocking=True)

    targets = batch.targets[those]
    learned = valid_rows(targets, chunk_size(device.type, outputs, targets.numel()))
    documents = None if batch.documents is None else batch.documents[those]
    numbers = None if batch.numbers is None else batch.numbers[those]
    return Batch(cast(Tensor, moved(batch.tokens[those])), cast(Tensor, moved(targets)), moved(documents), numbers), moved(learned)


class Step:
    """Does optimizer steps.

    Args:
        objective: tokens, targets, documents -> the sum of the losses, spread over the processes (`gpt.runtime.parallel.spread`).
        model: the GPT within it.
        optimizers: of its parameters.
        average: of its weights, or None.
        counts: what the steps add up.
        world, device: where.
        micro_batch: sequences of a pass.
        grad_clip: largest gradient norm; 0: any.
        skip_spikes: whether a step with a loss spike is left out.
        clock: measures.
        givers: asked before every pass for more that the objective takes, as arguments by name; without gradients.

    Attributes:
        grad_norm: scalar on the device: of the last step, before clipping.
        update_norm: of the last step that measured it, over all weights; None: none has.
        spiked: scalar on the device, bool: whether the last step's loss was a spike.
    """

    def __init__(
        self,
        objective: nn.Module,
        model: GPT,
        optimizers: Sequence[Any],
        average: WeightAverage | None,
        counts: Counts,
        world: World,
        device: Device,
        micro_batch: int,
        grad_clip: float,
        skip_spikes: bool,
        clock: StepClock,
        givers: list[Giver] | None = None,
    ) -> None:
        inner = cast(NextTokenLoss, unwrapped(objective))
        self.givers, self._units, self._figures = givers or [], inner.units, inner.figures
        self.objective, self.model, self.optimizers, self.average, self.counts = objective, model, optimizers, average, counts
        self.world, self.device, self.micro_batch, self.clock = world, device, micro_batch, clock
        self.grad_clip, self.skip_spikes = grad_clip, skip_spikes
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.grad_norm = self.spiked = torch.zeros((), device=device.type)
        self.update_norm: Tensor | None = None

    def __call__(self, batch: Batch, stopped: Callable[[], bool] = lambda: False, measure: bool = False) -> bool:
        """Train on this process's part of a batch.

        Args:
            batch: its rows.
            stopped: asked before every pass.
            measure: also take the norm of the update, for which the weights are copied.

        Returns:
            Whether the step was done; False: `stopped` said so, and nothing has changed.
        """
        nll = torch.zeros((), device=self.device.type)
        rows = len(batch.tokens)
        for first in range(0, rows, self.micro_batch):
            if stopped():
                self._zero_grad()
                return False
            part, learned = self._part(batch, first)
            with accumulating(self.objective, self.world, last=first + self.micro_batch >= rows):
                with self.clock.part("forward"), self.device.autocast():
                    more = given(self.givers, part)
                    loss = self.objective(part.tokens, part.targets, part.documents, learned, **more)
                with self.clock.part("backward"):
                    loss.backward()
            nll += loss.detach()
        with self.clock.part("optimizer"):
            self._update(nll, self._units(batch.targets, batch.documents), int((batch.targets != IGNORE).sum()), measure)
        return True

    def renew(self, objective: nn.Module, givers: list[Giver]) -> None:
        """Train what trains now, by this objective and with these givers, after a stage of the plan has begun."""
        self.objective, self.givers = objective, givers
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]

    def figures(self) -> dict[str, float]:
        """What the loss has to tell of the steps since it was last asked; all processes ask together."""
        return self._figures(self.world.sum_over_data)

    @torch.no_grad()
    def _update(self, nll: Tensor, units: int, targets: int, measure: bool) -> None:
        wide = widest_float(nll.device)
        totals = torch.stack((nll.to(wide), *(torch.full_like(nll, count, dtype=wide) for count in (units, targets))))
        loss_sum, valid, tokens = self.world.sum_over_data(totals)
        sum_partial_gradients(self.model, self.world)
        norm = gradient_norm(self.trainable) / valid
        loss = loss_sum / valid  # without a valid target, or a pair: nan, and so left out
        is_spike = self.counts.is_spike(loss)
        apply = torch.isfinite(norm) & torch.isfinite(loss)
        if self.skip_spikes:
            apply &= ~is_spike
        apply = apply.float()
        scale = (clip_factor(norm, self.grad_clip) / valid).float()
        before = [p.detach().clone() for p in self.trainable] if measure else []
        for optimizer in self.optimizers:
            optimizer.step(scale=scale, apply=apply)
        if measure:
            for p, old in zip(self.trainable, before, strict=True):
                p.grad = p.detach() - old  # is measured as a gradient is, whatever the layout
            self.update_norm = gradient_norm(self.trainable)
        if self.average is not None:
            self.average.update(apply)
        self.counts.add(loss, tokens, apply, is_spike)
        self.grad_norm, self.spiked = norm, is_spike
        self._zero_grad()

    def _part(self, batch: Batch, first: int) -> tuple[Batch, Tensor | None]:
        return rows_on_device(batch, slice(first, first + self.micro_batch), self.device, self.model.config.outputs)

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
