"""Arithmetic on gradients that is the same however a model is laid out: whole on one device, copied, or sharded as DTensors.

Nothing here makes the host wait for the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt.runtime.sharding import is_sharded, local_part


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of the whole gradient.

    Each rank measures what it holds. What is sharded is gathered and summed in the order of the ranks, so that all get the same bits
    and scale their gradients alike.

    Args:
        parameters: those without a gradient are left out. A plain tensor's gradient is taken to be the same on every rank; a
            DTensor's may be sharded over any of its mesh's dimensions.

    Returns:
        () fp32, on the gradients' device; in one process what `torch.nn.utils.get_total_norm(foreach=True)` gives.
    """
    parts: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = defaultdict(list)  # by the groups that they are sharded over
    for p in parameters:
        if p.grad is not None:
            parts[_sharded_over(p.grad)].append(local_part(p.grad.detach()))
    if not parts:
        return torch.zeros(())
    norms: list[Tensor] = []
    for groups, tensors in parts.items():
        norm = torch.stack(torch._foreach_norm(tensors))
        for group in groups:
            gathered = [torch.empty_like(norm) for _ in range(group.size())]
            dist.all_gather(gathered, norm, group=group)
            norm = torch.cat(gathered)
        norms.append(norm)
    return torch.linalg.vector_norm(torch.cat(norms))


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """What to multiply a gradient of this norm by to make it at most `limit`; 1 if it is already, or if `limit` is 0.

    As `torch.nn.utils.clip_grad_norm_` does, with a millionth added to the norm.
    """
    return (limit / (norm + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(norm)


def _sharded_over(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    if not is_sharded(tensor):
        return ()
    assert not any(p.is_partial() for p in tensor.placements), tensor.placements
    # Not is_shard(): FSDP2 over tensor parallelism has placements of a kind of its own, which is none to that method.
    return tuple(tensor.device_mesh.get_group(i) for i, p in enumerate(tensor.placements) if not p.is_replicate())
