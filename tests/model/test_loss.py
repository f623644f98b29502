import pytest
import torch
import torch.nn.functional as F

from gpt.model.loss import IGNORE, LinearCrossEntropy, chunk_size, valid_rows


def reference(hidden, weight, targets):
    """The plain loss and its gradients in fp64."""
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    loss = F.cross_entropy((h @ w.T).flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    loss.backward()
    return loss, h.grad, w.grad


def example(rows=37, width=24, vocab=101, scale=3.0):
    torch.manual_seed(0)
    hidden = (torch.randn(rows, width) * scale).requires_grad_()
    weight = torch.randn(vocab, width).requires_grad_()
    targets = torch.randint(vocab, (rows,))
    targets[::5] = IGNORE
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
def test_loss_and_gradients_equal_the_fp64_reference(chunk):
    hidden, weight, targets = example()
    expected, hidden_gradient, weight_gradient = reference(hidden, weight, targets)
    loss = LinearCrossEntropy(chunk=chunk)(hidden, weight, targets)
    (loss * 2).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad.double(), 2 * hidden_gradient, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weight.grad.double(), 2 * weight_gradient, atol=1e-4, rtol=1e-5)
    assert not hidden.grad[::5].any()


def test_without_gradients_it_is_the_same():
    hidden, weight, targets = example()
    expected = reference(hidden, weight, targets)[0].item()
    with torch.no_grad():
        assert LinearCrossEntropy(chunk=8)(hidden, weight, targets).item() == pytest.approx(expected, rel=1e-6)


def test_bf16_is_close():
    hidden, weight, targets = example(rows=200, scale=1.0)
    expected, hidden_gradient, weight_gradient = reference(hidden, weight, targets)
    loss = LinearCrossEntropy(torch.bfloat16)(hidden, weight, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    for ours, exact in ((hidden.grad, hidden_gradient), (weight.grad, weight_gradient)):
        assert ((ours.double() - exact).norm() / exact.norm()).item() < 2e-2


def test_logits_far_from_zero_do_not_overflow():
    hidden, weight, targets = example(scale=200.0)
    loss = LinearCrossEntropy()(hidden, weight, targets)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    hidden, weight, targets = example()
    LinearCrossEntropy()(hidden, weight.detach(), targets).backward()
    torch.testing.assert_close(hidden.grad.double(), reference(hidden, weight, targets)[1], atol=1e-5, rtol=1e-5)


def test_all_masked_is_zero_not_nan():
    hidden, weight, targets = example()
    loss = LinearCrossEntropy()(hidden, weight, torch.full_like(targets, IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_rows_change_nothing_but_the_work(share):
    hidden, weight, targets = example(rows=203)
    targets[torch.rand(203) > share] = IGNORE
    seen = []

    def counted(logits, *rest):
        seen.append(len(logits))
        return softmax(logits, *rest)

    loss = LinearCrossEntropy(chunk=16)
    softmax, loss.softmax = loss.softmax, counted
    rows = valid_rows(targets, 16)
    plain = LinearCrossEntropy(chunk=16)(hidden, weight, targets)
    (plain * 2).backward()
    gradients, hidden.grad, weight.grad = (hidden.grad, weight.grad), None, None
    gathered = loss(hidden.view(7, 29, -1), weight, targets.view(7, 29), rows)
    (gathered * 2).backward()
    assert set(seen) <= {16}
    assert sum(seen) == -(-int((targets != IGNORE).sum()) // 16) * 16 < 203
    assert gathered.item() == pytest.approx(plain.item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad, gradients[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weight.grad, gradients[1], atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        assert loss(hidden, weight, targets, rows).item() == pytest.approx(plain.item(), rel=1e-6)


def test_valid_rows_fill_whole_chunks_with_rows_that_do_not_count():
    targets = torch.full((4, 50), IGNORE)
    targets[1, 3:40] = 5
    rows = valid_rows(targets, 16)
    assert rows.tolist()[:37] == list(range(53, 90))
    assert len(rows) == 48 == len(set(rows.tolist()))
    assert (targets.flatten()[rows[37:]] == IGNORE).all()
    assert valid_rows(targets, 151) is None  # filling the only chunk takes more than is saved
    targets[:, :38] = 5
    assert valid_rows(targets, 1) is None
    assert valid_rows(torch.full((50,), IGNORE), 16).tolist() == []


@pytest.mark.parametrize("vocab", [257, 256, 50257])
def test_a_padded_vocabulary_is_never_seen(vocab):
    hidden, weight, targets = example(rows=60, width=16, vocab=vocab, scale=1.0)
    with torch.no_grad():
        hidden -= 4 * weight.mean(0)
        hidden[:, 0], weight[:, 0] = 3.0, -3.0  # every logit is about -9: columns of zeros would take nearly all the probability
    targets[1] = vocab - 1
    expected, hidden_gradient, weight_gradient = reference(hidden.bfloat16(), weight.bfloat16(), targets)
    loss = LinearCrossEntropy(torch.bfloat16, chunk=25)
    seen = []
    softmax = loss.nll_and_gradient
    loss.nll_and_gradient = lambda logits, *rest: seen.append(logits.shape[1]) or softmax(logits, *rest)
    nll = loss(hidden, weight, targets)
    nll.backward()
    assert set(seen) == {-(-vocab // 64) * 64}
    assert nll.item() == pytest.approx(expected.item(), rel=2e-3)
    assert weight.grad.shape == weight.shape
    for ours, exact in ((hidden.grad, hidden_gradient), (weight.grad, weight_gradient)):
        assert ((ours.double() - exact).norm() / exact.norm()).item() < 2e-2
    with torch.no_grad():
        assert loss(hidden, weight, targets).item() == pytest.approx(expected.item(), rel=2e-3)


def test_a_chunk_of_logits_is_bounded_on_every_device():
    assert chunk_size("cpu", 8192, 4096) == 512
    for vocab in (257, 8192, 50257, 151936):
        tokens = chunk_size("cuda", vocab, 16384)
        assert tokens % 128 == 0
        assert 128 <= tokens <= 4096
        assert tokens * vocab * 4 <= 2**28
    for rows in (1, 96, 5000, 16384):
        tokens = chunk_size("neuron", 50257, rows)
        assert rows % tokens == 0
        assert tokens <= chunk_size("cuda", 50257, rows)


@pytest.mark.slow
def test_compiled_softmax_is_the_same():
    hidden, weight, targets = example(rows=64)
    loss = LinearCrossEntropy(chunk=32)
    plain = loss(hidden, weight, targets)
    plain.backward()
    gradient, hidden.grad = hidden.grad, None
    loss.compile_softmax(dynamic=False)
    compiled = loss(hidden, weight, targets)
    compiled.backward()
    assert compiled.item() == pytest.approx(plain.item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad, gradient, atol=1e-5, rtol=1e-5)
