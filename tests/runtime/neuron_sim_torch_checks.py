"""What torch has around tensors, on the simulated device; run in a process of its own by test_neuron_sim.py."""

import copy
import io
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpt.runtime.neuron_sim import install

RECORD = install()


@pytest.fixture(autouse=True)
def fresh():
    install(unsupported=(), strict=False)
    torch.manual_seed(0)
    RECORD.clear()


def test_installing_again_is_the_same():
    assert install() is RECORD
    assert torch.neuron is sys.modules["torch.neuron"]


def test_accelerator():
    assert torch.accelerator.current_accelerator(check_available=True).type == "neuron"
    assert (torch.accelerator.device_count(), torch.accelerator.current_device_index()) == (1, 0)
    torch.accelerator.set_device_index(0)
    torch.accelerator.synchronize()
    torch.accelerator.empty_cache()
    torch.neuron.synchronize()
    torch.neuron.manual_seed_all(1)
    import torch_neuronx

    assert torch_neuronx.__version__.startswith(".".join(torch.__version__.split(".")[:2]))


def test_events_tell_the_time():
    first, second = torch.Event("neuron", enable_timing=True), torch.Event("neuron", enable_timing=True)
    first.record()
    time.sleep(0.02)
    second.record()
    second.synchronize()
    assert second.query()
    assert 20 <= first.elapsed_time(second) < 2000
    with pytest.raises(ValueError, match="enable_timing"):
        first.elapsed_time(torch.Event("neuron"))
    with pytest.raises(ValueError, match="recorded"):
        first.elapsed_time(torch.Event("neuron", enable_timing=True))
    assert type(torch.Event("cpu")) is not type(first)


def test_random_numbers_are_the_cpus():
    torch.manual_seed(3)
    expected = torch.randn(5), torch.rand(5), torch.randint(9, (5,)), torch.randperm(5), F.dropout(torch.ones(9), 0.5)
    torch.manual_seed(3)
    where = {"device": "neuron"}
    found = (
        torch.randn(5, **where), torch.rand(5, **where), torch.randint(9, (5,), **where), torch.randperm(5, **where),
        F.dropout(torch.ones(9, **where), 0.5),
    )  # fmt: skip
    assert all(torch.equal(e, f.cpu()) for e, f in zip(expected, found, strict=True))


def test_autocast_is_cudas():
    a = torch.randn(4, 4).to("neuron")
    with torch.autocast("neuron", torch.bfloat16):
        assert torch.is_autocast_enabled("neuron")
        assert (a @ a).dtype == F.linear(a, a).dtype == torch.bfloat16
        assert (a + a).dtype == (a @ a).softmax(-1).dtype == F.layer_norm((a @ a), (4,)).dtype == torch.float32
        assert F.cross_entropy(a @ a, torch.arange(4).to("neuron")).dtype == torch.float32
        with torch.autocast("neuron", enabled=False):
            assert (a @ a).dtype == torch.float32
    assert (a @ a).dtype == torch.float32
    bf16 = a.cpu().bfloat16()
    with torch.autocast("neuron", torch.bfloat16):
        assert torch.equal((a @ a).cpu(), bf16 @ bf16)


def test_saved_loaded_copied():
    d = torch.randn(4, 3).to("neuron")
    file = io.BytesIO()
    torch.save({"a": d, "view": d[1:], "p": nn.Parameter(d)}, file)
    file.seek(0)
    loaded = torch.load(file)
    assert loaded["a"].device.type == "neuron"
    assert torch.equal(loaded["a"], d)
    loaded["a"][1] = 0
    assert not loaded["view"][0].any()
    file.seek(0)
    assert torch.equal(torch.load(file, map_location="cpu")["view"], d[1:].cpu())
    file.seek(0)
    assert torch.load(file, map_location="neuron")["a"].device.type == "neuron"
    other = copy.deepcopy(d)
    other.zero_()
    assert d.any()
    from safetensors.torch import load, save

    assert torch.equal(load(save({"d": d}))["d"], d.cpu())
    fresh = torch.empty_like(d)
    fresh.copy_(load(save({"d": d}))["d"], non_blocking=True)
    assert torch.equal(fresh, d)
    host = torch.empty(4, 3)
    host.copy_(d, non_blocking=True)
    assert torch.equal(host, d.cpu())


def test_modules_move():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    before = [p.clone() for p in model.parameters()]
    model.to("neuron")
    assert all(p.device.type == "neuron" and torch.equal(p.cpu(), b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(copy.deepcopy(model).parameters(), model.parameters(), strict=True))
    with torch.device("meta"):
        empty = nn.Linear(3, 4)
    empty.to_empty(device="neuron")
    empty.load_state_dict(nn.Linear(3, 4).state_dict())
    assert empty(torch.ones(2, 3, device="neuron")).shape == (2, 4)
    with torch.device("neuron"):
        assert nn.Linear(2, 2).weight.device.type == torch.zeros(2).device.type == "neuron"
    assert model.cpu()[0].weight.device.type == "cpu"


def test_a_tie_does_not_survive_the_move():
    """As on the hardware: `.to()` makes new parameters where it cannot swap their data, and one for each place."""
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model[1].weight = model[0].weight
    model.to("neuron")
    assert model[1].weight is not model[0].weight


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"capturable": True}])
def test_adamw(options):
    weights, results = torch.randn(3, 4), []
    for device in ("cpu", "neuron"):
        p = nn.Parameter(weights.clone().to(device))
        optimizer = torch.optim.AdamW([p], lr=0.1, **(options if device == "neuron" else {"foreach": options.get("foreach")}))
        for _ in range(3):
            (p.square().sum() + p.sum()).backward()
            torch.nn.utils.clip_grad_norm_([p], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        results.append(p.detach().cpu())
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)


def test_an_operation_costs_little():
    d = torch.randn(8, 8).to("neuron")
    started = time.perf_counter()
    for _ in range(2000):
        _ = d + d
    assert time.perf_counter() - started < 2000 * 250e-6  # ten times what it is on a machine with nothing else to do
