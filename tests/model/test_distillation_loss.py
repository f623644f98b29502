"""The loss of a student that learns from a teacher, against torch's own functions in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.model.distillation import AllAnswers, DistillationLoss, LikeliestAnswers, TeacherHead
from gpt.model.loss import IGNORE, LinearCrossEntropy, valid_rows

ROWS, WIDTH, VOCABULARY = 37, 24, 101
TEACHER_WIDTH, TEACHER_VOCABULARY = 40, 128  # with 27 rows of padding, which are large here and must not count


def student(rows: int = ROWS, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = (torch.randn(rows, WIDTH) * scale).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH).requires_grad_()
    targets = torch.randint(VOCABULARY, (rows,))
    targets[::5] = IGNORE
    return hidden, weight, targets


def teacher(rows: int = ROWS, bias: bool = False) -> tuple[Tensor, TeacherHead, Tensor]:
    """Its states and head, and its logits (rows, VOCABULARY) in fp64."""
    torch.manual_seed(1)
    states, weight = torch.randn(rows, TEACHER_WIDTH), torch.randn(TEACHER_VOCABULARY, TEACHER_WIDTH) * 0.5
    weight[VOCABULARY:] *= 100
    offsets = torch.randn(TEACHER_VOCABULARY) if bias else None
    logits = states.double() @ weight.double().T + (offsets.double() if offsets is not None else 0)
    return states, TeacherHead(weight, offsets, VOCABULARY), logits[:, :VOCABULARY]


def reference(hidden, weight, targets, logits, temperature, share, ids=None):
    """The plain loss, its gradients and the plain KL, in fp64; with ids (N, K), all other tokens are one."""
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    own = h @ w.T
    p, q = ((x / temperature).softmax(-1) for x in (logits, own))
    if ids is not None:
        p, q = (torch.cat([x.gather(1, ids), 1 - x.gather(1, ids).sum(-1, keepdim=True)], -1) for x in (p, q))
    apart = F.kl_div(q.log(), p, reduction="none").sum(-1)
    divergence = apart[targets != IGNORE].sum()
    loss = share * temperature**2 * divergence + (1 - share) * F.cross_entropy(own, targets, ignore_index=IGNORE, reduction="sum")
    loss.backward()
    return loss, h.grad, w.grad, divergence


def likeliest(logits: Tensor, k: int, temperature: float) -> LikeliestAnswers:
    """The k likeliest tokens of each row."""
    found = logits.topk(k)
    others = 1 - (logits / temperature).softmax(-1).gather(1, found.indices).sum(-1)
    return LikeliestAnswers(found.values.float(), found.indices, others.float())


@pytest.mark.parametrize("chunk", [1, 8, 1000])
@pytest.mark.parametrize(("temperature", "share"), [(2.0, 0.5), (1.0, 1.0), (4.0, 0.9), (0.5, 0.1)])
@pytest.mark.parametrize("top_k", [0, 1, 7, VOCABULARY])
def test_loss_and_gradients_equal_the_fp64_reference(chunk, temperature, share, top_k):
    hidden, weight, targets = student()
    states, head, logits = teacher(bias=top_k == 0)
    answers = likeliest(logits, top_k, temperature) if top_k else AllAnswers(states, head)
    ids = answers.ids if 0 < top_k < VOCABULARY else None
    expected, hidden_gradient, weight_gradient, divergence = reference(hidden, weight, targets, logits, temperature, share, ids)
    measure = DistillationLoss(temperature, share, chunk=chunk)
    loss = measure(hidden, weight, targets, teacher=answers)
    (loss * 2).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad.double(), 2 * hidden_gradient, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weight.grad.double(), 2 * weight_gradient, atol=1e-4, rtol=1e-4)
    assert not hidden.grad[::5].any()
    told = measure.figures(lambda sums: sums)
    assert told == {"distill_kl": pytest.approx(divergence.item() / int((targets != IGNORE).sum()), rel=1e-4)}
    assert measure.figures(lambda sums: sums) == {}, "what was told counts no more"


def test_bf16_is_close():
    hidden, weight, targets = student(rows=200)
    states, head, logits = teacher(rows=200)
    expected, hidden_gradient, weight_gradient, _ = reference(hidden, weight, targets, logits, 2.0, 0.5)
    loss = DistillationLoss(2.0, 0.5, torch.bfloat16)(hidden, weight, targets, teacher=AllAnswers(states, head))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    for ours, exact in ((hidden.grad, hidden_gradient), (weight.grad, weight_gradient)):
        assert ((ours.double() - exact).norm() / exact.norm()).item() < 2e-2


def test_what_is_not_learned_does_not_count_and_need_not_be_answered():
    hidden, weight, targets = student()
    targets[:30] = IGNORE
    states, head, _ = teacher()
    measure = DistillationLoss(2.0, 0.5, chunk=4)
    loss = measure(hidden, weight, targets, teacher=AllAnswers(states, head))
    loss.backward()
    expected, hidden.grad = hidden.grad, None
    states[:30] = 1e3
    rows = valid_rows(targets, 4)
    assert rows is not None
    picked = measure(hidden, weight, targets, rows, teacher=AllAnswers(states, head))
    picked.backward()
    assert picked.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad, expected)
    none = measure(hidden, weight, torch.full_like(targets, IGNORE), teacher=AllAnswers(states, head))
    assert none.item() == 0


def test_without_answers_it_is_the_cross_entropy():
    hidden, weight, targets = student()
    plain, measure = LinearCrossEntropy(chunk=8), DistillationLoss(2.0, 0.5, chunk=8)
    assert torch.equal(measure(hidden, weight, targets), plain(hidden, weight, targets))
    with torch.no_grad():
        assert torch.equal(measure(hidden, weight, targets), plain(hidden, weight, targets))
    assert measure.figures(lambda sums: sums) == {}


def test_a_student_like_its_teacher_learns_nothing_from_it_alone():
    hidden, weight, targets = student()
    answers = AllAnswers(hidden.detach(), TeacherHead(weight, None, VOCABULARY))
    loss = DistillationLoss(3.0, 1.0)(hidden, weight, targets, teacher=answers)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-3)
    assert hidden.grad.abs().max().item() < 1e-5


def test_a_higher_temperature_asks_for_unlikely_tokens_and_keeps_the_size_of_gradients():
    """At a high temperature the gradient is that of the logits' squared difference, per token of the vocabulary (Hinton, section 2.1)."""
    hidden, weight, targets = student()
    states, head, logits = teacher()
    DistillationLoss(1000.0, 1.0)(hidden, weight, targets, teacher=AllAnswers(states, head)).backward()
    own, asked = (hidden @ weight.T).detach().double(), logits
    difference = (own - own.mean(-1, keepdim=True)) - (asked - asked.mean(-1, keepdim=True))
    expected = (difference / VOCABULARY) @ weight.detach().double()
    expected[targets == IGNORE] = 0
    assert ((hidden.grad - expected).norm() / expected.norm()).item() < 0.02


def test_a_student_with_more_ids_than_the_tokenizer_gives_them_no_probability():
    hidden, weight, targets = student()
    wide = torch.cat([weight.detach(), torch.randn(9, WIDTH)]).requires_grad_()
    states, head, logits = teacher()
    padded = F.pad(logits, (0, 9), value=float("-inf"))
    expected, _, weight_gradient, _ = reference(hidden, wide, targets, padded, 2.0, 0.5)
    loss = DistillationLoss(2.0, 0.5)(hidden, wide, targets, teacher=AllAnswers(states, head))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(wide.grad.double(), weight_gradient, atol=1e-4, rtol=1e-4)


def test_logits_far_from_zero_do_not_overflow():
    hidden, weight, targets = student(scale=200.0)
    states, head, _ = teacher()
    loss = DistillationLoss(2.0, 0.5)(hidden, weight, targets, teacher=AllAnswers(states * 100, head))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()
