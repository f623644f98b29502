"""An exponential moving average of the weights, which validates better than the weights that it follows.

It lies where the weights lie, shard by shard, and is copied into the model to be measured or exported.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gpt.runtime.sharding import local_part, reshard

UPDATES = "updates"


class WeightAverage:
    """`average = decay * average + (1 - decay) * weights` after each step, over the parameters that train, from the initial weights on.

    Early on, weights of long ago count less: the decay of update t = 1, 2, ... is at most (1 + t) / (10 + t), as in TensorFlow's
    ExponentialMovingAverage; otherwise the average of a run of 1,000 steps at 0.999 would still be a third initial weights.

    Args:
        model: as it trains, already sharded, where it is.
        decay: below 1; the average reaches back over some 1 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay
        # Parameters, and not what they hold now: FSDP may move that at the first forward pass.
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._averages = {name: p.detach().clone() for name, p in self._weights.items()}
        device = next(iter(self._weights.values())).device
        self._updates = torch.zeros((), device=device)  # a tensor: steps that are left out are known to the device only
        self._swapped = False

    def extend(self, names: Collection[str]) -> None:
        """Follow more parameters, which begin to train now: so far their average is what they are."""
        more = {name: p for name, p in self.model.named_parameters() if name in names}
        self._weights |= more
        self._averages |= {name: p.detach().clone() for name, p in more.items()}

    @torch.no_grad()
    def update(self, apply: Tensor | None = None) -> None:
        """Take in the weights as they are now; where apply () fp32 is 0 and not 1, do nothing."""
        assert not self._swapped
        apply = torch.ones_like(self._updates) if apply is None else apply
        self._updates += apply
        decay = ((1 + self._updates) / (10 + self._updates)).clamp(max=self.decay)
        share = apply * (1 - decay)
        averages, weights = _local(self._averages), _local(self._weights)
        torch._foreach_lerp_(averages, weights, [share] * len(weights))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model has the average as its weights within the block, and its own again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, and fills to go on: each parameter's average by its name, laid out as it, and the number of updates."""
        assert not self._swapped
        return {**self._averages, UPDATES: self._updates}

    @torch.no_grad()
    def _swap(self) -> None:
        # A root that fsdp has gathered for a forward pass stays so until a backward pass, and would not see the change.
        reshard(self.model)
        for weight, average in zip(_local(self._weights), _local(self._averages), strict=True):
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)
        self._swapped = not self._swapped


def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [local_part(t) for t in tensors.values()]
