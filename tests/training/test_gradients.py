"""Norms of what is sharded are in test_distributed_optimizer.py."""

import math

import pytest
import torch
from torch import nn

from gpt.training.gradients import clip_factor, gradient_norm


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    made = [nn.Parameter(torch.randn(s)) for s in shapes]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def test_the_norm_is_torchs():
    made = [*parameters((3, 5), (7,), ()), nn.Parameter(torch.ones(4))]  # the last has no gradient
    norm = gradient_norm(made)
    assert (norm.dtype, norm.shape) == (torch.float32, ())
    assert norm == nn.utils.get_total_norm([p.grad for p in made if p.grad is not None], foreach=True)


def test_no_gradient_has_the_norm_zero():
    assert gradient_norm([nn.Parameter(torch.ones(4))]) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_has_a_norm_that_is_not(bad):
    made = parameters((3, 5), (7,))
    assert made[1].grad is not None
    made[1].grad[3] = bad
    assert not gradient_norm(made).isfinite()


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clipping_is_torchs(limit):
    ours, theirs = parameters((3, 5), (7,)), parameters((3, 5), (7,))
    factor = clip_factor(gradient_norm(ours), limit)
    nn.utils.clip_grad_norm_(theirs, limit, foreach=True)
    for p, q in zip(ours, theirs, strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad * factor, q.grad)


def test_a_limit_of_zero_is_none():
    assert clip_factor(torch.tensor(1e9), 0.0) == 1
