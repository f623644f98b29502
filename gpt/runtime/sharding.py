"""Tensors of which each process holds a part (DTensor): whether one is such, this process's part, and the part of a whole one.

Without a process group there are none, and torch's class is not imported, which takes a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory; all of one that is not a DTensor. Call it where gradients are off."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def part_of(whole: Tensor, like: DTensor) -> Tensor:
    """What this process holds of a tensor that is laid out as `like`, with nothing sent.

    A matrix may be split twice along the same dimension, first over the processes of tensor parallelism, the last dimension of the mesh,
    and what is left over those of FSDP: hence from the last to the first.
    """
    for dim, placement in reversed(list(enumerate(like.placements))):
        split: int | None = getattr(placement, "dim", None)  # a Shard's, strided or not
        if split is not None:
            parts = whole.chunk(like.device_mesh.size(dim), split)
            rank = like.device_mesh.get_local_rank(dim)
            whole = parts[rank] if rank < len(parts) else whole.narrow(split, 0, 0)
    return whole


def reshard(model: nn.Module) -> None:
    """Free what FSDP has gathered: after forward passes alone, the outermost parameters are whole ones still, not those that train."""
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
