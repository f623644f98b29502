"""What the memory of a run consists of; that the formulas are right is shown in tests/test_scaling.py, by measuring."""

from dataclasses import fields, replace

import pytest
import torch

from gpt.compose import compose_run
from gpt.config import ParallelConfig
from gpt.model import native_attention, native_products, native_rowwise
from gpt.model.config import GPTConfig
from gpt.runtime.activations import block_activations
from gpt.runtime.case import Case, case_of
from gpt.runtime.cpu import Cpu
from gpt.runtime.cuda import Cuda
from gpt.runtime.memory import Memory, fit_rows, needs, peak, states

GPT2 = GPTConfig(50257, 1024)


def test_the_parts_add_up():
    memory = needs(Case(GPT2, ema=True))
    assert memory.total == sum(getattr(memory, f.name) for f in fields(memory))
    assert memory.parameters == memory.average == 4 * 124_439_808
    assert Memory().total == 0


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"micro_batch": 2}, "activations"), ({"checkpointing": "full"}, "activations"), ({"compiled": True}, "activations"),
        ({"optimizer": "adamw"}, "optimizer"), ({"passes": 2}, "gradients"), ({"replicas": 2}, "gradients"), ({"shards": 2}, "gathered"),
        ({"fused_adamw": False, "optimizer": "adamw", "micro_batch": 1, "checkpointing": "full"}, "update"),
        ({"width": 4}, "casts"), ({"tensor": 2}, "casts"), ({"native_rows": True}, "activations"), ({"native_rows": True}, "loss"),
    ],
)  # fmt: skip
def test_each_choice_changes_its_part(changes, part):
    case = Case(GPT2, micro_batch=4, length=1024)
    assert getattr(needs(replace(case, **changes)), part) != getattr(needs(case), part)


def test_a_run_is_the_case_that_its_config_says():
    settings = ["model=gpt2", "parallel=fsdp", "parallel.tensor=2", "parallel.replicate=2", "train.batch_tokens=65536", "train.ema=0.9"]
    config = compose_run("pretrain", [*settings, "train.activation_checkpointing=every_n", "data.document_mask=true"])
    case = case_of(config, 16, 4, Cuda("", torch.bfloat16), compiled=True)
    assert (case.shards, case.replicas, case.tensor, case.ranks) == (4, 2, 2, 16)
    assert (case.micro_batch, case.passes, case.length, case.width) == (4, 2, 1024, 2)
    assert (case.checkpointing, case.every, case.ema, case.compiled, case.documents) == ("every_n", 2, True, True, True)
    assert (case.chunk, case.plain, case.fused_adamw) == (1280, False, True)
    alone = case_of(replace(config, parallel=ParallelConfig()), 1, 100, Cpu("", torch.float32), compiled=False)
    assert (alone.ranks, alone.is_divided, alone.micro_batch, alone.passes, alone.width) == (1, False, 64, 1, 4)


def test_what_is_native_is_asked_of_a_cpu_in_bf16_alone(monkeypatch):
    config = compose_run("pretrain", ["model.n_head=4", "model.head_dim=24"])
    asked = []
    monkeypatch.setattr(native_products, "is_native", lambda: asked.append("products") or True)
    monkeypatch.setattr(native_rowwise, "is_native", lambda: asked.append("rows") or True)
    monkeypatch.setattr(native_attention, "is_native", lambda head_dim: asked.append(head_dim) or head_dim % 16 == 0)
    for device in (Cpu("", torch.float32), Cuda("", torch.bfloat16)):
        case = case_of(config, 1, 1, device, compiled=True)
        assert (case.native_rows, case.native_attention, case.native_products) == (False, False, False)
    assert not asked
    case = case_of(config, 1, 1, Cpu("", torch.bfloat16), compiled=True)
    assert (case.native_rows, case.native_attention, case.native_products) == (True, False, True)
    assert asked == ["rows", 24, "products"]
    odd = compose_run("pretrain", ["model.n_head=3", "model.head_dim=24"])
    assert not case_of(odd, 1, 1, Cpu("", torch.bfloat16), compiled=True).native_products


def test_native_attention_keeps_no_scores_at_any_length():
    blockwise = Case(GPT2, micro_batch=4, compiled=True, plain=True, native_rows=True)
    native = replace(blockwise, native_attention=True)
    head = GPT2.n_head * 4 * 4 * 1024  # bytes of a number for each head and token
    copy_and_scores = 4 * (2 * 1024 * 768 + 2 * GPT2.n_head * 128 * 128 * sum(range(1, 9)))
    assert block_activations(blockwise) - block_activations(native) == copy_and_scores
    for length in (1024, 2048):  # the same for each token
        assert block_activations(replace(native, length=length)) == block_activations(native) * length // 1024
    assert block_activations(native) == 4 * 1024 * (36 * 768 + 16) + head


def test_a_vocabulary_that_is_not_known_yet_is_the_tokenizers():
    config = compose_run("pretrain", ["tokenizer.vocab_size=4096"])
    assert config.model.vocab_size == 0
    assert case_of(config, 1, 1, Cpu("", torch.float32), compiled=False).model.vocab_size == 4096


def test_compiled_blocks_and_more_ranks_need_less():
    case = Case(GPT2, replicas=4, micro_batch=4)
    assert peak(replace(case, compiled=True)) < peak(case)
    assert peak(replace(case, shards=4, replicas=1)) < peak(case)
    whole, divided = (sum(states(c).values()) for c in (case, replace(case, shards=4, replicas=1)))
    assert divided * 4 == pytest.approx(whole, rel=2e-3)


def test_rows_of_a_report_say_what_is_left():
    case = Case(GPT2, shards=4, micro_batch=4)
    rows = dict(fit_rows(case, 24 << 30))
    total = rows.pop("all, on each of 4 ranks")
    assert total == peak(case)
    assert rows.pop("left") == rows.pop("memory of the device") - total
    assert sum(rows.values()) == total
    assert all(rows.values())
    assert fit_rows(case, None) == fit_rows(case, 24 << 30)[:-2]
