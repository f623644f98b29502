"""Muon: momentum, made orthogonal, for the matrices inside the blocks, on one device or shared out among many.

The gradient is averaged where it lies, shard by shard. Only the step needs whole matrices: each rank gets some of them, makes them
orthogonal and hands the shards back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from gpt.runtime.sharding import is_sharded, local_part

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement

# Coefficients of the quintic Newton-Schulz iteration (Jordan et al., 2024): five steps bring every singular value of a
# matrix of Frobenius norm 1 to about 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrices with orthonormal rows (or columns), approximately.

    Args:
        matrices: (M, rows, columns), a batch of equal shapes, in the dtype to compute in; not differentiated.
        steps: Newton-Schulz iterations.

    Returns:
        (M, rows, columns) in that dtype; singular values between about 0.7 and 1.2, but for those that were almost 0.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).contiguous()
    gram = x.new_empty(*x.shape[:-1], x.shape[-2])
    polynomial, following = torch.empty_like(gram), torch.empty_like(x)
    for _ in range(steps):  # x <- a x + b (x xT) x + c (x xT)^2 x, in memory taken once
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        torch.baddbmm(x, polynomial, x, beta=a, out=following)
        x, following = following, x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al., "Muon", 2024), over matrices of equal shape at once.

    The update is scaled by 0.2 sqrt(max(rows, columns)), which gives it AdamW's root mean square (Liu et al., "Muon is
    scalable for LLM training", 2025), so learning rates and weight decay carry over between shapes and from AdamW.

    Args:
        params: matrices (2-D), or groups of them; plain tensors, equal on every rank of `mesh`, or DTensors.
        lr: peak learning rate.
        momentum: decay of the gradient average; Nesterov.
        weight_decay: decoupled, multiplied by the learning rate.
        dtype: of the Newton-Schulz iteration, and of what ranks send each other.
        mesh: the ranks that the work is divided over; None: there is one. A DTensor's mesh is some of its dimensions, by name.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.bfloat16,
        mesh: DeviceMesh | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        self.mesh = mesh

    @torch.no_grad()
    def step(self, closure: Any = None, *, scale: Tensor | None = None, apply: Tensor | None = None) -> Any:
        """Update every matrix that has a gradient, and use the gradients up: what is left in them is not to be read.

        Args:
            closure: not supported.
            scale: () fp32, what gradients are multiplied by; None: 1.
            apply: () fp32, 1 or 0; where it is 0, matrices and state stay as they are to the bit, whatever the gradients. None: 1.
        """
        assert closure is None
        for group in self.param_groups:
            buckets: dict[tuple[torch.Size, tuple[Placement, ...]], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    buckets[p.shape, self._placements(p)].append(p)
            for (shape, placements), params in buckets.items():
                self._update(params, shape, placements, group, scale, None if apply is None else apply != 0)

    def _update(
        self,
        params: list[Tensor],
        shape: torch.Size,
        placements: tuple[Placement, ...],
        group: dict[str, Any],
        scale: Tensor | None,
        applied: Tensor | None,
    ) -> None:
        weights = [local_part(p) for p in params]
        averages = [local_part(self.state[p]["momentum"]) for p in params]
        gradients = [local_part(p.grad) for p in params if p.grad is not None]
        decay: float | Tensor = 1 - group["lr"] * group["weight_decay"]
        if scale is not None:
            torch._foreach_mul_(gradients, scale)
        if applied is not None:
            # The average drawn towards itself is itself; it is finite, and so is then all that comes of it.
            for gradient, average in zip(gradients, averages, strict=True):
                torch.where(applied, gradient, average, out=gradient)
            decay = torch.where(applied, decay, 1.0)
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        torch._foreach_lerp_(gradients, averages, group["momentum"])  # Nesterov: where the average is going
        ahead = torch.empty((len(params), *weights[0].shape), dtype=self.dtype, device=weights[0].device)
        torch._foreach_copy_(list(ahead.unbind()), gradients)
        updates = self._orthogonalised(ahead, shape, placements)
        if applied is not None:
            updates = torch.where(applied, updates, 0.0)
        torch._foreach_mul_(weights, decay)
        torch._foreach_add_(weights, list(updates.to(weights[0].dtype).unbind()), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)

    def _orthogonalised(self, parts: Tensor, shape: torch.Size, placements: tuple[Placement, ...]) -> Tensor:
        """`orthogonalise` for matrices of which each rank holds a part: from and to (M, rows here, columns here)."""
        if self.mesh is None:
            return orthogonalise(parts)
        from torch.distributed.tensor import DTensor, Shard

        M, (rows, columns) = len(parts), shape
        layout = {"shape": torch.Size((M, rows, columns)), "stride": (rows * columns, columns, 1)}
        some = [Shard(0)] * self.mesh.ndim  # whole matrices, some on each rank
        mine = DTensor.from_local(parts, self.mesh, placements, **layout).redistribute(placements=some).to_local()
        done = DTensor.from_local(orthogonalise(mine).contiguous(), self.mesh, some, **layout)
        return done.redistribute(placements=placements).to_local()

    def _placements(self, p: Tensor) -> tuple[Placement, ...]:
        """How a batch of matrices like `p` lies on each of the mesh's dimensions."""
        if self.mesh is None:
            assert not is_sharded(p) or p.device_mesh.size() == 1, "a matrix on many ranks, and no mesh to divide work over"
            return ()
        from torch.distributed.tensor import Replicate

        if not is_sharded(p):
            return (Replicate(),) * self.mesh.ndim
        names, own = self.mesh.mesh_dim_names or (), p.device_mesh.mesh_dim_names or ()
        assert own, "a mesh's dimensions need names"
        assert set(own) <= set(names), f"a matrix on a mesh of {own}, and work to divide over {names}"
        placed = dict(zip(own, p.placements, strict=True))
        return tuple(_behind_batch(placed[name]) if name in placed else Replicate() for name in names)


def _behind_batch(placement: Placement) -> Placement:
    """A matrix's placement for a batch of matrices, which has one more dimension in front."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard  # what FSDP2 makes of rows that tensor parallelism has split

    if isinstance(placement, _StridedShard):
        return _StridedShard(placement.dim + 1, split_factor=placement.split_factor)
    return Shard(placement.dim + 1) if isinstance(placement, Shard) else placement
