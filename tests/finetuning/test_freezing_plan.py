import dataclasses

import pytest
import torch

from gpt.errors import UserError
from gpt.finetuning.config import FreezeConfig, UnfreezeConfig, block_numbers
from gpt.finetuning.freezing import plan_freezing, set_trainable, table
from gpt.finetuning.trainable import write_table
from gpt.model.config import GPTConfig
from gpt.model.loss import LinearCrossEntropy
from gpt.model.objective import NextTokenLoss
from gpt.model.transformer import GPT

SHAPE = {"vocab_size": 50, "context_length": 16, "n_layer": 4, "n_head": 2, "d_model": 16}


def gpt(**settings) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SHAPE, "tie_embeddings": False, **settings}))


def frozen(model: GPT | None = None, **keys) -> set[str]:
    """The names of what a plan freezes."""
    model = model or gpt()
    plan = plan_freezing(FreezeConfig(**keys), [], model)
    return set(plan.names) - plan.stages[0].names


def modules(names: set[str]) -> set[str]:
    return {".".join(name.split(".")[:2]) if name.startswith("blocks.") else name.partition(".")[0] for name in names}


def test_each_key_names_what_it_says():
    assert frozen() == set()
    assert modules(frozen(embeddings=True)) == {"embeddings"}
    assert modules(frozen(head=True)) == {"head"}
    assert modules(frozen(first_n_blocks=2)) == {"blocks.0", "blocks.1"}
    assert modules(frozen(only_last_n_blocks=1)) == {"embeddings", "blocks.0", "blocks.1", "blocks.2"}
    assert modules(frozen(only_last_n_blocks=0)) == {"embeddings", "blocks.0", "blocks.1", "blocks.2", "blocks.3"}
    assert frozen(patterns=["blocks.*.feedforward"]) == frozen(patterns=["blocks.*.feedforward.*"])
    assert all(".feedforward." in name for name in frozen(patterns=["blocks.*.feedforward"]))
    assert len(frozen(patterns=["blocks.*.feedforward"])) >= 4 * 2


def test_what_is_excepted_trains():
    names = frozen(patterns=["*"], except_=["*norm*", "*.bias"])
    assert names
    assert not any("norm" in name or name.endswith("bias") for name in names)
    assert frozen(gpt(norm="rmsnorm", bias=False, positions="rotary", activation="swiglu"), patterns=["*"], except_=["*norm*", "*.bias"])


def test_a_frozen_tied_embedding_must_be_meant():
    tied = gpt(tie_embeddings=True)
    with pytest.raises(UserError, match=r"freeze\.untie=true .* freeze\.head=tied"):
        frozen(tied, embeddings=True)
    assert frozen(tied, embeddings=True, head="tied") == {"embeddings.tokens.weight", "embeddings.positions.weight"}
    assert frozen(gpt(), embeddings=True, head="tied") == frozen(embeddings=True), "an untied head trains"
    assert frozen(tied, head=True) == {"embeddings.tokens.weight"}
    with pytest.raises(UserError, match=r"freeze\.patterns=head\.\* matches nothing of its own: the head shares"):
        frozen(tied, patterns=["head.*"])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"patterns": ["blocks.*.mlp.*"]}, r"mlp\.\* matches no parameter\. Did you mean blocks\.\*\.feedforward\.\*\?"),
        ({"patterns": ["transformer.wte"]}, r"Did you mean embeddings\.tokens\?"),
        ({"patterns": ["transformer.h.0.ln_1"]}, r"Did you mean blocks\.0\.attention_norm\?"),
        ({"patterns": ["model.layers.1.self_attn.q_proj"]}, r"Did you mean blocks\.1\.attention\.q\?"),
        ({"patterns": ["blocks.*.atention"]}, r"Did you mean blocks\.\*\.attention\?"),
        ({"patterns": ["zzz"]}, r"matches no parameter; there are such as embeddings\.tokens"),
        ({"patterns": ["*"], "except_": ["lm_head"]}, r"freeze\.except=lm_head matches no parameter\. Did you mean head\?"),
        ({"patterns": ["*"]}, r"leaves nothing to train"),
        ({"first_n_blocks": 5}, r"freeze\.first_n_blocks=5: there are 4 blocks, 0 to 3 \(nearest: 4\)"),
        ({"only_last_n_blocks": 9}, r"freeze\.only_last_n_blocks=9: there are 4 blocks"),
    ],
)  # fmt: skip
def test_a_slip_gets_the_nearest_right_answer(keys, said):
    with pytest.raises(UserError, match=said):
        frozen(**keys)


def test_blocks_are_named_as_in_python():
    assert block_numbers("k", "2", 4) == [2]
    assert block_numbers("k", "-1", 4) == [3]
    assert block_numbers("k", "-2:", 4) == [2, 3]
    assert block_numbers("k", ":2", 4) == [0, 1]
    assert block_numbers("k", "1:4", 4) == [1, 2, 3]
    for text, said in (
        ("4", r"k=4: there is no block 4: there are 4 blocks, 0 to 3 \(nearest: 3\)"), ("-5:", "there is no block -5"),
        ("2:9", "there is no block 9"), ("3:1", "names no block"), ("all", "must be a block"), ("1-3", "must be a block"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            block_numbers("k", text, 4)


def test_stages_begin_what_is_still_frozen():
    stages = [UnfreezeConfig(at=10, blocks="-2:"), UnfreezeConfig(at=0.5, all=True)]
    plan = plan_freezing(FreezeConfig(only_last_n_blocks=1), stages, gpt())
    assert modules(set(plan.stages[0].names)) == {"blocks.3", "final_norm", "head"}
    assert modules(set(plan.stages[1].names)) == {"blocks.2"}
    assert modules(set(plan.stages[2].names)) == {"embeddings", "blocks.0", "blocks.1"}
    assert plan.trainable(3) == frozenset(plan.names)
    assert plan.stages[1].is_due(10, 0.0)
    assert not plan.stages[1].is_due(9, 1.0)
    assert plan.stages[2].is_due(3, 0.5)
    with pytest.raises(UserError, match=r"unfreeze\[0\]: all that it names trains already"):
        plan_freezing(FreezeConfig(only_last_n_blocks=1), [UnfreezeConfig(at=3, blocks="3")], gpt())
    with pytest.raises(UserError, match=r"unfreeze\[0\]\.patterns=block\.0 matches no parameter\. Did you mean blocks\.0\?"):
        plan_freezing(FreezeConfig(only_last_n_blocks=1), [UnfreezeConfig(at=3, patterns=["block.0"])], gpt())


def test_rates_fall_block_by_block_from_the_top():
    depths = plan_freezing(FreezeConfig(), [], gpt()).depths
    assert depths["head.weight"] == depths["final_norm.weight"] == 0
    assert [depths[f"blocks.{n}.attention.q.weight"] for n in range(4)] == [4, 3, 2, 1]
    assert depths["embeddings.tokens.weight"] == 5


def test_what_is_frozen_as_a_whole_is_in_eval_mode_and_the_rest_is_not():
    model = gpt(dropout=0.5)
    plan = plan_freezing(FreezeConfig(embeddings=True, first_n_blocks=1, patterns=["blocks.2.attention"]), [], model)
    set_trainable(model, plan.stages[0].names)
    for _ in range(2):
        assert not model.embeddings.dropout.training
        assert not model.blocks[0].training
        assert not model.blocks[0].dropout.training
        assert model.blocks[1].training
        assert not model.blocks[2].attention.training
        assert model.blocks[2].training
        model.eval()
        model.train()
    set_trainable(model, frozenset(plan.names))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("depth", [0, 1, 3, 4])
def test_nothing_is_kept_for_the_backward_pass_below_the_lowest_that_trains(depth):
    model = gpt()
    set_trainable(
        model,
        frozenset(n for n, _ in model.named_parameters() if not n.startswith(("embeddings.", *(f"blocks.{i}." for i in range(depth))))),
    )
    assert model.frozen_depth == depth
    kept: list[torch.Tensor] = []
    objective, tokens = NextTokenLoss(model, LinearCrossEntropy()), torch.randint(50, (2, 16))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = objective(tokens, tokens)
    activations = sum(t.numel() for t in kept if not isinstance(t, torch.nn.Parameter) and t.dim() >= 2)
    trained = gpt()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kept.clear()
        whole = NextTokenLoss(trained, LinearCrossEntropy())(tokens, tokens)
    of_all = sum(t.numel() for t in kept if not isinstance(t, torch.nn.Parameter) and t.dim() >= 2)
    assert loss.item() == whole.item()
    assert activations < of_all * (1 - depth / 5) + 1
    loss.backward()
    whole.backward()
    gradients = {name: p.grad for name, p in trained.named_parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.equal(p.grad, gradients[name]), name
        else:
            assert p.grad is None, name


def test_operations_are_counted_by_what_is_frozen():
    model = gpt()
    whole = model.flops_per_token()
    blocks = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    attention, head = 12 * 4 * 2 * 8 * 16, 50 * 16
    assert whole == 6 * (blocks + head) + attention
    set_trainable(model, plan_freezing(FreezeConfig(embeddings=True, first_n_blocks=2), [], model).stages[0].names)
    assert model.flops_per_token() == 6 * (blocks // 2 + head) + attention // 2 + 2 * blocks // 2 + attention // 6
    assert model.flops_per_token(skipped=1.0) == 6 * (blocks // 2 + head) + attention // 2
    set_trainable(model, frozenset({"head.weight"}))
    assert model.flops_per_token() == 2 * blocks + attention // 3 + 4 * head


def test_the_table_joins_blocks_that_are_alike():
    model = gpt()
    plan = plan_freezing(
        FreezeConfig(embeddings=True, first_n_blocks=2), [UnfreezeConfig(at=100, blocks="1"), UnfreezeConfig(at=0.5, all=True)], model
    )
    rows = table(plan, model, lambda name: 0.01 if name.startswith("blocks.") else 0.002)
    assert sum(row.parameters for row in rows) == model.num_parameters()
    assert {row.module: (row.lr, row.since) for row in rows}["blocks.1"] == (0.01, 100)
    text = write_table(rows).splitlines()
    assert [line.split()[0] for line in text[1:-1]] == [
        "embeddings.tokens", "embeddings.positions", "blocks.0-0".removesuffix("-0"), "blocks.1", "blocks.2-3", "final_norm", "head",
    ]  # fmt: skip
    assert "from step 100 on" in text[4]
    assert "after 50% of the run" in text[1]
    assert "at the beginning" in text[-1]
    size = sum(p.numel() for p in model.blocks[0].parameters())
    assert f"{2 * size:,}" in text[5]


def test_the_plan_may_be_made_of_a_model_that_is_nowhere():
    with torch.device("meta"):
        away = GPT(dataclasses.replace(gpt().config))
    assert plan_freezing(FreezeConfig(first_n_blocks=1), [], away) == plan_freezing(FreezeConfig(first_n_blocks=1), [], gpt())


def test_a_module_of_which_a_part_begins_later_says_so():
    model = gpt()
    plan = plan_freezing(FreezeConfig(patterns=["blocks.0"], except_=["*norm*"]), [UnfreezeConfig(at=20, blocks="0")], model)
    row = next(row for row in table(plan, model, lambda name: 0.01) if row.module == "blocks.0")
    norms = sum(p.numel() for name, p in model.blocks[0].named_parameters() if "norm" in name)
    assert (row.first, row.trains, row.since) == (norms, row.parameters, 20)
    assert f"{sum(p.numel() for p in model.parameters()) - row.parameters + norms:,} (" in write_table(
        table(plan, model, lambda name: 0.01)
    )
