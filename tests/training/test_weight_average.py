"""Averages of what is sharded are in test_distributed_optimizer.py."""

import pytest
import torch
from torch import Tensor, nn

from gpt.training.weight_average import UPDATES, WeightAverage


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    made[1].bias.requires_grad_(False)
    return made


@torch.no_grad()
def move(m: nn.Module, step: int) -> None:
    torch.manual_seed(100 + step)
    for p in m.parameters():
        p.add_(torch.randn_like(p))


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_average_is_a_loop_in_fp64(decay):
    m = model()
    average = WeightAverage(m, decay)
    expected = {name: p.detach().double() for name, p in m.named_parameters() if p.requires_grad}
    updates = 0
    for step in range(40):
        move(m, step)
        apply = step % 4 != 1
        average.update(torch.tensor(float(apply)))
        if apply:
            updates += 1
            d = min(decay, (1 + updates) / (10 + updates))
            for name, p in m.named_parameters():
                if name in expected:
                    expected[name] = d * expected[name] + (1 - d) * p.detach().double()
    tensors = average.tensors()
    assert tensors.pop(UPDATES) == updates == 30
    assert tensors.keys() == expected.keys() == {"0.weight", "0.bias", "1.weight"}
    for name, value in expected.items():
        assert tensors[name].dtype == torch.float32
        torch.testing.assert_close(tensors[name].double(), value, atol=1e-6, rtol=1e-6)


def test_the_model_has_the_average_within_the_block_and_its_own_weights_after_it():
    m = model()
    average = WeightAverage(m, 0.9)
    move(m, 0)
    average.update()
    own = {name: p.detach().clone() for name, p in m.named_parameters()}
    averages = {name: t.clone() for name, t in average.tensors().items()}
    with average.swapped():
        assert all(torch.equal(p, averages.get(name, own[name])) for name, p in m.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in m.named_parameters())
    with pytest.raises(RuntimeError, match="within"), average.swapped():
        raise RuntimeError("within")
    assert all(torch.equal(p, own[name]) for name, p in m.named_parameters())
    assert all(torch.equal(t, averages[name]) for name, t in average.tensors().items())


def test_what_is_loaded_goes_on_as_what_was_saved():
    m = model()
    average = WeightAverage(m, 0.9)
    for step in range(3):
        move(m, step)
        average.update()
    stored: dict[str, Tensor] = {name: t.clone() for name, t in average.tensors().items()}
    other = model()
    other.load_state_dict(m.state_dict())
    resumed = WeightAverage(other, 0.9)
    for name, t in resumed.tensors().items():
        t.copy_(stored[name])
    for step in range(3, 6):
        for one, its in ((m, average), (other, resumed)):
            move(one, step)
            its.update()
    assert all(torch.equal(t, resumed.tensors()[name]) for name, t in average.tensors().items())
