"""From logits to the next token: repetition penalty, temperature, top-k, top-p and min-p, in that order, as `transformers` has it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt.runtime.device import widest_float

_PROBED = 1024  # how many of the likeliest tokens are sorted before all are


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest, and what is as likely as the last of them; 0 keeps all.
        top_p: keep the likeliest that reach this probability together (Holtzman et al., 2020), lower ids first where several are
            as likely; never fewer than one.
        min_p: keep what is at least this many times as likely as the likeliest (Nguyen et al., 2024).
        repetition_penalty: logits of tokens that are in the text are divided by it, negative ones multiplied (Keskar et al., 2019).
        seed: None draws one.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None


DEFAULT = Sampling()


def penalise(logits: Tensor, penalty: float, seen: Tensor) -> Tensor:
    """logits (B, V) with the repetition penalty on the tokens of `seen`, (B, V) bool."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def filtered_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution to sample from, at a temperature above 0.

    Args:
        logits: (B, V), already penalised.
        sampling: temperature and filters.

    Returns:
        (B, V) fp32, each row sums to 1.
    """
    logits = logits.float() / max(sampling.temperature, 1e-30)  # less would overflow
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(sampling.min_p), float("-inf"))
    return logits.softmax(-1)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """logits (B, V) with -inf beyond the likeliest tokens that reach `top_p` together."""
    V = logits.shape[-1]
    total = logits.logsumexp(-1, keepdim=True)
    # Sorting a vocabulary takes a CPU longer than many a model's forward pass, and nearly always the first few are enough. On an
    # accelerator sorting is quick, and asking whether they are would make it wait.
    descending = logits.topk(min(_PROBED if logits.is_cpu else V, V), dim=-1).values
    if descending.shape[-1] < V and bool(((descending - total).exp().sum(-1) < top_p).any()):
        descending = logits.sort(dim=-1, descending=True).values
    probabilities = (descending - total).exp()
    kept = (probabilities.cumsum(-1) - probabilities < top_p).sum(-1, keepdim=True)  # (B, 1), at least 1
    last = descending.gather(-1, kept - 1)
    # Of those as likely as the last one kept, the first by id, as many as there is room for.
    room = kept - (logits > last).sum(-1, keepdim=True)
    ties = logits == last
    return logits.masked_fill(~((logits > last) | (ties & (ties.cumsum(-1) <= room))), float("-inf"))


def next_token(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """The next token of each row; the same number picks the same token on every device, and nothing waits for the device.

    Args:
        logits: (B, V).
        sampling: temperature and filters.
        uniform: (B, 1) random numbers in [0, 1); float64 where the device has it.

    Returns:
        (B, 1) int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    cumulative = filtered_probabilities(logits, sampling).cumsum(-1, dtype=uniform.dtype)
    # The first id whose cumulative probability exceeds the number: never one of probability 0.
    below = uniform.clamp(max=1 - 2 * torch.finfo(uniform.dtype).eps) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, below, right=True)


def uniform_numbers(sampling: Sampling, samples: int, length: int, device: torch.device) -> Tensor:
    """One random number per token to come: (samples, length), a stream of its own for each sample, whatever their number."""
    seed = torch.Generator().seed() if sampling.seed is None else sampling.seed
    streams = [torch.rand(length, generator=torch.Generator().manual_seed(seed + n), dtype=torch.float64) for n in range(samples)]
    return torch.stack(streams).to(device, widest_float(device))
