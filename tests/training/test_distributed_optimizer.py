"""Twenty steps of a tiny GPT by 2 and 4 processes, in every layout, against the same steps by one process."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from gpt import GPT, GPTConfig
from gpt.config import OptimizerConfig
from gpt.runtime.sharding import local_part
from gpt.training.gradients import clip_factor, gradient_norm
from gpt.training.optimizer import build_optimizers, set_learning_rate
from gpt.training.weight_average import WeightAverage

STEPS, NAN_STEP, EVAL_STEP, REBUILD_STEP = 20, 5, 10, 13
ROWS, LENGTH = 8, 12
# Layouts by number of processes: the mesh's dimensions and their sizes. What `data` divides is copied, `shard` is sharded out.
LAYOUTS = {
    2: [{"data": 2}, {"shard": 2}, {"tensor": 2}],
    4: [{"data": 4}, {"shard": 4}, {"data": 2, "shard": 2}, {"data": 2, "tensor": 2}, {"shard": 2, "tensor": 2}],
}


@dataclass
class Outcome:
    """What a run ends with, whole."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    averages: dict[str, Tensor] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    evaluated: float = 0.0


def tiny() -> GPT:
    """No number of rows or of matrices is a multiple of four; blocks.0.attention.q is frozen."""
    torch.manual_seed(0)
    shape = {"vocab_size": 33, "context_length": LENGTH, "n_layer": 2, "n_head": 2, "d_model": 28, "d_ff": 42}
    model = GPT(GPTConfig(**shape, positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, qk_norm=True))
    model.blocks[0].get_submodule("attention.q").requires_grad_(False)
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The same for any number of processes; later rows have ever fewer targets."""
    random = torch.Generator().manual_seed(step)
    tokens = torch.randint(33, (ROWS, LENGTH + 1), generator=random)
    targets = tokens[:, 1:].clone()
    for row in range(ROWS):
        targets[row, : row + step % 3] = -100
    return tokens[:, :-1], targets


def lay_out(model: GPT, mesh: DeviceMesh) -> None:
    names = mesh.mesh_dim_names or ()
    if "tensor" in names:
        columns = ("attention.q", "attention.k", "attention.v", "feedforward.up", "feedforward.gate")
        plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in columns}
        plan |= {name: RowwiseParallel() for name in ("attention.out", "feedforward.down")}
        for block in model.blocks:
            parallelize_module(block, mesh["tensor"], plan)
    if "shard" in names:
        over = mesh["data", "shard"] if "data" in names else mesh["shard"]
        for module in (*model.blocks, model):
            sharded = fully_shard(module, mesh=over)
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)  # gloo can add up, but not scale as it does


def sum_gradients(model: GPT, mesh: DeviceMesh) -> None:
    """What fully_shard does not add up by itself."""
    names = mesh.mesh_dim_names or ()
    for name, p in model.named_parameters():
        if p.grad is not None:
            if "data" in names and "shard" not in names:
                dist.all_reduce(local_part(p.grad), group=mesh.get_group("data"))
            if "tensor" in names and name.endswith(("q_norm.weight", "k_norm.weight")):
                dist.all_reduce(local_part(p.grad), group=mesh.get_group("tensor"))


def train(mesh: DeviceMesh | None) -> Outcome:
    model = tiny()
    groups, place = 1, 0  # into how many the batch is divided, and which is this process's
    if mesh is not None:
        lay_out(model, mesh)
        for name in mesh.mesh_dim_names or ():
            if name != "tensor":
                groups, place = groups * mesh[name].size(), place * mesh[name].size() + mesh.get_local_rank(name)
    mine = slice(place * ROWS // groups, (place + 1) * ROWS // groups)
    config = OptimizerConfig(eps=1e-6)  # or AdamW would blow up what is nothing but rounding
    optimizers = build_optimizers(config, model, torch.float32, mesh)
    average = WeightAverage(model, 0.9)
    outcome = Outcome()

    def loss(step: int) -> Tensor:
        tokens, targets = batch(step)
        return F.cross_entropy(model(tokens[mine]).flatten(0, 1), targets[mine].flatten(), reduction="sum")

    for step in range(STEPS):
        total = loss(step)
        if step == NAN_STEP and place == 0:
            total = total * float("nan")
        total.backward()
        if mesh is not None:
            sum_gradients(model, mesh)
        valid = (batch(step)[1] != -100).sum()
        norm = gradient_norm(model.parameters()) / valid
        outcome.norms.append(norm.item())
        apply = norm.isfinite().float()
        set_learning_rate(optimizers, 1 - step / STEPS)
        for optimizer in optimizers:
            optimizer.step(scale=clip_factor(norm, 0.5) / valid, apply=apply)
            optimizer.zero_grad()
        average.update(apply)
        if step == EVAL_STEP:
            with torch.no_grad(), average.swapped():
                outcome.evaluated = summed(loss(STEPS), mesh)
        if step == REBUILD_STEP and mesh is not None:  # what a checkpoint holds is all there is
            old, optimizers = optimizers, build_optimizers(config, model, torch.float32, mesh)
            for before, after in zip(old, optimizers, strict=True):
                for p, state in before.state.items():
                    assert all(type(s) is type(p.data) for key, s in state.items() if key != "step"), "laid out like its parameter"
                    after.state[p] = {key: s.clone() for key, s in state.items()}
    outcome.weights = {name: whole(p) for name, p in model.named_parameters()}
    outcome.averages = {name: whole(t) for name, t in average.tensors().items()}
    return outcome


def summed(loss: Tensor, mesh: DeviceMesh | None) -> float:
    for name in mesh.mesh_dim_names or () if mesh is not None else ():
        if name != "tensor":
            assert mesh is not None
            dist.all_reduce(loss, group=mesh.get_group(name))
    return loss.item()


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def gradient_norms(n: int) -> list[tuple[float, float]]:
    """Ours and torch's, of sharded and plain gradients on a mesh of two dimensions."""
    found = []
    for names in ("data", "shard"), ("data", "tensor"), ("shard", "tensor"):
        model = tiny()
        mesh = init_device_mesh("cpu", (2, n // 2), mesh_dim_names=names)
        lay_out(model, mesh)
        for p in model.parameters():
            p.grad = p.detach() * 3
        wholes = [whole(p.grad) for p in model.parameters() if p.grad is not None]
        found.append((gradient_norm(model.parameters()).item(), nn.utils.get_total_norm(wholes).item()))
    return found


def work(rank: int, n: int, folder: Path) -> None:
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # which notes that gloo has no all-to-all
    dist.init_process_group("gloo", f"file://{folder / 'meet'}", timedelta(seconds=60), n, rank)
    outcomes = []
    for layout in LAYOUTS[n]:
        mesh = init_device_mesh("cpu", tuple(layout.values()), mesh_dim_names=tuple(layout))
        outcomes.append(train(mesh))
        norms: list[list[float]] = [[]] * n
        dist.all_gather_object(norms, outcomes[-1].norms)
        assert all(repr(other) == repr(norms[0]) for other in norms), "the same bits on every rank"
    result = {"outcomes": outcomes, "norms": gradient_norms(n)}
    if rank == 0:
        torch.save(result, folder / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(worker: Callable[..., None], n: int, folder: Path, seconds: float = 90) -> None:
    """n processes; those that are left after so many seconds are ended."""
    multiprocessing.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"])  # once for all
    context = torch.multiprocessing.start_processes(worker, (n, folder), nprocs=n, join=False, start_method="forkserver")
    assert context is not None
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"not done after {seconds} seconds"
    finally:
        for process in context.processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def alone() -> Outcome:
    return train(None)


@pytest.mark.parametrize("n", LAYOUTS)
def test_any_number_of_processes_computes_what_one_does(n, alone, tmp_path):
    run(work, n, tmp_path)
    result = torch.load(tmp_path / "result.pt", weights_only=False)
    assert len(result["outcomes"]) == len(LAYOUTS[n])
    for layout, outcome in zip(LAYOUTS[n], result["outcomes"], strict=True):
        assert outcome.norms == pytest.approx(alone.norms, rel=1e-5, nan_ok=True), layout
        assert outcome.evaluated == pytest.approx(alone.evaluated, rel=1e-6), layout
        for kind, ours, theirs in (("weight", outcome.weights, alone.weights), ("average", outcome.averages, alone.averages)):
            for name, value in theirs.items():
                difference = (ours[name] - value).abs().max().item()
                assert difference <= 1e-5, f"{kind} of {name} under {layout} differs by {difference:g}"
    for ours, torchs in result["norms"]:
        assert ours == pytest.approx(torchs, rel=1e-6)


def test_one_process_learns_and_leaves_one_step_out(alone):
    assert [n != n for n in alone.norms] == [step == NAN_STEP for step in range(STEPS)]
    assert alone.averages["updates"] == STEPS - 1
    start = tiny()
    moved = {name: (alone.weights[name] - p).abs().max().item() for name, p in start.named_parameters()}
    assert [name for name, most in moved.items() if most == 0] == ["blocks.0.attention.q.weight"]
    assert min(most for most in moved.values() if most) > 1e-2  # a thousand times what layouts may differ by
