import math
import subprocess
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.data.batches import Batch
from gpt.data.loader import held_out_windows
from gpt.data.shards import TokenArray
from gpt.evaluation.perplexity import (
    HeldOutLoss,
    Windows,
    _valid_nll,
    compressed_bits_per_byte,
    score_batches,
    score_examples,
    strided_loss,
    strided_windows,
    token_nll,
    window_batches,
)
from gpt.model.config import GPTConfig
from gpt.model.loss import IGNORE, LinearCrossEntropy
from gpt.model.objective import NextTokenLoss
from gpt.model.transformer import GPT
from gpt.runtime.cpu import Cpu
from tests.evaluation.conftest import CONTEXT, make_model

V, T = 50, 16
BYTE_LENGTHS = np.arange(V) % 5  # id 0 and others have none, as special tokens


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=V, context_length=T, n_layer=2, n_head=2, d_model=32, dropout=0.5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


@pytest.fixture
def text() -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, 7 * T + 5).astype(np.uint16)


def total_loss(objective: NextTokenLoss, batch: Batch) -> torch.Tensor:
    return objective(batch.tokens, batch.targets, batch.documents)


def measure(
    model: GPT, text: np.ndarray, batch: int, starts: list[int] | None = None, dtype: torch.dtype = torch.float32, **settings
) -> HeldOutLoss | None:
    tokens = TokenArray(np.split(text, [20, 63]))
    where = held_out_windows(tokens, T) if starts is None else np.array(starts)
    loss, device = LinearCrossEntropy(dtype, chunk=24), Cpu("CPU", dtype)
    batches = window_batches(tokens, Windows(where, T), batch)
    return score_batches(model, partial(total_loss, NextTokenLoss(model, loss)), batches, BYTE_LENGTHS, device, **settings)


def reference(model: GPT, text: np.ndarray, starts: list[int]) -> tuple[float, int]:
    """Negative log-likelihood in nats, and bytes: one window and one target at a time, in fp64."""
    wide = GPT(model.config).double()
    wide.load_state_dict(model.state_dict())
    wide.eval()
    nll, n_bytes = 0.0, 0
    for start in starts:
        window = text[start : start + T + 1].astype(np.int64)
        with torch.no_grad():
            logits = wide(torch.from_numpy(window[None, :-1]))[0].numpy()
        assert logits.dtype == np.float64
        for row, target in zip(logits, window[1:], strict=True):
            nll += math.log(np.exp(row - row.max()).sum()) + row.max() - row[target]
            n_bytes += int(BYTE_LENGTHS[target])
    return nll, n_bytes


@pytest.mark.parametrize("batch", [1, 3, 4, 7, 10])  # 7 windows: the last pass is full or padded
def test_it_is_the_reference_s(model, text, batch):
    expected, n_bytes = reference(model, text, [i * T for i in range(7)])
    measured = measure(model, text, batch)
    assert measured is not None
    assert measured.nll == pytest.approx(expected, rel=1e-5)
    assert measured.loss == pytest.approx(expected / (7 * T), abs=1e-4)
    assert (measured.tokens, measured.bytes) == (7 * T, n_bytes)
    assert measured.bits_per_byte == pytest.approx(expected / math.log(2) / n_bytes, abs=1e-4)
    assert abs(measured.loss - math.log(V)) > 0.1  # the model says something


def test_windows_may_be_any(model, text):
    starts = [3, 40, 40]
    measured = measure(model, text, 2, starts)
    expected, n_bytes = reference(model, text, starts)
    assert measured is not None
    assert measured.nll == pytest.approx(expected, rel=1e-5)
    assert (measured.tokens, measured.bytes) == (3 * T, n_bytes)


def test_bf16_is_near(model, text):
    expected, _ = reference(model, text, [i * T for i in range(7)])
    measured = measure(model, text, 4, dtype=torch.bfloat16)
    assert measured is not None
    assert measured.nll == pytest.approx(expected, rel=0.02)


def test_every_pass_has_the_same_shape(model, text):
    shapes = set()
    model.final_norm.register_forward_hook(lambda module, inputs, output: shapes.add(tuple(output.shape)))
    measure(model, text, 4)
    assert shapes == {(4, T, 32)}


def test_a_model_that_knows_nothing(model, text):
    with torch.no_grad():
        model.head.weight.zero_()
    measured = measure(model, text, 4)
    assert measured is not None
    assert measured.loss == pytest.approx(math.log(V), rel=1e-6)


def test_bits_per_byte():
    assert HeldOutLoss(nll=800 * math.log(2), tokens=50, bytes=100).bits_per_byte == pytest.approx(8)
    assert HeldOutLoss(nll=800 * math.log(2), tokens=50, bytes=100).loss == pytest.approx(16 * math.log(2))
    assert math.isfinite(HeldOutLoss(nll=1.0, tokens=1, bytes=0).bits_per_byte)  # nothing but end-of-text tokens


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_it_stops_when_told(model, text, passes):
    done: list[int] = []
    model.final_norm.register_forward_hook(lambda *_: done.append(1))
    model.train()
    assert measure(model, text, 2, stopped=lambda: len(done) == passes) is None
    assert len(done) == passes
    assert model.training


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_before(model, text, training):
    model.train(training)
    first, second = measure(model, text, 4), measure(model, text, 4)
    assert first == second  # no dropout
    assert model.training == training
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_the_mode_comes_back_after_an_error(model, text):
    model.train()
    with pytest.raises(IndexError):
        measure(model, text, 2, [len(text) - 3])
    assert model.training


def test_what_gzip_and_xz_reach_is_what_the_programs_reach(tmp_path):
    text = b"".join(b"line %d of a text\n" % n for n in range(3000))
    (tmp_path / "text").write_bytes(text)
    for name, figure in compressed_bits_per_byte(text).items():
        size = len(subprocess.check_output([*name.split(), "-c", tmp_path / "text"]))
        assert figure == pytest.approx(8 * size / len(text), abs=0.01)
    assert compressed_bits_per_byte(b"") == {}


# Strided windows


def slow_nll(model: GPT, ids: np.ndarray, context_length: int, stride: int) -> list[float]:
    """Nats of every token but the first, one forward pass each, in fp64: the first window that holds a token, up to it."""
    wide = GPT(model.config).double()
    wide.load_state_dict(model.state_dict())
    wide.eval()
    found = []
    for place in range(1, len(ids)):
        start = 0
        while start + context_length < place:
            start += stride
        with torch.no_grad():
            logits = wide(torch.from_numpy(ids[None, start:place].astype(np.int64)))[0, -1]
        assert logits.dtype == torch.float64
        found.append(-(logits[int(ids[place])] - logits.exp().sum().log()).item())
    return found


def strided(model: GPT, ids: np.ndarray, stride: int, batch: int = 3, context_length: int = CONTEXT, **settings) -> HeldOutLoss:
    tokens, device = TokenArray([ids[:1], ids[1:]]), Cpu("CPU", torch.float32)
    return strided_loss(model, tokens, context_length, stride, batch, BYTE_LENGTHS, device, **settings)


@pytest.fixture(scope="module")
def rich_model(shape) -> GPT:
    return make_model(shape, V)


@pytest.mark.parametrize("stride", [1, 7, CONTEXT // 2, CONTEXT - 1, CONTEXT])
@pytest.mark.parametrize("count", [2, 10, CONTEXT, CONTEXT + 1, CONTEXT + 2, 2 * CONTEXT + 1, 4 * CONTEXT, 90])
def test_strided_windows_are_the_reference_s(rich_model, count, stride):
    ids = np.random.default_rng(count).integers(0, V, count).astype(np.uint16)
    expected, measured = slow_nll(rich_model, ids, CONTEXT, stride), strided(rich_model, ids, stride)
    assert measured.loss == pytest.approx(sum(expected) / (count - 1), abs=1e-4)
    assert measured.nll == pytest.approx(sum(expected), rel=1e-5)
    assert (measured.tokens, measured.bytes) == (count - 1, int(BYTE_LENGTHS[ids[1:]].sum()))


def test_more_context_changes_the_loss(rich_model):
    ids = np.tile(np.random.default_rng(0).integers(0, V, 30), 4).astype(np.uint16)
    losses = [strided(rich_model, ids, stride).loss for stride in (1, CONTEXT // 2, CONTEXT)]
    assert len({round(loss, 4) for loss in losses}) == 3


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_the_batch_does_not_change_the_loss(rich_model, batch):
    ids = np.random.default_rng(1).integers(0, V, 100).astype(np.uint16)
    assert strided(rich_model, ids, 10, batch).nll == pytest.approx(strided(rich_model, ids, 10, 3).nll, rel=1e-6)


def test_fewer_tokens_of_context_than_the_model_reads(rich_model):
    ids = np.random.default_rng(2).integers(0, V, 50).astype(np.uint16)
    expected = slow_nll(rich_model, ids, 9, 4)
    assert strided(rich_model, ids, 4, context_length=9).nll == pytest.approx(sum(expected), rel=1e-5)


def test_windows_without_overlap_are_those_of_training(rich_model):
    ids = np.random.default_rng(3).integers(0, V, 5 * CONTEXT + 1).astype(np.uint16)
    tokens, device = TokenArray([ids]), Cpu("CPU", torch.float32)
    batches = window_batches(tokens, Windows(held_out_windows(tokens, CONTEXT), CONTEXT), 3)
    trained = score_batches(rich_model, partial(total_loss, NextTokenLoss(rich_model, LinearCrossEntropy())), batches, BYTE_LENGTHS, device)
    measured = strided(rich_model, ids, CONTEXT)
    assert trained is not None
    assert (measured.tokens, measured.bytes) == (trained.tokens, trained.bytes)
    assert measured.nll == pytest.approx(trained.nll, rel=1e-6)


def test_shapes_stay_the_same_and_progress_adds_up(rich_model):
    shapes, progress = set(), []
    hook = rich_model.final_norm.register_forward_hook(lambda module, inputs, output: shapes.add(tuple(output.shape)))
    ids = np.random.default_rng(4).integers(0, V, 5 * CONTEXT + 3).astype(np.uint16)
    strided(rich_model, ids, 10, 4, scored=progress.append)
    hook.remove()
    assert shapes == {(4, CONTEXT, 32)}
    assert sum(progress) == len(ids) - 1


@given(st.integers(2, 400), st.integers(1, 60), st.data())
def test_every_token_is_scored_once(tokens, context_length, data):
    stride = data.draw(st.integers(1, context_length))
    windows = strided_windows(tokens, context_length, stride)
    times = np.zeros(tokens, dtype=int)
    for start in windows.starts:
        targets = np.arange(start + 1, start + windows.length + 1)[windows.overlap if start else 0 :]
        times[targets[targets < tokens]] += 1
        assert len(targets[targets < tokens])  # no window for nothing
    assert times.tolist() == [0] + [1] * (tokens - 1)
    assert windows.length <= context_length


@given(st.integers(2, 70), st.integers(1, 12), st.integers(1, 5), st.data())
@settings(max_examples=50)
def test_the_code_scores_every_token_once(tokens, context_length, batch, data):
    stride = data.draw(st.integers(1, context_length))
    seen: list[int] = []
    model = make_model("gpt2", 128, 12)
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    ids = np.arange(tokens) % 128
    lengths = np.ones(128, dtype=int)
    tokens_array, device = TokenArray([ids]), Cpu("CPU", torch.float32)
    assert strided_loss(model, tokens_array, context_length, stride, batch, lengths, device).tokens == tokens - 1
    assert sum(seen) == tokens - 1  # no logits for what is not scored


def test_token_nll_in_chunks(rich_model):
    torch.manual_seed(1)
    hidden, targets = torch.randn(10, 32), torch.randint(V, (10,))
    logits = rich_model.head(hidden).double()
    nats, likeliest = token_nll(rich_model, hidden, targets, chunk=4)
    assert nats.tolist() == pytest.approx((logits.logsumexp(-1) - logits.gather(1, targets[:, None])[:, 0]).tolist(), abs=1e-5)
    assert likeliest.tolist() == (logits.argmax(-1) == targets).tolist()
    assert token_nll(rich_model, hidden, logits.argmax(-1), chunk=4)[1].all()
    assert [part.shape for part in token_nll(rich_model, hidden[:0], targets[:0])] == [(0,), (0,)]


def test_perplexity():
    assert HeldOutLoss(nll=50 * math.log(7), tokens=50, bytes=9).perplexity == pytest.approx(7)
    assert HeldOutLoss(nll=800.0, tokens=1, bytes=1).perplexity == math.inf


class CompilesSlowly(Cpu):
    fixed_graphs = True


def ragged(counts: list[int]) -> list[Batch]:
    """Batches of two rows, of which so many targets count."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for count in counts:
        tokens, targets = torch.randint(V, (2, T), generator=generator), torch.randint(V, (2 * T,), generator=generator)
        targets[torch.randperm(2 * T, generator=generator)[count:]] = IGNORE
        batches.append(Batch(tokens, targets.view(2, T), torch.arange(T).expand(2, T) // 5))
    return batches


@pytest.mark.parametrize("count", [0, 1, 7, 2 * T])
def test_what_does_not_count_costs_nothing_with_fixed_shapes(model, count):
    (batch,) = ragged([count])
    model.eval()
    with torch.no_grad():
        fixed, picked = _valid_nll(model, True, batch), _valid_nll(model, False, batch)
    assert fixed.item() == pytest.approx(picked.item(), rel=1e-6)
    assert (fixed.item() > 0) == (count > 0)


def test_a_device_that_compiles_slowly_scores_the_same_in_one_shape(model, text):
    """Examples and windows that overlap, of which few targets count, and how many changes with each pass."""
    shapes: dict[str, set[tuple[int, ...]]] = {"cpu": set(), "slow": set()}
    found = {}
    for name, device in (("cpu", Cpu("CPU", torch.float32)), ("slow", CompilesSlowly("slow", torch.float32))):
        seen = shapes[name]
        handle = model.head.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.add(tuple(inputs[0].shape)))
        examples = score_examples(model, ragged([5, 9, 0, 32]), BYTE_LENGTHS, device)
        found[name] = (examples, strided_loss(model, TokenArray([text]), T, 5, 2, BYTE_LENGTHS, device))
        handle.remove()
    assert shapes["slow"] == {(2 * T, 32)}
    assert len(shapes["cpu"]) > 3
    for slow, quick in zip(found["slow"], found["cpu"], strict=True):
        assert slow.nll == pytest.approx(quick.nll, rel=1e-6)
        assert (slow.tokens, slow.bytes) == (quick.tokens, quick.bytes)
    assert found["slow"][0].tokens == 46
