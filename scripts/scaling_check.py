"""Counts what small training runs keep in memory and send, to check the formulas of `scripts/scaling.py`.

A run is what the trainer makes of it: `lay_out`, `Step` and the optimizers, in 1, 2 or 4 processes with gloo.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import socket
import sys
import tempfile
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from gpt.config import ParallelConfig, RunConfig
from gpt.data.batches import Batch
from gpt.model.config import GPTConfig, LoRAConfig
from gpt.model.transformer import GPT
from gpt.runtime import parallel
from gpt.runtime.activations import activations, block_activations, loss_bytes
from gpt.runtime.case import FLOAT, Case, native_parts
from gpt.runtime.cpu import Cpu
from gpt.runtime.distributed import join_world
from gpt.runtime.memory import cast_weights, passes, states, update
from gpt.runtime.shapes import parameters
from gpt.runtime.sharding import local_part
from gpt.training.checkpoint import TrainingState
from gpt.training.clock import StepClock
from gpt.training.layout import lay_out
from gpt.training.optimizer import build_optimizers
from gpt.training.step import Counts, Step
from gpt.training.weight_average import WeightAverage
from scripts.scaling import ring, row, traffic


class _Counting(TorchDispatchMode):
    """Counts what is sent, as a ring sends it, and the bytes of all storages that operations have seen and that are still there."""

    def __init__(self, lasting: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.sent: dict[str, float] = defaultdict(float)
        self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage | Tensor]] = {}
        self._see(lasting)

    def _see(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                storage = tensor if tensor.is_mkldnn else held(tensor).untyped_storage()  # what is packed shows no storage
                self._storages[id(storage)] = weakref.ref(storage)

    def live(self) -> int:
        """Bytes now."""
        self._storages = {key: ref for key, ref in self._storages.items() if ref() is not None}
        there = [storage for ref in self._storages.values() if (storage := ref()) is not None]
        return sum(s.nbytes if isinstance(s, Tensor) else s.nbytes() for s in there)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = tree_leaves((args, kwargs))
        self._see([*given, *tree_leaves(result)])
        self.peak = max(self.peak, self.live())
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func._schema.name.split("::")[1], func.namespace == "c10d", args, [t for t in given if isinstance(t, Tensor)])
        return result

    def _count(self, name: str, is_plain: bool, args: Any, tensors: list[Tensor]) -> None:
        if name in ("wait_tensor", "_wrap_tensor_autograd", "barrier"):
            return
        if is_plain:
            ranks = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject)).size()
        else:
            ranks = dist.distributed_c10d._resolve_process_group(args[-1]).size()
        size = max(t.nbytes for t in tensors)
        if tensors[0].dtype == torch.float64 or name == "allgather_":
            self.sent["other"] += ring(ranks, size * (ranks if name == "allgather_" else 2))
        elif is_plain:  # DDP and FSDP; what is gathered stands among the arguments whole
            self.sent["parameters" if name == "_allgather_base_" else "gradients"] += ring(ranks, size) * (1 + (name == "allreduce_"))
        elif name == "all_reduce":
            self.sent["activations"] += 2 * ring(ranks, size)
        else:  # of DTensors, redistributed
            assert name == "all_gather_into_tensor", name
            self.sent["muon"] += ring(ranks, size * ranks)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages that tensors, or this rank's parts of them, lie in, each counted once."""
    return sum({s.data_ptr(): s.nbytes() for s in (held(t).untyped_storage() for t in tensors)}.values())


def held(tensor: Tensor) -> Tensor:
    """The plain tensor that this rank holds of one."""
    tensor = local_part(tensor.detach())
    return getattr(tensor, "elem", tensor)  # of what a collective has not finished yet


def saved_bytes(forward: Callable[[], Tensor], without: Iterable[Tensor], caches: list[Any]) -> tuple[int, Tensor]:
    """What a forward pass keeps for backward, but for the storages of some tensors; and its result.

    Args:
        forward: the pass.
        without: the tensors.
        caches: filled by the pass with those of selective checkpointing, in which products are kept.
    """
    excluded = {held(t).untyped_storage().data_ptr() for t in without}
    found: dict[int, torch.UntypedStorage] = {}  # kept: what is freed could lend its address to another

    def keep(tensor: Tensor) -> Tensor:
        storage = held(tensor).untyped_storage()
        if storage.data_ptr() not in excluded:
            found[storage.data_ptr()] = storage
        return tensor

    caches.clear()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    for value in (leaf for cache in caches for stored in cache.storage.values() for leaf in tree_leaves(stored)):
        value = getattr(value, "val", value)
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                keep(leaf)
    return sum(storage.nbytes() for storage in found.values()), result


def _cpu(case: Case) -> Cpu:
    return Cpu("", torch.bfloat16 if case.width == 2 else torch.float32)


def count(case: Case) -> dict[str, float]:
    """What a run of `case` really keeps and sends, seen from this process: the same keys as `expected`."""
    device = _cpu(case)
    name = "none" if case.ranks == 1 else "fsdp" if case.shards else "ddp"
    parallel_config = ParallelConfig(name, case.tensor, case.replicas if name == "fsdp" else 1)
    config = RunConfig(model=replace(case.model), lora=case.lora, parallel=parallel_config)
    config.train.activation_checkpointing, config.train.activation_checkpointing_n = case.checkpointing, case.every
    config.optimizer.name = case.optimizer
    world = join_world(config.parallel, device, 60)
    torch.manual_seed(0)
    if case.compiled:
        torch._dynamo.reset()  # or blocks of other cases count as the same code, compiled too often
    caches: list[Any] = []

    def contexts(*arguments: Any) -> Any:
        made = create_selective_checkpoint_contexts(*arguments)
        caches.append(made[0])
        return made

    # Compiled blocks have no such contexts, but save what they keep as anything else.
    made_by = create_selective_checkpoint_contexts if case.compiled else contexts
    with mock.patch.object(parallel, "create_selective_checkpoint_contexts", made_by):
        layout = lay_out(config, lambda: GPT(case.model, case.lora), case.compiled, world, device, case.trains)
    model, objective = layout.model, layout.objective
    optimizers = build_optimizers(config.optimizer, model, device.dtype, world.work_mesh, case.fused_adamw)
    average = WeightAverage(model, 0.9) if case.ema else None
    counts = Counts(TrainingState(), device)
    step = Step(objective, model, optimizers, average, counts, world, device, case.micro_batch, 1.0, False, StepClock(device))
    rows = torch.randint(case.model.vocab_size, (case.micro_batch * case.passes, case.length + 1))
    documents = (torch.arange(case.length) // 50).expand(len(rows), -1).contiguous() if case.documents else None
    batch = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), documents)
    step(batch)

    def forward() -> Tensor:
        with device.autocast():
            parts = (None if t is None else t[: case.micro_batch] for t in (batch.tokens, batch.targets, batch.documents))
            return objective(*parts)

    weights = list(model.parameters())
    moments = [t for o in optimizers for state in o.state.values() for key, t in state.items() if key != "step"]
    averages = [t for name, t in average.tensors().items() if name in dict(model.named_parameters())] if average is not None else []
    found: dict[str, float] = {
        "parameters": storage_bytes(weights),
        "optimizer": storage_bytes(moments),
        "average": storage_bytes(averages),
    }
    with parallel.accumulating(objective, world, last=False):
        found["kept for backward"], loss = saved_bytes(forward, weights, caches)
        loss.backward()
    del loss
    caches.clear()
    step._zero_grad()
    gc.collect()
    kept = [held(t) for t in (*weights, *moments, *averages)]
    with _Counting(kept) as counting:
        before = counting.live()
        with parallel.accumulating(objective, world, last=False):
            forward().backward()
        caches.clear()
        gc.collect()
        found["gradients between passes"] = counting.live() - before
        with parallel.accumulating(objective, world, last=True):
            forward().backward()
    gradients = [p.grad for p in weights if p.grad is not None]
    found["gradients"] = storage_bytes(gradients)
    if name == "ddp" and not world.is_divided:
        kept += [held(g) for g in gradients]  # its buckets
    del gradients
    step._zero_grad()
    whole_update = step._update

    def update_alone(nll: Tensor, units: int, targets: int, measure: bool) -> None:
        found["peak of the passes"], counting.peak = counting.peak, 0
        whole_update(nll, units, targets, measure)

    step._update = update_alone
    with _Counting(kept) as counting:
        step(batch, measure=True)
    found["peak of the update"] = counting.peak
    if case.compiled:
        del found["peak of the passes"]  # under a dispatch mode nothing runs compiled
    found |= {f"sent: {what}": size for what, size in counting.sent.items()}
    return found


def expected(case: Case) -> dict[str, float]:
    """What the formulas say of `count`'s figures."""
    all_of_them = {name: size for name, size in states(case).items() if name != "beside"}
    lasting = {name: size for name, size in all_of_them.items() if name != "packed"}  # which is so in the first pass
    casts = cast_weights(case) * (1 - case.computed_again / max(1, case.layers))
    kept = activations(case) + casts - (block_activations(case) if case.computed_again else 0)
    return {
        **lasting,
        "gradients": FLOAT * case.elements(learning=True),
        "gradients between passes": FLOAT * case.elements(learning=True) + all_of_them["packed"],
        "kept for backward": kept + loss_bytes(case),
        "peak of the passes": sum(all_of_them.values()) + sum(passes(case).values()),
        "peak of the update": sum(all_of_them.values()) + sum(update(case).values()),
        **{f"sent: {what}": size for what, size in traffic(case, all_to_all=False).items()},
    }  # fmt: skip


SMALL = {
    "GPT-2": GPTConfig(1024, 128, n_layer=4, n_head=4, d_model=256),
    "Llama": GPTConfig(
        1000, 128, n_layer=4, n_head=8, n_kv_head=4, d_model=256, d_ff=704, positions="rotary", norm="rmsnorm", activation="swiglu",
        bias=False, tie_embeddings=False,
    ),
    "Qwen3": GPTConfig(
        1000, 128, n_layer=4, n_head=8, n_kv_head=4, d_model=256, d_ff=704, positions="rotary", norm="rmsnorm", activation="swiglu",
        bias=False, qk_norm=True,
    ),
    "NeoX": GPTConfig(
        1024, 128, n_layer=4, n_head=4, d_model=256, positions="rotary", rope_fraction=0.25, activation="gelu", parallel_residual=True
    ),
    "2017": GPTConfig(1024, 128, n_layer=4, n_head=4, d_model=256, positions="sinusoidal", embedding_scale=16.0, dropout=0.1),
}  # fmt: skip


def small(name: str, **changes: Any) -> Case:
    """A case to measure: a model of a few million parameters, two passes of two sequences, with what this machine has of our C++."""
    case = replace(Case(SMALL[name], length=128, micro_batch=2, passes=2, ema=True, plain=True), **changes)
    rows, attention, products = native_parts(_cpu(case), case.model)
    return replace(case, native_rows=rows, native_attention=attention, native_products=products)


def work(rank: int, ranks: int, port: int, cases: Sequence[Case], folder: str) -> None:
    """One of several processes: measure, and leave the figures in a file."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    found = [count(case) for case in cases]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure(cases: Sequence[Case], seconds: float = 300) -> list[dict[str, float]]:
    """The figures of rank 0, for cases of the same number of ranks."""
    ranks = cases[0].ranks
    if ranks == 1:
        return [count(case) for case in cases]
    with tempfile.TemporaryDirectory() as folder, socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
        found.close()
        context = torch.multiprocessing.start_processes(work, (ranks, port, cases, folder), ranks, join=False, start_method="spawn")
        assert context is not None
        deadline = time.monotonic() + seconds
        try:
            while not context.join(timeout=1):
                assert time.monotonic() < deadline, f"not done after {seconds} seconds"
        finally:
            for process in filter(None, context.processes):
                process.kill()
                process.join()
        return json.loads((Path(folder) / "0.json").read_text())


def frozen(name: str, *beginnings: str, **changes: Any) -> Case:
    """A case to measure in which only parameters train whose names begin so."""
    model = replace(SMALL[name], tie_embeddings=False)
    trains = frozenset(p.name for p in parameters(model) if p.name.startswith(beginnings))
    return small(name, model=model, trains=trains, **changes)


def adapted(name: str, *targets: str, **changes: Any) -> Case:
    """A case to measure with adapters."""
    lora = LoRAConfig(rank=8, targets=list(targets) or LoRAConfig().targets)
    return small(name, lora=lora, trains=frozenset(p.name for p in parameters(SMALL[name], lora) if p.is_adapter), **changes)


UPPER = ("blocks.2.", "blocks.3.", "final_norm.", "head.")
ONCE = 50e3  # bytes that no formula has: rotary tables, of which there is one
EXACT = ("parameters", "optimizer", "average", "gradients")


def not_said(case: Case) -> set[str]:
    """What is not compared: without all-to-all, gloo gathers sets of matrices; under a dispatch mode nothing runs compiled."""
    found = ({"peak of the update"} if case.is_divided else set()) | ({"sent: muon"} if case.shards > 1 and case.tensor > 1 else set())
    return found | ({"peak of the passes"} if case.compiled else set())


CHECKED = {
    1: {
        "GPT-2, bf16": small("GPT-2"), "GPT-2, fp32": small("GPT-2", width=4), "GPT-2, adamw": small("GPT-2", optimizer="adamw", ema=False),
        "GPT-2, 4 chunks": small("GPT-2", micro_batch=16),
        "GPT-2, muon, AdamW in parts": small("GPT-2", fused_adamw=False),
        "GPT-2, adamw, in parts": small("GPT-2", optimizer="adamw", fused_adamw=False, ema=False),
        "Llama, bf16": small("Llama"), "Llama, fp32": small("Llama", width=4),
        "Llama, full": small("Llama", checkpointing="full"), "Llama, selective": small("Llama", checkpointing="selective"),
        "Qwen3, bf16": small("Qwen3"), "Qwen3, fp32": small("Qwen3", width=4), "Qwen3, documents": small("Qwen3", documents=True),
        "Qwen3, every 2nd": small("Qwen3", checkpointing="every_n", every=2),
        "NeoX, bf16": small("NeoX"), "NeoX, selective": small("NeoX", checkpointing="selective"),
        "2017, bf16": small("2017"), "2017, fp32": small("2017", width=4), "2017, selective": small("2017", checkpointing="selective"),
        **{f"{name}, compiled": small(name, compiled=True) for name in SMALL},
        "Qwen3, compiled, fp32": small("Qwen3", compiled=True, width=4),
        "Qwen3, compiled, full": small("Qwen3", compiled=True, checkpointing="full"),
        **{f"{name}, compiled, selective": small(name, compiled=True, checkpointing="selective") for name in ("Qwen3", "NeoX", "2017")},
        **{f"{name}, 2 blocks frozen": frozen(name, *UPPER) for name in ("GPT-2", "Llama")},
        "GPT-2, 2 blocks frozen, full": frozen("GPT-2", *UPPER, checkpointing="full"),
        "Qwen3, head only": frozen("Qwen3", "head."),
        "Qwen3, norms only": frozen("Qwen3", *(f"blocks.{n}.{x}_norm." for n in range(4) for x in ("attention", "feedforward"))),
        "GPT-2, LoRA": adapted("GPT-2"), "Qwen3, LoRA": adapted("Qwen3"), "Qwen3, LoRA, fp32": adapted("Qwen3", width=4),
        "Llama, LoRA of q and v": adapted("Llama", "q", "v"),
    },
    2: {
        "GPT-2, ddp": small("GPT-2", replicas=2), "GPT-2, fsdp": small("GPT-2", shards=2), "Llama, fsdp": small("Llama", shards=2),
        "GPT-2, fsdp, 1 pass": small("GPT-2", shards=2, passes=1),
        "GPT-2, fsdp, fp32": small("GPT-2", shards=2, width=4), "Llama, ddp, tensor 2": small("Llama", tensor=2),
        "Qwen3, ddp, tensor 2": small("Qwen3", tensor=2),
        "Llama, 2 blocks frozen, fsdp": frozen("Llama", *UPPER, shards=2),
        "Llama, LoRA, ddp": adapted("Llama", replicas=2), "Llama, LoRA, fsdp": adapted("Llama", shards=2),
        **{
            f"GPT-2 of 64 ids, fsdp, {name}": small("GPT-2", model=replace(SMALL["GPT-2"], vocab_size=64), shards=2, length=16, **changes)
            for name, changes in {"bf16": {}, "full": {"checkpointing": "full"}, "fp32": {"width": 4}}.items()
        },
    },
    4: {
        "Llama, fsdp 4": small("Llama", shards=4), "GPT-2, hybrid 2 x 2": small("GPT-2", shards=2, replicas=2),
        "GPT-2, fsdp 2, tensor 2": small("GPT-2", shards=2, tensor=2),
        "Llama, fsdp 2, tensor 2": small("Llama", shards=2, tensor=2),
    },
}  # fmt: skip


def check() -> bool:
    """Print what small runs keep and send beside the formulas, in MB; whether all is as they say, to 5 % and states exactly."""
    columns = list(expected(small("GPT-2")))
    print(row("MB, and more than the formula", "ranks", *columns))
    print(row("---", *["---:"] * (1 + len(columns))))
    as_said = True
    for ranks, cases in CHECKED.items():
        for name, case, found in zip(cases, cases.values(), measure(list(cases.values())), strict=True):
            formula, cells = expected(case), []
            for what in columns:
                if not found.get(what) and (what in not_said(case) or not formula[what]):
                    cells.append("-")
                    continue
                more = found[what] / formula[what] - 1
                near = abs(found[what] - formula[what]) < max(0.05 * formula[what], ONCE) or what in not_said(case)
                as_said &= found[what] == formula[what] if what in EXACT else near
                cells.append(f"{found[what] / 1e6:.2f}" + ("" if found[what] == formula[what] else f" {more:+.1%}"))
            print(row(name, ranks, *cells), flush=True)
    return as_said


if __name__ == "__main__":
    sys.exit(not check())
