"""Loss and bits per byte of a model on held-out text."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from gpt.data.shards import TokenArray
from gpt.model.loss import IGNORE, LinearCrossEntropy
from gpt.model.transformer import GPT
from gpt.runtime.device import Device


@dataclass(frozen=True)
class HeldOutLoss:
    """Sums over a text, from which every usual figure follows."""

    nll: float
    """Nats."""
    tokens: int
    bytes: int
    """Of the text that the tokens stand for."""

    @property
    def loss(self) -> float:
        """Nats per token; its exponential is the token perplexity."""
        return self.nll / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Does not depend on the tokenizer, unlike the loss. The end-of-text tokens' bits count, they have no bytes."""
        return self.nll / math.log(2) / max(1, self.bytes)


@torch.no_grad()
def held_out_loss(
    model: GPT,
    loss: LinearCrossEntropy,
    tokens: TokenArray,
    starts: np.ndarray,
    batch: int,
    byte_lengths: np.ndarray,
    device: Device,
    stopped: Callable[[], bool] = lambda: False,
) -> HeldOutLoss | None:
    """Score windows of context_length tokens, each token given those before it in its window.

    Args:
        model, loss: the model, and how its loss is computed.
        tokens: the held-out ids.
        starts: (N,) where the windows start.
        batch: windows per forward pass; the last pass is padded with targets that do not count, so shapes never change.
        byte_lengths: (vocab_size,) bytes per id.
        device: where.
        stopped: asked between passes; if it says so, None is returned.
    """
    T = model.config.context_length
    was_training = model.training
    model.eval()
    nll, counted, n_bytes = torch.zeros((), dtype=torch.float64), 0, 0
    try:
        for first in range(0, len(starts), batch):
            if stopped():
                return None
            rows = torch.full((batch, T + 1), IGNORE)
            found = tokens.windows(starts[first : first + batch], T + 1)
            rows[: len(found)] = torch.from_numpy(found)
            inputs, targets = rows[:, :-1].clamp(min=0).to(device.type), rows[:, 1:].to(device.type)
            with device.autocast():
                hidden = model.hidden_states(inputs)
            nll += loss(hidden, model.head.weight, targets).cpu().double()
            counted += found[:, 1:].size
            n_bytes += int(byte_lengths[found[:, 1:]].sum())
    finally:
        model.train(was_training)
    return HeldOutLoss(nll.item(), counted, n_bytes)


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """What general compressors reach on a text, to see bits per byte in proportion: `gzip -9` and `xz -9e`."""
    sizes = {"gzip -9": gzip.compress(text, 9), "xz -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)}
    return {name: 8 * len(compressed) / len(text) for name, compressed in sizes.items()} if text else {}
