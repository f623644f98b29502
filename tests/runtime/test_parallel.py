"""The processes of a run and their parts; layouts over several are tested in tests/training/test_processes.py."""

import copy
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt.config import ParallelConfig
from gpt.model.config import GPTConfig
from gpt.model.loss import LinearCrossEntropy
from gpt.model.native_attention import is_native
from gpt.model.objective import NextTokenLoss
from gpt.model.transformer import GPT
from gpt.runtime.cpu import Cpu
from gpt.runtime.distributed import World, join_world, lost_the_others, waited_too_long
from gpt.runtime.parallel import checkpoint_activations

CONFIG = {"vocab_size": 50, "context_length": 16, "n_layer": 4, "n_head": 2, "d_model": 32, "dropout": 0.3}
LLAMA = GPTConfig(
    50, 16, n_layer=4, n_head=4, n_kv_head=2, d_model=64, d_ff=160, positions="rotary", norm="rmsnorm", activation="swiglu", bias=False
)
GPT2 = GPTConfig(50, 16, n_layer=4, n_head=4, d_model=64)
# In bf16 without dropout all is native that can be on this CPU.
KINDS = {"fp32": (GPTConfig(**CONFIG), torch.float32), "Llama bf16": (LLAMA, torch.bfloat16), "GPT-2 bf16": (GPT2, torch.bfloat16)}


def kept_bytes(objective: NextTokenLoss, tokens: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Bytes that the forward pass keeps for the backward pass, parameters aside; and the loss."""
    parameters = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(objective, tokens)
    return sum(kept.values()), loss


def loss_of(objective: NextTokenLoss, tokens: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    with Cpu("", objective.loss.dtype).autocast():
        return objective(tokens, tokens)


@pytest.mark.parametrize("how", ["full", "every_n", "selective"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_activations_change_nothing_but_the_memory(how, compiled, kind):
    torch.manual_seed(0)
    config, dtype = KINDS[kind]
    plain = NextTokenLoss(GPT(replace(config)), LinearCrossEntropy(dtype))
    objective = copy.deepcopy(plain)
    tokens = torch.randint(50, (8, 16))
    checkpoint_activations(list(objective.model.blocks), how, 2)
    if compiled:
        for part in (plain, objective):
            for block in part.model.blocks:
                block.compile(dynamic=False, backend="aot_eager")
    assert [name for name, _ in objective.named_parameters()] == [name for name, _ in plain.named_parameters()]
    (whole, loss), (less, same) = kept_bytes(plain, tokens), kept_bytes(objective, tokens)
    if not compiled:
        assert torch.equal(loss, same)
        # Selective checkpointing keeps what it keeps in a place of its own, out of sight of the hooks.
        assert less < {"full": 0.3, "every_n": 0.7, "selective": 0.7}[how] * whole
    loss_of(plain, tokens).backward()
    loss_of(objective, tokens).backward()
    for (name, p), q in zip(plain.named_parameters(), objective.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name, **({"atol": 1e-5, "rtol": 1e-4} if compiled else {"atol": 0, "rtol": 0}))


class _Operators(TorchDispatchMode):
    """Counts how often each operator was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("how", "times"), [("none", 1), ("full", 2), ("selective", 1)])
def test_selective_checkpointing_computes_no_attention_twice(how, times):
    objective = NextTokenLoss(GPT(replace(LLAMA)), LinearCrossEntropy(torch.bfloat16))
    checkpoint_activations(list(objective.model.blocks), how)
    tokens = torch.randint(50, (8, 16))
    with _Operators() as operators:
        loss_of(objective, tokens).backward()
    name = "gpt::causal_attention" if is_native(LLAMA.head_dim) else "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert operators.calls[name] == times * LLAMA.n_layer


@pytest.mark.parametrize("how", ["none", "full", "selective"])
def test_checkpointed_blocks_are_compiled_and_share_a_graph(how):
    torch._dynamo.reset()
    blocks = GPT(GPTConfig(**{**CONFIG, "n_layer": 12})).blocks
    checkpoint_activations(list(blocks), how)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    for block in blocks:
        block.compile(dynamic=False, fullgraph=True, backend=backend)
        block(torch.randn(2, 16, CONFIG["d_model"]))
    assert len(graphs) == 1


def test_one_process_is_a_world_of_its_own(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    world = join_world(ParallelConfig("ddp"), Cpu("CPU", torch.float32), 1)
    assert world == World()
    assert world.is_main
    assert world.share(lambda: 3) == 3
    assert world.main_first(lambda: 4) == 4
    values = torch.ones(2)
    assert world.sum_over_data(values) is values
    assert world.work_mesh is None


@pytest.mark.parametrize(
    ("message", "lost", "late"),
    [
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4321", True, False),
        ("[pair.cc:547] Read error [127.0.0.1]: Connection reset by peer", True, False),
        ("[unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete", False, True),
        ("mat1 and mat2 shapes cannot be multiplied", False, False),
    ],
)
def test_errors_that_are_about_other_processes(message, lost, late):
    error = RuntimeError(message)
    assert lost_the_others(error) is lost
    assert waited_too_long(error) is late
    assert not lost_the_others(ValueError(message))


TOTALS = """
import json, os, sys
import torch
from gpt.config import ParallelConfig
from gpt.runtime.cpu import Cpu
from gpt.runtime.distributed import join_world
for rank in range(4):
    if os.fork() == 0:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": sys.argv[1]}
        world = join_world(ParallelConfig("ddp", tensor=int(sys.argv[2])), Cpu("CPU", torch.float32), 60)
        found = world.total([2**40 + world.data_rank, 0.5, rank / 8])
        print(json.dumps([rank, found, world.least(rank + 3)]) + "\\n", end="", flush=True)
        world.leave()
        os._exit(0)
sys.exit(any(os.wait()[1] for _ in range(4)))
"""


@pytest.mark.parametrize(
    ("tensor", "parts", "eighths"),
    [(1, 4, [6, 6, 6, 6]), (2, 2, [2, 2, 2, 2]), (4, 1, [0, 1, 2, 3])],  # of tensor parallelism only the first of each part counts
)
def test_totals_count_each_part_of_the_batch_once_and_to_the_bit(tensor, parts, eighths):
    """In fp64, on whatever device: a sum of losses in fp32 would not know the last of a million tokens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    arguments = [sys.executable, "-c", TOTALS, port, str(tensor)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = sorted(map(json.loads, done.stdout.splitlines()))
    large = parts * 2**40 + parts * (parts - 1) // 2
    assert found == [[rank, [large, 0.5 * parts, eighths[rank] / 8], 3] for rank in range(4)]
