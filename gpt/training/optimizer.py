"""Optimizers: Muon for the matrices inside the blocks with AdamW for everything else, or AdamW alone.

Weight decay falls on matrices only. Learning rates are set each step from the schedule (`set_learning_rate`); every group
keeps its own peak, so the ratio between groups never changes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from gpt.config import OptimizerConfig

# Coefficients of the quintic Newton-Schulz iteration (Jordan et al., 2024): five steps bring every singular value of a
# matrix of Frobenius norm 1 to about 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrices with orthonormal rows (or columns), approximately.

    Args:
        matrices: (M, rows, columns), a batch of equal shapes; computed in bf16.
        steps: Newton-Schulz iterations.

    Returns:
        (M, rows, columns) bf16; singular values between about 0.7 and 1.2, but for those that were almost 0.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al., "Muon", 2024), over matrices of equal shape at once.

    The update is scaled by 0.2 sqrt(max(rows, columns)), which gives it AdamW's root mean square (Liu et al., "Muon is
    scalable for LLM training", 2025), so learning rates and weight decay carry over between shapes and from AdamW.

    Args:
        params: matrices (2-D), or groups of them.
        lr: peak learning rate.
        momentum: decay of the gradient average; Nesterov.
        weight_decay: decoupled, multiplied by the learning rate.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.01, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every matrix that has a gradient. `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            buckets: dict[tuple[torch.Size, torch.device], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    buckets[p.shape, p.device].append(p)
            for (shape, _), params in buckets.items():
                self._update(params, group["lr"] * 0.2 * max(shape) ** 0.5, group)

    def _update(self, params: list[Tensor], rate: float, group: dict[str, Any]) -> None:
        gradients = [p.grad for p in params if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        averages = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, averages, group["momentum"])
        updates = orthogonalise(torch.stack(ahead)).to(params[0].dtype)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(updates.unbind()), alpha=-rate)


def build_optimizers(config: OptimizerConfig, model: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizers over every trainable parameter of `model`, each parameter in exactly one."""
    muon: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if config.name == "muon" and p.dim() == 2 and name.startswith("blocks."):
            muon.append(p)
        else:
            (decayed if p.dim() >= 2 else plain).append(p)
    optimizers: list[torch.optim.Optimizer] = []
    lr = config.lr
    if muon:
        optimizers.append(Muon(muon, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay))
        lr = config.adam_lr
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to `factor` (0 to 1, from the schedule) of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
