"""Frozen blocks with packed weights compute what the blocks compute, in bf16 on a CPU."""

from __future__ import annotations

import copy
import gc
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gpt.finetuning.freezing import set_trainable
from gpt.model.config import GPTConfig, LoRAConfig
from gpt.model.lora import attach_as
from gpt.model.transformer import GPT
from gpt.runtime.cpu import Cpu
from gpt.training.packed_prefix import PackedPrefix, packs_prefix

pytestmark = pytest.mark.skipif(not packs_prefix(Cpu("", torch.bfloat16)), reason="this CPU packs no bf16, or there is no compiler")
LLAMA = {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "bias": False}
SHAPES = {
    "gpt2": {},
    "llama": LLAMA | {"n_kv_head": 2},
    "qwen3": LLAMA | {"qk_norm": True, "tie_embeddings": False},
    "neox": {"positions": "rotary", "rope_fraction": 0.5, "parallel_residual": True, "activation": "gelu", "tie_embeddings": False},
}


def frozen_model(shape: str, frozen: int = 2) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=97, context_length=32, n_layer=3, n_head=4, d_model=64, **SHAPES[shape]))
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.5 if p.dim() == 1 else 0.0, 0.2)
    set_trainable(model, frozenset(n for n, _ in model.named_parameters() if n.startswith(tuple(f"blocks.{b}." for b in range(frozen, 3)))))
    assert model.frozen_depth == frozen
    return model


def states(model: GPT, *arguments: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model.frozen_states(*arguments)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("documents", [False, True])
def test_it_computes_what_the_blocks_compute(shape, documents, tmp_path):
    model = frozen_model(shape)
    tokens = torch.randint(97, (3, 20))
    arguments = (tokens, torch.arange(20).expand(3, 20) // 7) if documents else (tokens,)
    exact = model.frozen_states(*arguments).double()
    plain = states(model, *arguments)
    model.frozen_blocks = PackedPrefix(model, tmp_path)
    packed = states(model, *arguments)
    assert packed.dtype == plain.dtype == torch.float32
    assert not torch.equal(packed, plain), "it is another computation"
    errors = [((x.double() - exact).norm() / exact.norm()).item() for x in (packed, plain)]
    assert errors[0] < max(1.3 * errors[1], 1e-3)
    assert torch.equal(states(model, *arguments), packed), "nothing of it was changed in place"


def test_it_holds_bf16_and_shares_the_norms(tmp_path):
    model = frozen_model("llama")
    blocks = PackedPrefix(model, tmp_path)()
    assert len(blocks) == 2
    assert blocks[0].attention_norm is model.blocks[0].attention_norm
    weights = [m.packed for block in blocks for m in block.modules() if hasattr(m, "packed")]
    assert len(weights) == 2 * 5
    assert {w.dtype for w in weights} == {torch.bfloat16}
    assert not any(isinstance(m, nn.Linear) for block in blocks for m in block.modules())


def test_other_weights_are_packed_anew_and_the_same_ones_are_not(tmp_path):
    model = frozen_model("gpt2")
    prefix = PackedPrefix(model, tmp_path)
    first = list(prefix())
    assert [a is b for a, b in zip(first, prefix(), strict=True)] == [True, True]
    model.frozen_blocks, tokens = prefix, torch.randint(97, (2, 9))
    before = states(model, tokens)
    model.load_state_dict({name: t * 1.5 for name, t in copy.deepcopy(model.state_dict()).items()})
    assert not torch.allclose(states(model, tokens), before)
    assert prefix()[0] is not first[0]
    set_trainable(model, frozenset(n for n, _ in model.named_parameters() if n.startswith("blocks.1.")))
    assert len(prefix()) == model.frozen_depth == 1


def test_a_block_with_adapters_stands_for_itself(tmp_path):
    model = frozen_model("gpt2")
    attach_as(model, LoRAConfig(rank=2, targets=["attention.q"]))
    set_trainable(model, frozenset(n for n, _ in model.named_parameters() if n.startswith("blocks.2.")))
    assert all(a is b for a, b in zip(PackedPrefix(model, tmp_path)(), model.blocks, strict=False))


def test_only_a_cpu_in_bf16_packs():
    assert not packs_prefix(Cpu("", torch.float32))


def mapped_at(folder) -> list[range]:
    """Where files of a folder, also such as have no name any more, are mapped."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    return [range(*(int(end, 16) for end in line[0].split("-"))) for line in lines if len(line) == 6 and line[5].startswith(str(folder))]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_matrices_that_it_stands_for_lie_in_a_file_and_are_what_they_were(tmp_path):
    model = frozen_model("llama")
    before = copy.deepcopy(model.state_dict())
    PackedPrefix(model, tmp_path / "made")()
    assert not list((tmp_path / "made").iterdir()), "the file has no name"
    places = mapped_at(tmp_path)
    inside = {name for name, p in model.named_parameters() if any(p.data_ptr() in place for place in places)}
    assert inside == {name for name in before if name.startswith(("blocks.0.", "blocks.1.")) and "norm" not in name}
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    weight, other = (model.get_parameter(f"blocks.0.attention.{name}.weight") for name in "qk")
    with torch.no_grad():
        weight.add_(1)  # as when it trains later on
    assert torch.equal(weight, before["blocks.0.attention.q.weight"] + 1)
    assert torch.equal(other, before["blocks.0.attention.k.weight"])
    del model, weight, other
    gc.collect()
    assert not mapped_at(tmp_path)


def test_where_no_file_can_be_written_they_stay(tmp_path):
    (tmp_path / "file").write_text("")
    model = frozen_model("gpt2")
    places = [p.data_ptr() for p in model.parameters()]
    with pytest.warns(UserWarning, match="weights of frozen blocks stay in memory: .* cannot be written"):
        assert len(PackedPrefix(model, tmp_path / "file" / "below")()) == 2
    assert places == [p.data_ptr() for p in model.parameters()]
