"""Optimizers: Muon for the matrices inside the blocks with AdamW for everything else, or AdamW alone.

Weight decay falls on matrices only. Learning rates are set each step from the schedule (`set_learning_rate`); every group
keeps its own peak, so the ratio between groups never changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.adamw import adamw

from gpt.model.lora import ADAPTERS
from gpt.runtime.sharding import local_part
from gpt.training.muon import Muon

if TYPE_CHECKING:
    from gpt.config import OptimizerConfig


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, 2019), which scales gradients and leaves steps out as it goes, on local shards; by torch's fused kernel.

    Args:
        params: plain tensors or DTensors, contiguous, or groups of them.
        lr: peak learning rate.
        betas: decay of the averages of gradients and of their squares.
        eps: added to the denominator.
        weight_decay: decoupled, multiplied by the learning rate.
        fused: whether the device has the fused kernel; else plain operations do the same.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        fused: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._fused = fused

    @torch.no_grad()
    def step(self, closure: Any = None, *, scale: Tensor | None = None, apply: Tensor | None = None) -> Any:
        """Update every parameter that has a gradient; what is left in the gradients is not to be read.

        Args:
            closure: not supported.
            scale: () fp32, what gradients are multiplied by; None: 1.
            apply: () fp32, 1 or 0; where it is 0, parameters and state stay as they are to the bit, whatever the gradients. None: 1.
        """
        assert closure is None
        divisor = None if scale is None else scale.reciprocal()
        left_out = None if apply is None else 1 - apply
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    step = torch.zeros((), dtype=torch.float32, device=p.device)
                    self.state[p] |= {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            # The fused kernel of a CPU reads a gradient's memory in order, whatever its strides.
            gradients = [local_part(p.grad).contiguous() for p in params]
            weights, averages, squares = (
                [local_part(t) for t in tensors]
                for tensors in (params, *([self.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq")))
            )
            if not self._fused:
                _update(weights, gradients, averages, squares, [self.state[p]["step"] for p in params], group, scale, apply)
                continue
            adamw(
                weights, gradients, averages, squares, [], [self.state[p]["step"] for p in params],
                fused=True, grad_scale=divisor, found_inf=left_out, amsgrad=False, maximize=False, lr=group["lr"],
                beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"], weight_decay=group["weight_decay"],
            )  # fmt: skip


def _update(
    weights: list[Tensor], gradients: list[Tensor], averages: list[Tensor], squares: list[Tensor], steps: list[Tensor],
    group: dict[str, Any], scale: Tensor | None, apply: Tensor | None,
) -> None:  # fmt: skip
    """What the fused kernel does, in plain operations that wait for nothing: where `apply` is 0, all is multiplied by 1, and added -0."""
    (beta1, beta2), lr, eps, weight_decay = group["betas"], group["lr"], group["eps"], group["weight_decay"]
    on = torch.ones_like(steps[0]) if apply is None else apply

    def added(tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors) if apply is None else [torch.where(apply > 0, t, -0.0) for t in tensors]  # not t * 0: t may be infinite

    if scale is not None:
        gradients = list(torch._foreach_mul(gradients, scale))
    torch._foreach_add_(steps, on)
    count = steps[0].clamp(min=1)  # the same for all of a group; 0 where the very first step is left out
    torch._foreach_mul_(averages, 1 - (1 - beta1) * on)
    torch._foreach_add_(averages, added(torch._foreach_mul(gradients, 1 - beta1)))
    torch._foreach_mul_(squares, 1 - (1 - beta2) * on)
    torch._foreach_add_(squares, added(torch._foreach_mul(torch._foreach_mul(gradients, gradients), 1 - beta2)))
    divisors = torch._foreach_sqrt(squares)
    torch._foreach_div_(divisors, (1 - beta2**count).sqrt())
    torch._foreach_add_(divisors, eps)
    updates = torch._foreach_div(averages, divisors)
    torch._foreach_mul_(updates, -lr / (1 - beta1**count))
    torch._foreach_mul_(weights, 1 - lr * weight_decay * on)
    torch._foreach_add_(weights, added(updates))


def build_optimizers(
    config: OptimizerConfig,
    model: nn.Module,
    dtype: torch.dtype,
    mesh: DeviceMesh | None = None,
    fused: bool = True,
    scale: Callable[[str], float] = lambda name: 1.0,
) -> list[Muon | AdamW]:
    """The optimizers over every trainable parameter of `model`, each parameter in exactly one.

    Args:
        config: which, and their settings.
        model: as it trains: already sharded, where it is.
        dtype: of the matrix products within an optimizer; parameters and state are what they are, fp32.
        mesh: the ranks that hold the same parameters, or shards of them, over which Muon's work is divided; None: one process.
        fused: whether the device has the fused AdamW kernel.
        scale: of a parameter by name: its learning rate as a share of the config's.
    """
    optimizers: list[Muon | AdamW] = []
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    extend_optimizers(optimizers, config, trainable, dtype, mesh, fused, scale)
    return optimizers


def extend_optimizers(
    optimizers: list[Muon | AdamW],
    config: OptimizerConfig,
    parameters: Mapping[str, nn.Parameter],
    dtype: torch.dtype,
    mesh: DeviceMesh | None = None,
    fused: bool = True,
    scale: Callable[[str], float] = lambda name: 1.0,
    since: tuple[int, float] | None = None,
) -> None:
    """Have optimizers update more parameters, as groups of their own.

    Args:
        optimizers: to which groups, or whole optimizers, are added.
        parameters: by name.
        since: after how many steps, and which share of the run, they begin to train: then their learning rate warms up from there.

    The other arguments are those of `build_optimizers`.
    """
    groups: dict[tuple[type, bool, float], list[nn.Parameter]] = {}
    for name, p in parameters.items():
        in_muon = config.name == "muon" and _is_for_muon(name, p.dim())
        groups.setdefault((Muon if in_muon else AdamW, p.dim() >= 2, scale(name)), []).append(p)
    for (kind, decays, share), params in sorted(groups.items(), key=lambda item: (item[0][0] is AdamW, not item[0][1], -item[0][2])):
        as_muon_says = config.name == "muon" and kind is AdamW
        lr, weight_decay = (config.adam_lr, config.adam_weight_decay) if as_muon_says else (config.lr, config.weight_decay)
        group: dict[str, Any] = {
            "params": params, "lr": lr * share, "peak_lr": lr * share, "since": since, "weight_decay": weight_decay if decays else 0.0,
        }  # fmt: skip
        if (optimizer := next((o for o in optimizers if type(o) is kind), None)) is not None:
            optimizer.add_param_group(group)
        elif kind is Muon:
            optimizers.append(Muon([group], config.lr, config.momentum, config.weight_decay, dtype, mesh))
        else:
            optimizers.append(AdamW([group], lr=lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused))


def peak_learning_rate(config: OptimizerConfig, name: str, dim: int) -> float:
    """Of a parameter with so many dimensions, before any scaling."""
    return config.adam_lr if config.name == "muon" and not _is_for_muon(name, dim) else config.lr


def _is_for_muon(name: str, dim: int) -> bool:
    """Whether a parameter is a matrix inside a block, of full rank: an adapter's two are not, and AdamW suits them."""
    return dim == 2 and name.startswith("blocks.") and not name.endswith(ADAPTERS)


def set_learning_rate(
    optimizers: Sequence[torch.optim.Optimizer],
    factor: float,
    warm_up: Callable[[tuple[int, float]], float] = lambda since: 1.0,
) -> None:
    """Set every group's learning rate.

    Args:
        optimizers: whose groups.
        factor: 0 to 1, from the schedule, of its peak.
        warm_up: of a group that began to train later, when it did -> 0 to 1, by which it is multiplied besides.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor * (1.0 if group["since"] is None else warm_up(group["since"]))
