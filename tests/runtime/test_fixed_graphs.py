"""A device that compiles slowly: what a run compiles is known before it, and nothing is compiled once it is under way.

On a CPU that is said to be one, with torch's own graphs and no compiler behind them.
"""

from __future__ import annotations

import pytest
import torch

from gpt.config import TrainConfig
from gpt.errors import UserError
from gpt.finetuning.freezing import set_trainable
from gpt.model.config import GPTConfig
from gpt.model.loss import LinearCrossEntropy
from gpt.model.objective import NextTokenLoss
from gpt.model.transformer import GPT
from gpt.runtime.compiling import FixedGraphs, compile_model, kinds_of_graphs, should_compile
from gpt.runtime.cpu import Cpu
from gpt.runtime.parallel import checkpoint_activations


class Slow(Cpu):
    fixed_graphs = True

    def compile_options(self):
        return {"backend": "eager", "dynamic": False, "fullgraph": True}

    def compile_obstacle(self):
        return None


class Quick(Slow):
    fixed_graphs = False


SLOW, QUICK = Slow("slow", torch.float32), Quick("quick", torch.float32)
HALVES = ["blocks.0.", "blocks.1."]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def doubled():
    return torch.compile(lambda x: x * 2, **SLOW.compile_options())


def test_the_first_pass_of_each_part_may_compile_and_no_later_one():
    step, graphs = doubled(), FixedGraphs(SLOW, range(2))
    for _ in range(3):
        with graphs.running("training"):
            step(torch.ones(3, 8))
    with graphs.running("evaluation"):
        step(torch.ones(4, 8))
    assert graphs.count == 2
    assert graphs.problem() is None
    with (
        pytest.raises(
            UserError, match=r"(?s)^training would compile a graph anew after its first pass.*expected .*, actual 5.*same shapes$"
        ),
        graphs.running("training"),
    ):
        step(torch.ones(5, 8))
    with graphs.running("evaluation"):
        step(torch.ones(4, 8))
    step(torch.ones(5, 8))  # outside of both nothing is forbidden
    assert graphs.count == 3
    assert graphs.problem() == "3 graphs were compiled where 2 were expected"


def test_a_pass_that_failed_has_not_been_the_first():
    step, graphs = doubled(), FixedGraphs(SLOW, range(1))
    with pytest.raises(RuntimeError, match=r"^out of memory$"), graphs.running("training"):
        raise RuntimeError("out of memory")
    with graphs.running("training"):
        step(torch.ones(3))


def test_another_error_of_a_later_pass_stays_what_it_is():
    graphs = FixedGraphs(SLOW, range(0))
    with graphs.running("training"):
        pass
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), graphs.running("training"):
        raise RuntimeError("shapes differ")


def test_a_device_that_compiles_quickly_may_always():
    step, graphs = doubled(), FixedGraphs(QUICK, range(1))
    for n in (3, 4, 5):
        with graphs.running("training"):
            step(torch.ones(n))
    assert graphs.count == 3
    assert graphs.problem() is None


def test_graphs_of_before_are_not_the_runs():
    step = doubled()
    step(torch.ones(3))
    graphs = FixedGraphs(SLOW, range(1))
    assert graphs.count == 0
    assert graphs.problem() == "0 graphs were compiled where 1 were expected"


def test_it_is_compiled_however_short_the_run_is():
    assert should_compile("auto", SLOW, flops=1.0) == (True, "compiled block by block")
    assert should_compile("auto", QUICK, flops=1.0)[0] is False
    assert should_compile(False, SLOW) == (False, "compile=false")


@pytest.mark.parametrize(
    ("frozen", "checkpointing", "graphs"),
    [
        ([], "none", 3),
        (["embeddings."], "none", 4),  # the first block is given what has no gradient
        (["embeddings.", *HALVES], "none", 5),  # frozen with nothing to learn before, as in evaluation; the first that trains; those after
        (HALVES, "none", 5),
        (["blocks.0.feedforward"], "none", 5),
        ([], "every_n", 5),
        (["embeddings."], "every_n", 6),
    ],
)  # fmt: skip
def test_as_many_graphs_are_compiled_as_are_expected(frozen, checkpointing, graphs):
    torch.manual_seed(0)
    config = TrainConfig(activation_checkpointing=checkpointing, activation_checkpointing_n=2)
    model = GPT(GPTConfig(vocab_size=50, context_length=16, n_layer=4, n_head=2, d_model=32))
    set_trainable(model, frozenset(name for name, _ in model.named_parameters() if not name.startswith(tuple(frozen))))
    expected = kinds_of_graphs(model, config)
    assert len(expected) == graphs
    loss = LinearCrossEntropy(chunk=32)
    checkpoint_activations(list(model.blocks), checkpointing, 2)
    compile_model(model, loss, SLOW)
    objective, watched = NextTokenLoss(model, loss), FixedGraphs(SLOW, expected)
    tokens = torch.randint(50, (4, 16))
    for _ in range(2):
        with watched.running("training"):
            objective(tokens, tokens).backward()
        with watched.running("evaluation"), torch.no_grad():
            model.eval()
            objective(tokens, tokens)
            model.train()
    assert watched.problem() is None
