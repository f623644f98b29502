"""From logits to the next token: temperature, top-k and top-p."""

from __future__ import annotations

import torch
from torch import Tensor


def filtered_probabilities(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The distribution to sample from.

    Args:
        logits: (B, V).
        temperature: above 0; divides the logits.
        top_k: keep the k likeliest, and what is as likely as the last of them; 0 keeps all.
        top_p: keep the likeliest that reach this probability together (Holtzman et al., 2020), lower ids first where several are
            as likely; never fewer than one.

    Returns:
        (B, V) fp32, each row sums to 1.
    """
    logits = logits.float() / max(temperature, 1e-30)  # less would overflow
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), float("-inf"))
    return logits.softmax(-1)


def next_token(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """logits (B, V) -> (B, 1) int64; the likeliest where temperature is 0."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities = filtered_probabilities(logits, temperature, top_k, top_p)
    return torch.multinomial(probabilities.cpu(), 1, generator=generator).to(logits.device)
