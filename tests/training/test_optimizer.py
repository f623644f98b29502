import pytest
import torch

from gpt import GPT, GPTConfig
from gpt.config import OptimizerConfig
from gpt.training.optimizer import Muon, build_optimizers, orthogonalise, set_learning_rate


def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=50, context_length=16, n_layer=2, n_head=2, d_model=32))


@pytest.mark.parametrize("shape", [(3, 32, 48), (2, 16, 64), (2, 64, 16)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_batch_is_orthogonalised_as_each_alone():
    torch.manual_seed(0)
    batch = torch.randn(4, 24, 40)
    alone = torch.stack([orthogonalise(m[None])[0] for m in batch])
    torch.testing.assert_close(orthogonalise(batch).float(), alone.float(), atol=2e-2, rtol=0)


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
    optimizers = build_optimizers(OptimizerConfig(name=name, weight_decay=0.1), gpt)
    seen = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(seen) == len({id(p) for p in seen}) == len(list(gpt.parameters()))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            assert all((p.dim() >= 2) == (group["weight_decay"] > 0) for p in group["params"])
    assert len(optimizers) == (2 if name == "muon" else 1)


def test_muon_takes_the_blocks_matrices_only():
    gpt = model()
    muon, adamw = build_optimizers(OptimizerConfig(name="muon"), gpt)
    names = {p: n for n, p in gpt.named_parameters()}
    assert all(names[p].startswith("blocks.") and p.dim() == 2 for g in muon.param_groups for p in g["params"])
    assert gpt.embeddings.tokens.weight in {p for g in adamw.param_groups for p in g["params"]}


def test_frozen_parameters_are_in_no_group():
    gpt = model()
    gpt.embeddings.requires_grad_(False)
    seen = {p for o in build_optimizers(OptimizerConfig(), gpt) for g in o.param_groups for p in g["params"]}
    assert gpt.embeddings.tokens.weight not in seen


def test_set_learning_rate_keeps_the_ratio():
    optimizers = build_optimizers(OptimizerConfig(name="muon", lr=0.02, adam_lr=0.004), model())
    set_learning_rate(optimizers, 0.5)
    assert [g["lr"] for o in optimizers for g in o.param_groups] == pytest.approx([0.01, 0.002, 0.002])
