import copy

import pytest
import torch
from torch import Tensor, nn

from gpt import GPT, GPTConfig
from gpt.config import OptimizerConfig
from gpt.training.muon import NEWTON_SCHULZ, Muon, orthogonalise
from gpt.training.optimizer import AdamW, build_optimizers, set_learning_rate


def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=50, context_length=16, n_layer=2, n_head=2, d_model=32))


def reference(matrix: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz by the singular values of one matrix, each of which the polynomial maps alone, in fp64."""
    u, values, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / (values.norm() + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return u @ values.diag() @ vh


def snapshot(optimizers, parameters) -> list[bytes]:
    """Every bit of parameters and state."""
    state = [t for o in optimizers for p in parameters if p in o.state for _, t in sorted(o.state[p].items())]
    return [t.detach().numpy().tobytes() for t in (*parameters, *state)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 32, 48), (2, 16, 64), (2, 64, 16), (1, 1, 5), (0, 4, 4)])
def test_a_batch_is_orthogonalised_as_each_matrix_alone_would_be_exactly(shape, dtype):
    torch.manual_seed(0)
    batch = torch.randn(shape)
    done = orthogonalise(batch.to(dtype))
    assert (done.dtype, done.shape) == (dtype, shape)
    for matrix, ours in zip(batch, done, strict=True):
        torch.testing.assert_close(ours.double(), reference(matrix), atol=1e-4 if dtype == torch.float32 else 0.06, rtol=0)
        values = torch.linalg.svdvals(ours.float())
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_a_matrix_of_zeros_stays_one():
    assert orthogonalise(torch.zeros(1, 4, 6)).abs().max() == 0


def test_muon_is_momentum_decay_and_orthogonal_steps():
    torch.manual_seed(0)
    shapes = [(6, 8), (8, 6), (6, 8), (5, 5)]
    ours = [nn.Parameter(torch.randn(s)) for s in shapes]
    theirs, momenta = [p.detach().double() for p in ours], [torch.zeros(s, dtype=torch.float64) for s in shapes]
    optimizer = Muon(ours, lr=0.03, momentum=0.9, weight_decay=0.2, dtype=torch.float32)
    for step in range(1, 7):
        gradients = [torch.randn(s) for s in shapes]
        for p, g in zip(ours, gradients, strict=True):
            p.grad = g * 10**step
        optimizer.step(scale=torch.tensor(0.1**step))
        for p, m, g in zip(theirs, momenta, gradients, strict=True):
            m.mul_(0.9).add_(g, alpha=0.1)
            update = reference(0.1 * g + 0.9 * m)
            p.copy_(p * (1 - 0.03 * 0.2) - 0.03 * 0.2 * max(p.shape) ** 0.5 * update)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.double(), q, atol=2e-4, rtol=0)


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)])
def test_a_muon_update_has_adamws_size(shape):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape)
    Muon([p], lr=1.0, weight_decay=0.0).step()
    assert p.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


def test_muon_agrees_with_torchs():
    torch.manual_seed(0)
    start, gradients = torch.randn(32, 48), [torch.randn(32, 48) for _ in range(5)]
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    a = Muon([ours], lr=0.02, momentum=0.95, weight_decay=0.1)
    b = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=True, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    moved = (theirs - start).norm()
    assert ((ours - theirs).norm() / moved).item() < 0.02  # both iterate in bf16


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(name):
    gpt = model()
    optimizers = build_optimizers(OptimizerConfig(name=name, weight_decay=0.1), gpt, torch.float32)
    seen = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(seen) == len({id(p) for p in seen}) == len(list(gpt.parameters()))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            assert all((p.dim() >= 2) == (group["weight_decay"] > 0) for p in group["params"])
    assert len(optimizers) == (2 if name == "muon" else 1)


def test_muon_takes_the_blocks_matrices_only():
    gpt = model()
    muon, adamw = build_optimizers(OptimizerConfig(name="muon"), gpt, torch.float32)
    names = {p: n for n, p in gpt.named_parameters()}
    assert all(names[p].startswith("blocks.") and p.dim() == 2 for g in muon.param_groups for p in g["params"])
    assert gpt.embeddings.tokens.weight in {p for g in adamw.param_groups for p in g["params"]}


def test_frozen_parameters_are_in_no_group():
    gpt = model()
    gpt.embeddings.requires_grad_(False)
    seen = {p for o in build_optimizers(OptimizerConfig(), gpt, torch.float32) for g in o.param_groups for p in g["params"]}
    assert gpt.embeddings.tokens.weight not in seen


def test_set_learning_rate_keeps_the_ratio():
    optimizers = build_optimizers(OptimizerConfig(name="muon", lr=0.02, adam_lr=0.004), model(), torch.float32)
    set_learning_rate(optimizers, 0.5)
    assert [g["lr"] for o in optimizers for g in o.param_groups] == pytest.approx([0.01, 0.002, 0.002])


def test_under_muon_the_other_matrices_have_a_weight_decay_of_their_own():
    settings = {"weight_decay": 0.3, "adam_weight_decay": 0.05}
    muon, adamw = build_optimizers(OptimizerConfig(name="muon", **settings), model(), torch.float32)
    assert [g["weight_decay"] for g in (*muon.param_groups, *adamw.param_groups)] == [0.3, 0.05, 0.0]
    (alone,) = build_optimizers(OptimizerConfig(name="adamw", **settings), model(), torch.float32)
    assert [g["weight_decay"] for g in alone.param_groups] == [0.3, 0.0]


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_torchs_on_gradients_that_were_scaled_before(fused):
    torch.manual_seed(0)
    start = [torch.randn(s) for s in [(7, 5), (33,), (1,)]]
    ours, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    a = AdamW(ours, lr=0.02, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, fused=fused)
    b = torch.optim.AdamW(theirs, lr=0.02, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, fused=True)
    scale = torch.tensor(1 / 3)
    for _ in range(10):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad * scale
        a.step(scale=scale, apply=torch.ones(()))
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(a.state[p][key], b.state[q][key], atol=1e-7, rtol=1e-6)


def test_a_gradient_that_lies_in_memory_by_columns_is_read_by_its_rows():
    torch.manual_seed(0)
    start, gradient = torch.randn(4, 6), torch.randn(4, 6)
    plain, turned = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    plain.grad, turned.grad = gradient.clone(), gradient.mT.contiguous().mT
    for p in (plain, turned):
        AdamW([p], lr=0.1).step()
    assert torch.equal(plain, turned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "fused"), [("muon", True), ("adamw", True), ("adamw", False)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0])
def test_a_step_that_is_left_out_leaves_no_trace(name, fused, bad, dtype):
    """Also as the very first one, also where a weight is -0, and whatever scale comes of such gradients."""
    gpt = model()
    twin = copy.deepcopy(gpt)
    config = OptimizerConfig(name=name)
    left_out, never_saw = (build_optimizers(config, m, dtype, fused=fused) for m in (gpt, twin))
    for step in range(4):
        with torch.no_grad():
            for p in (*gpt.parameters(), *twin.parameters()):
                p.view(-1)[::7] = -0.0
        if step != 1:  # bad ones before steps 0, 2 and 3
            for p in gpt.parameters():
                p.grad = torch.randn_like(p)
                p.grad.view(-1)[::3] = bad
            before = snapshot(left_out, list(gpt.parameters()))
            for optimizer in left_out:
                optimizer.step(scale=torch.tensor(1 / bad), apply=torch.zeros(()))
            after = snapshot(left_out, list(gpt.parameters()))
            assert before == (after if step else after[: len(before)])
        torch.manual_seed(step)
        for p, q in zip(gpt.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in left_out:
            optimizer.step(scale=torch.tensor(0.5), apply=torch.ones(()))
        for optimizer in never_saw:
            optimizer.step(scale=torch.tensor(0.5))
        assert snapshot(left_out, list(gpt.parameters())) == snapshot(never_saw, list(twin.parameters()))


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_state_is_all_there_is_to_a_run(name):
    """A run taken up half-way, from tensors alone, ends with the bits of one that did not stop."""
    gpt = model()
    config = OptimizerConfig(name=name)
    optimizers = build_optimizers(config, gpt, torch.bfloat16)

    def train(m: GPT, os, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            set_learning_rate(os, 1 / (1 + step))
            for i, p in enumerate(m.parameters()):
                p.grad = None if (step + i) % 5 == 0 else torch.randn_like(p)  # some have none now and then
            for o in os:
                o.step(scale=torch.tensor(0.5), apply=torch.tensor(float(step != 4)))

    train(gpt, optimizers, range(5))
    resumed = copy.deepcopy(gpt)
    stored = {n: {k: t.clone() for k, t in o.state[p].items()} for o in optimizers for n, p in gpt.named_parameters() if p in o.state}
    assert all(isinstance(t, Tensor) for state in stored.values() for t in state.values())
    fresh = build_optimizers(config, resumed, torch.bfloat16)
    for optimizer in fresh:
        own = {p for g in optimizer.param_groups for p in g["params"]}
        for n, p in resumed.named_parameters():
            if p in own:
                optimizer.state[p] = stored[n]
    train(gpt, optimizers, range(5, 10))
    train(resumed, fresh, range(5, 10))
    assert snapshot(optimizers, list(gpt.parameters())) == snapshot(fresh, list(resumed.parameters()))


def test_parameters_without_a_gradient_stay_as_they_are():
    gpt = model()
    before = [p.detach().clone() for p in gpt.parameters()]
    for optimizer in build_optimizers(OptimizerConfig(), gpt, torch.float32):
        optimizer.step(scale=torch.ones(()), apply=torch.ones(()))
        assert not optimizer.state
    assert all(torch.equal(p, q) for p, q in zip(gpt.parameters(), before, strict=True))
