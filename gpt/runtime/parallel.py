"""How a model is laid out over devices: activation checkpointing, compilation, tensor parallelism, FSDP2 and DDP, in that order.

Everything is done in place and block by block, so that parameters keep their names. Gradients come out as sums over all processes, never as
means: what they are divided by is the trainer's business.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gpt.model.lora import adapted
from gpt.model.objective import NextTokenLoss
from gpt.model.transformer import GPT
from gpt.runtime.distributed import World
from gpt.runtime.sharding import is_sharded, local_part, part_of

if TYPE_CHECKING:  # takes a second, which a run in one process need not spend
    from torch.distributed.fsdp import FSDPModule

# Kept by selective activation checkpointing: what takes long to compute for the memory it needs.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.gpt.causal_attention.default,
    torch.ops.gpt.linears.default,
    torch.ops.gpt.gelu_feedforward.default,
}
_COLUMNS = ("attention.q", "attention.k", "attention.v", "feedforward.up", "feedforward.gate")
_ROWS = ("attention.out", "feedforward.down")


def checkpoint_activations(blocks: Sequence[nn.Module], how: Literal["none", "full", "every_n", "selective"], n: int = 1) -> None:
    """Have blocks compute activations again in the backward pass (Chen et al., "Training deep nets with sublinear memory cost", 2016).

    Args:
        blocks: the model's.
        how: full: all; every_n: each n-th; selective: all, but the results of matrix products and attention are kept.
        n: of every_n.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)  # warns of in-place operations, which blocks have none of
    for number, block in enumerate(blocks):
        if computes_again(how, n, number):
            block.forward = _checkpointed(block.forward, options)


def computes_again(how: Literal["none", "full", "every_n", "selective"], n: int, number: int) -> bool:
    """Whether `checkpoint_activations` changes the block of this number."""
    return how in ("full", "selective") or (how == "every_n" and number % n == 0)


def _checkpointed(forward: Callable[..., Tensor], options: dict[str, Any]) -> Callable[..., Tensor]:
    def checkpointed_forward(*args: Any) -> Tensor:  # a function of ours, for torch.compile traces no `partial` of torch's as a whole graph
        return checkpoint(forward, *args, **options)

    return checkpointed_forward


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def split_matrices(model: GPT, world: World) -> None:
    """Tensor parallelism (Shoeybi et al., "Megatron-LM", 2019): heads and feed-forward units divided, activations whole between them."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    assert world.mesh is not None
    plan: dict[str, Any] = {**{name: ColwiseParallel() for name in _COLUMNS}, **{name: RowwiseParallel() for name in _ROWS}}
    mesh = world.mesh["tensor"]  # the same object for all, or each block would be compiled anew
    for block in model.blocks:
        present = {name: style for name, style in plan.items() if _submodule(block, name) is not None}
        parallelize_module(block, mesh, present)


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        module = getattr(module, part)
        if module is None:
            return None
    return module


def spread(objective: NextTokenLoss, world: World) -> nn.Module:
    """The module to call for a loss, whose gradients are sums over all processes.

    Args:
        objective: on its device for ddp; its model for fsdp still on meta (`place`), already split, checkpointed and compiled.
        world: the processes.
    """
    if world.size == 1:
        return objective
    if not world.is_divided:
        options: dict[str, Any] = {"gradient_as_bucket_view": True}
        known = inspect.signature(DistributedDataParallel).parameters  # torch 2.13 has another name for it
        options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False  # tables, the same everywhere
        wrapped = DistributedDataParallel(objective, **options)
        wrapped.register_comm_hook(None, lambda state, bucket: _summed(bucket.buffer()))
        return wrapped
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # A block's matrices are gathered in the dtype that they are multiplied in. Norms and DoRA's magnitudes, small and of fp32, stay whole.
    dtype = None if objective.loss.dtype == torch.float32 else objective.loss.dtype
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    norms = {p for name, p in objective.model.blocks.named_parameters() if "norm." in name or name.endswith(".magnitude")}
    # ddp with tensor parallelism is a sharding over one process, repeated
    assert world.mesh is not None
    mesh = world.mesh["replicate", "shard"] if world.mesh["replicate"].size() > 1 else world.mesh["shard"]
    for layer in adapted(objective.model).values():
        layer.keeps_sum = False
    modules: list[nn.Module] = [*objective.model.blocks, objective]
    for module in modules:
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy() if module is objective else narrow, ignored_params=norms)
    for module in cast("list[FSDPModule]", modules):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # which is all that gloo can
    return objective


def spread_anew(objective: nn.Module, world: World) -> nn.Module:
    """`spread` for a module that has been spread, after other parameters of it train: DDP knows those of its beginning alone.

    FSDP sees by itself what trains, but for the dtype of the gradients of a block of which nothing did, which it settles at the first pass.
    """
    if isinstance(objective, DistributedDataParallel):
        return spread(objective.module, world)
    if world.is_divided:
        for module in objective.modules():
            if hasattr(module, "_get_fsdp_state"):
                state = cast(Any, module)._get_fsdp_state()
                for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:  # before torch 2.13 there was one
                    group._init_mp_dtypes()
    return objective


def _summed(buffer: Tensor) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(buffer, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


def unwrapped(objective: nn.Module) -> nn.Module:
    """What DDP has surrounded: calling it sends nothing."""
    return objective.module if isinstance(objective, DistributedDataParallel) else objective


def accumulating(module: nn.Module, world: World, last: bool) -> AbstractContextManager[Any]:
    """Around forward and backward of a micro-batch: only the last one's backward sends gradients to the copies of a parameter.

    FSDP divides them in every pass, for else each process would keep whole ones until the last.
    """
    if isinstance(module, DistributedDataParallel):
        return contextlib.nullcontext() if last else module.no_sync()
    if world.size > 1:
        cast("FSDPModule", module).set_requires_all_reduce(last)
    return contextlib.nullcontext()


def place_weights(model: nn.Module, source: nn.Module | None) -> None:
    """Give a model that is spread over processes the weights of a whole one.

    Args:
        model: allocated, in every process.
        source: whole, in the main process; None in the others.
    """
    whole = dict(source.named_parameters()) if source is not None else {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            given = whole[name].detach().to(p.device) if source is not None else torch.empty(p.shape, dtype=p.dtype, device=p.device)
            dist.broadcast(given, src=0)
            local_part(p).copy_(part_of(given, p) if is_sharded(p) else given)


def sum_partial_gradients(model: GPT, world: World) -> None:
    """Where parameters are divided, add up the gradients of those that are not, the blocks' vectors, over the processes that share a batch.

    Under tensor parallelism, the norms of queries and keys see only this process's heads: theirs are added up over all processes.
    """
    if not world.is_divided or world.mesh is None:
        return
    for group, ends in ((world.data_group, ""), (world.mesh["tensor"].get_group(), ("q_norm.weight", "k_norm.weight"))):
        found = [p.grad for name, p in model.named_parameters() if not is_sharded(p) and p.grad is not None and name.endswith(ends)]
        if found and dist.get_world_size(group) > 1:
            together = torch.cat([gradient.flatten() for gradient in found])
            dist.all_reduce(together, group=group)
            parts = together.split([gradient.numel() for gradient in found])
            torch._foreach_copy_(found, [part.view_as(gradient) for part, gradient in zip(parts, found, strict=True)])
