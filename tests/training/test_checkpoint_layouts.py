"""Checkpoints of processes that share a model in every way, on the CPU.

A checkpoint of one process is handed from layout to layout; each loads it, and saves what it then has. Run as a program, this file is
all of those processes: `test_checkpoint_layouts.py <folder>`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_models import EVERYTHING, learn, optimizers_of, save, tiny_model
from safetensors.torch import load_file

from gpt.model.transformer import GPT
from gpt.training import checkpoint_writer
from gpt.training.checkpoint import COMPLETE, TrainingState, load_checkpoint, load_weights, model_tensors, optimizer_tensors
from gpt.training.checkpoint_writer import CheckpointWriter

ROOT = Path(__file__).parents[2]
TENSOR_PLAN = {"attention.q": 0, "attention.k": 0, "attention.v": 0, "attention.out": 1, "feedforward.up": 0, "feedforward.down": 1}
CHAIN = [("fsdp", 4), ("ddp", 2), ("tensor", 4), ("none", 1), ("fsdp+tensor", 4), ("fsdp", 2), ("hybrid", 4), ("tensor", 2)]
"""Layout and number of processes, each going on from the one before."""
KINDS = {
    "muon, tied": {"optimizer": "muon", "tied": True, "frozen": False, "ema": True},
    "adamw, untied, frozen": {"optimizer": "adamw", "tied": False, "frozen": True, "ema": False},
}


def shape(layout: str, world: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Of the mesh."""
    return {"fsdp+tensor": ((world // 2, 2), ("data", "tensor")), "hybrid": ((world // 2, 2), ("replicate", "shard"))}.get(
        layout, ((world,), (layout,))
    )


def lay_out(model: GPT, layout: str, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.nn.parallel import DistributedDataParallel

    if layout == "ddp":
        DistributedDataParallel(model)
    if layout in ("ddp", "none"):
        return
    sizes, names = shape(layout, world)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    if "tensor" in names:
        plan: dict[str, Any] = {name: RowwiseParallel() if dim else ColwiseParallel() for name, dim in TENSOR_PLAN.items()}
        for block in model.blocks:
            parallelize_module(block, mesh["tensor"], plan)
    if layout != "tensor":
        rest = mesh["data"] if layout == "fsdp+tensor" else mesh
        for block in model.blocks:
            fully_shard(block, mesh=rest)
        fully_shard(model, mesh=rest)


def hand_on(rank: int, world: int, layout: str, kind: dict[str, Any], source: Path, target: Path) -> None:
    """Load a checkpoint into a layout, compare all with what safetensors reads, save it, and save once more after a step."""
    model = tiny_model(rank + 100, kind["tied"], kind["frozen"])
    names = list(model_tensors(model))
    lay_out(model, layout, world)
    sharded = [name for name, t in model_tensors(model).items() if hasattr(t, "full_tensor")]
    assert bool(sharded) == (layout not in ("ddp", "none"))
    optimizers = optimizers_of(model, kind["optimizer"])
    ema = {name: torch.zeros_like(t) for name, t in model_tensors(model).items()} if kind["ema"] else None
    if layout in ("fsdp", "hybrid"):  # leaves the outermost parameters gathered
        with torch.no_grad():
            model(torch.zeros(1, 4, dtype=torch.int64))
    state = load_checkpoint(source, model, optimizers, ema)
    assert list(model_tensors(model)) == names
    stored = optimizer_tensors(model, optimizers)
    for name, tensor in stored.items():
        p = model.get_parameter(name.partition("|")[0])
        assert hasattr(tensor, "full_tensor") == (hasattr(p, "full_tensor") and tensor.shape == p.shape), name
    for file, tensors in (("model", model_tensors(model)), ("optimizer/state", stored), ("ema", ema)):
        if tensors is not None:
            expected = load_file(source / f"{file}.safetensors")
            assert expected.keys() == tensors.keys()
            for name, tensor in tensors.items():
                whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]
                assert torch.equal(whole, expected[name]), name
    if layout in ("fsdp", "hybrid"):
        with torch.no_grad():
            model(torch.zeros(1, 4, dtype=torch.int64))

    changed, write = threading.Event(), checkpoint_writer.write_checkpoint
    checkpoint_writer.write_checkpoint = lambda *arguments: changed.wait(60) and write(*arguments)  # type: ignore[assignment]
    writer = CheckpointWriter(target, EVERYTHING, is_writer=rank == 0)
    writer.save(model, optimizers, state, {"kind": "text"}, ema)
    with torch.no_grad():  # what happens to the weights now must not reach the file, on whichever rank
        for tensor in (*model_tensors(model).values(), *optimizer_tensors(model, optimizers).values(), *(ema or {}).values()):
            tensor.zero_()
    state.tokens = -1
    changed.set()
    writer.wait()
    checkpoint_writer.write_checkpoint = write
    assert (writer.saved is not None) == (rank == 0)

    if kind["optimizer"] == "adamw":  # state as a real optimizer makes it in this layout, from nothing
        model = tiny_model(7, kind["tied"], kind["frozen"])
        lay_out(model, layout, world)
        load_weights(source, model)
        optimizers = optimizers_of(model, kind["optimizer"])
        learn_in_parts(model, optimizers)
        writer.save(model, optimizers, TrainingState(step=2))
        writer.wait()


def learn_in_parts(model: GPT, optimizers: list[torch.optim.Optimizer]) -> None:
    """`learn`, with the gradients cut as the parameters are."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        gradient = torch.randn(p.shape, generator=generator)
        if p.requires_grad:
            p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if isinstance(p, DTensor) else gradient
    for optimizer in optimizers:
        groups = list(optimizer.param_groups)
        optimizer.param_groups.clear()
        for group in groups:  # the fused AdamW takes tensors of one layout at a time
            for mesh in {getattr(p, "device_mesh", None) for p in group["params"]}:
                params = [p for p in group["params"] if getattr(p, "device_mesh", None) == mesh]
                optimizer.param_groups.append({**group, "params": params})
        optimizer.step()


def run_process(rank: int, folder: Path) -> None:
    for number, (layout, world, kind, source, target) in enumerate(json.loads((folder / "work.json").read_text())):
        if rank < world:
            store = dist.FileStore(str(folder / f"store-{number}"), world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
            hand_on(rank, world, layout, KINDS[kind], Path(source), Path(target))
            dist.barrier()
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def handed_on(tmp_path_factory) -> dict[tuple[str, int], Path]:
    """(kind, place in the chain, from 0 for the one process that begins) -> the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("layouts")
    found, work = {}, []
    for number, (name, kind) in enumerate(KINDS.items()):
        model = tiny_model(0, kind["tied"], kind["frozen"])
        optimizers = optimizers_of(model, kind["optimizer"])
        learn(model, optimizers)
        ema = {key: t * 0.5 for key, t in model_tensors(model).items()} if kind["ema"] else None
        found[name, 0] = folder / f"{number}-0"
        save(found[name, 0], model, optimizers, TrainingState(step=1, tokens=64), ema)
        for place, (layout, world) in enumerate(CHAIN, start=1):
            found[name, place] = folder / f"{number}-{place}"
            source = found[name, place - 1] / "step-00000001"
            work.append((layout, world, name, str(source), str(found[name, place])))
    (folder / "work.json").write_text(json.dumps(work))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(folder)]
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, (folder / "output").read_text()
    return found


@pytest.mark.parametrize("place", range(1, len(CHAIN) + 1))
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_hands_on_what_it_was_given_bit_for_bit(handed_on, kind, place):
    given, got = (handed_on[kind, each] / "step-00000001" / COMPLETE for each in (0, place))
    assert json.loads(got.read_text()) == json.loads(given.read_text())
    assert len(json.loads(got.read_text())) == 4 + KINDS[kind]["ema"]


@pytest.mark.parametrize("place", range(1, len(CHAIN) + 1))
def test_state_that_an_optimizer_made_in_a_layout_is_that_of_one_process(handed_on, place):
    name = "adamw, untied, frozen"
    model = tiny_model(7, tied=False, frozen=True)
    load_weights(handed_on[name, 0] / "step-00000001", model)
    optimizers = optimizers_of(model, "adamw")
    learn(model, optimizers)
    path = handed_on[name, place] / "step-00000002"
    for file, tensors in (("model", model_tensors(model)), ("optimizer/state", optimizer_tensors(model, optimizers))):
        stored = load_file(path / f"{file}.safetensors")
        assert stored.keys() == tensors.keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(stored[key], tensor, atol=1e-7, rtol=1e-6, msg=key)


if __name__ == "__main__":
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel  # all before forking, once
    from torch.multiprocessing import start_processes

    start_processes(run_process, (Path(sys.argv[1]),), nprocs=4, start_method="fork")
