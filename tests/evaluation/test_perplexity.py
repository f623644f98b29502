import math
import subprocess

import numpy as np
import pytest
import torch

from gpt.data.loader import held_out_windows
from gpt.data.shards import TokenArray
from gpt.evaluation.perplexity import HeldOutLoss, compressed_bits_per_byte, held_out_loss
from gpt.model.config import GPTConfig
from gpt.model.loss import LinearCrossEntropy
from gpt.model.transformer import GPT
from gpt.runtime.device import Device

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


def measure(
    model: GPT, text: np.ndarray, batch: int, starts: list[int] | None = None, dtype: torch.dtype = torch.float32, **settings
) -> HeldOutLoss | None:
    tokens = TokenArray(np.split(text, [20, 63]))
    where = held_out_windows(tokens, T) if starts is None else np.array(starts)
    loss, device = LinearCrossEntropy(dtype, chunk=24), Device("cpu", "CPU", dtype, None)
    return held_out_loss(model, loss, tokens, where, batch, BYTE_LENGTHS, device, **settings)


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
