"""Adapters in the model: what they compute, what trains, what is merged, and which targets there are."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from adapters import with_adapters
from stock_models import OURS, SMALL, load_stock, logits, make_ours, tokens_for

from gpt import GPT, GPTConfig
from gpt.model.config import LoRAConfig
from gpt.model.lora import LoRALinear, adapted, adapter_parameters, base, merge, merged, without_adapters

ALL = LoRAConfig(rank=3, alpha=5)
DORA = LoRAConfig(rank=3, alpha=5, dora=True)
TOKENS = tokens_for(61, 16)


def layer(dora: bool = False, dropout: float = 0.0, bias: bool = True) -> LoRALinear:
    torch.manual_seed(0)
    made = LoRALinear(torch.nn.Linear(12, 20, bias=bias), 4, 1.5, dropout, dora)
    made.init_adapter()
    with torch.no_grad():
        made.lora_b.normal_()
        if made.magnitude is not None:
            made.magnitude.mul_(1.3)
    return made


def by_the_paper(made: LoRALinear, x: torch.Tensor) -> torch.Tensor:
    """Written out product by product."""
    change = made.scale * F.linear(F.linear(x, made.lora_a), made.lora_b)
    if made.magnitude is None:
        return F.linear(x, made.weight, made.bias) + change
    length = (made.weight + made.scale * made.lora_b @ made.lora_a).detach().norm(dim=1)
    y = made.magnitude / length * (F.linear(x, made.weight) + change)
    return y if made.bias is None else y + made.bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dora", [False, True])
def test_outputs_and_gradients_are_those_of_the_formula(dora, bias):
    ours, theirs = layer(dora, bias=bias), layer(dora, bias=bias)  # W and b train here too
    x = torch.randn(2, 5, 12)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(ours_x), by_the_paper(theirs, theirs_x)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours_x.grad, theirs_x.grad)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if not (dora and name == "weight"):  # DoRA takes the length of W + BA for a constant only towards B and A; W is frozen in use
            torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_the_sum_may_be_formed_again_for_the_backward_pass():
    kept, freed, x = layer(), layer(), torch.randn(3, 12)
    freed.keeps_sum = False
    gradients = []
    for made in (kept, freed):
        given = x.clone().requires_grad_()
        made(given).square().sum().backward()
        gradients.append([given.grad, *(p.grad for p in made.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_adapters_can_be_switched_off_for_a_while():
    model = with_adapters("qwen3", DORA)
    on = logits(model, TOKENS)
    with without_adapters(model):
        assert torch.equal(logits(model, TOKENS), logits(base(model), TOKENS))
    assert torch.equal(logits(model, TOKENS), on)


def test_what_does_not_train_gets_no_gradient():
    made = layer()
    made.weight.requires_grad_(False)
    made.lora_a.requires_grad_(False)
    made(torch.randn(5, 12)).sum().backward()
    assert made.weight.grad is None
    assert made.lora_a.grad is None
    assert made.lora_b.grad is not None


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_of_what_the_adapter_reads_and_only_in_training(dora):
    made, x = layer(dora, dropout=0.5), torch.randn(3, 12)
    torch.testing.assert_close(made.eval()(x), by_the_paper(made, x))
    made.train()
    torch.manual_seed(7)
    y = made(x)
    torch.manual_seed(7)
    assert torch.equal(made(x), y)
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5)
    change = made.scale * F.linear(F.linear(dropped, made.lora_a), made.lora_b)
    if dora:  # as PEFT computes it: what has been dropped stays so in the part that the magnitude changes
        assert made.magnitude is not None
        factor = made.magnitude / (made.weight + made.scale * made.lora_b @ made.lora_a).norm(dim=1)
        change = (factor - 1) * F.linear(dropped, made.weight) + factor * change
    torch.testing.assert_close(y, F.linear(x, made.weight, made.bias) + change)


def test_under_autocast_the_sum_of_the_weights_is_rounded_once():
    made, x = layer(), torch.randn(4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    assert made.bias is not None
    assert torch.equal(y, F.linear(x.bfloat16(), made.merged_weight().bfloat16(), made.bias.bfloat16()))


@pytest.mark.parametrize("lora", [ALL, DORA], ids=["lora", "dora"])
def test_fresh_adapters_change_nothing_and_the_rest_begins_as_without_them(lora):
    torch.manual_seed(0)
    plain = GPT(GPTConfig(**SMALL))
    torch.manual_seed(0)
    with_lora = GPT(GPTConfig(**SMALL), lora)
    ours = dict(with_lora.named_parameters())
    assert all(torch.equal(ours[name], p) for name, p in plain.named_parameters())
    torch.testing.assert_close(logits(with_lora, TOKENS), logits(plain, TOKENS))
    assert {name for name, p in ours.items() if p.requires_grad} == set(adapter_parameters(with_lora))


@pytest.mark.parametrize("lora", [ALL, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["gpt2", "gpt2-learned-scaled", "neox-partial", "llama-one-kv-head-bias", "qwen3"])
def test_merging_changes_nothing_of_what_is_computed(name, lora, tmp_path):
    model = with_adapters(name, lora)
    before = logits(model, TOKENS)
    assert (before - logits(base(model), TOKENS)).abs().max() > 0.1
    torch.testing.assert_close(logits(base(model), TOKENS), logits(make_ours(OURS[name]), TOKENS), rtol=0, atol=0)
    copy = merged(model)
    model.save_pretrained(tmp_path)
    assert adapted(model), "saving and merging a copy leave the model as it is"
    assert torch.equal(logits(model, TOKENS), before)
    assert not adapted(copy)
    for other in (copy, GPT.from_pretrained(tmp_path), load_stock(tmp_path)):
        torch.testing.assert_close(logits(other, TOKENS), before, rtol=1e-5, atol=3e-5)
    merge(model)
    assert torch.equal(logits(model, TOKENS), logits(copy, TOKENS))
    assert model.state_dict().keys() == make_ours(OURS[name]).state_dict().keys()


def test_a_merged_copy_shares_what_has_no_adapter():
    model = with_adapters("gpt2", LoRAConfig(rank=2, targets=["q"]))
    copy = merged(model)
    shared = {name for name, p in copy.named_parameters() if p.data_ptr() == model.get_parameter(name).data_ptr()}
    assert set(dict(copy.named_parameters())) - shared == {f"blocks.{i}.attention.q.weight" for i in range(2)}
    assert copy.head.weight is copy.embeddings.tokens.weight
    assert merged(copy) is copy


@pytest.mark.parametrize(
    ("targets", "inner"),
    [
        (["attention", "feedforward"], "0q 0k 0v 0out 0up 0gate 0down 1q 1k 1v 1out 1up 1gate 1down"),
        (["v", "q"], "0q 0v 1q 1v"),
        (["attention.q", "blocks.1.feedforward.gate"], "0q 1q 1gate"),
        (["blocks.0"], "0q 0k 0v 0out 0up 0gate 0down"),
        (["blocks.?.*.out", "feedforward.[ud]*"], "0out 0up 0down 1out 1up 1down"),
    ],
)
def test_targets_name_modules(targets, inner):
    config = GPTConfig(**{**SMALL, **OURS["llama"]})
    found = LoRAConfig(rank=1, targets=targets).modules(config)
    assert " ".join(re.sub(r"blocks\.(\d)\.\w+\.", r"\1", name) for name in found) == inner
    assert list(adapted(GPT(config, LoRAConfig(rank=1, targets=targets)))) == found


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj"], r"targets: q_proj is attention\.q here\. There are: attention\.q, .*feedforward\.down, in blocks\.0 to blocks\.1$"),
        (["all-linear"], r"all-linear is attention and feedforward, the default here"),
        (["atention.q"], r"no projection is called atention\.q\. Did you mean attention\.q\?"),
        (["feedforward.gate"], r"no projection is called feedforward\.gate\. Did you mean feedforward\?"),
        (["q", "blocks.2.attention.v"], r"no projection is called blocks\.2\.attention\.v"),
        (["head"], r"head gets no adapter, only matrices inside blocks do"),
        ([], r"targets=\[\]: no projection is named"),
    ],
)
def test_a_target_that_names_nothing_is_refused_with_what_there_is(targets, message):
    with pytest.raises(ValueError, match=message):
        GPT(GPTConfig(**SMALL), LoRAConfig(rank=1, targets=targets))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": -1}, r"^rank=-1 must be at least 1"),
        ({"alpha": 0.0}, r"^alpha=0\.0 must be greater than 0"),
        ({"alpha": float("inf")}, r"^alpha=inf must be"),
        ({"dropout": 1.0}, r"^dropout=1\.0 must be at least 0 and less than 1"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**values)


def test_adapters_of_most_blocks_suit_a_shorter_model():
    config = GPTConfig(**{**SMALL, "n_layer": 4})
    most = LoRAConfig(rank=2, targets=["v", "blocks.3"]).of_most_blocks(config)
    assert most is not None
    assert most.targets == ["attention.v"]
    assert LoRAConfig(rank=2, targets=["blocks.3.attention.q"]).of_most_blocks(config) is None


def test_the_work_of_a_step_is_counted_where_gradients_are_taken():
    config = GPTConfig(**{**SMALL, "tie_embeddings": False})
    full, lora = GPT(config), GPT(config, LoRAConfig(rank=1))
    forward = full.flops_per_token() // 3
    assert full.flops_per_token() == 3 * forward
    extra = 6 * sum(p.numel() for p in adapter_parameters(lora).values())
    attention = 4 * config.n_layer * config.d_model * config.context_length  # both its gradients are of what comes up
    assert lora.flops_per_token() == 2 * forward + attention + extra
    assert lora.num_parameters() == full.num_parameters() + extra // 6


def test_compiled_blocks_compute_the_same():
    torch._dynamo.reset()  # what other tests have compiled counts against its limit
    model = with_adapters("gpt2", DORA)
    eager = logits(model, TOKENS)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(logits(model, TOKENS), eager)
    hidden = model.train().hidden_states(TOKENS)
    hidden.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in adapter_parameters(model).items() if p.grad is not None}
    assert gradients.keys() == adapter_parameters(model).keys()
    torch._dynamo.reset()
    again = with_adapters("gpt2", DORA).train()
    again.hidden_states(TOKENS).square().sum().backward()
    for name, p in adapter_parameters(again).items():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-3, msg=name)
