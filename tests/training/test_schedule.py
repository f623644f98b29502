import itertools

import pytest

from gpt.config import ScheduleConfig
from gpt.training.schedule import learning_rate_factor


def curve(total=100, **settings):
    config = ScheduleConfig(**settings)
    return [learning_rate_factor(config, step, total, step / total) for step in range(total)]


@pytest.mark.parametrize("warmup", [10, 0.1])
@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_warmup_is_linear_up_to_the_peak(name, warmup):
    factors = curve(name=name, warmup=warmup)
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(factors) == pytest.approx(1)


def test_cosine_falls_to_its_final_share():
    factors = curve(name="cosine", warmup=0, final=0.1)
    assert factors[50] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(factors))


def test_wsd_is_flat_then_linear():
    factors = curve(name="wsd", warmup=0, decay=0.2, final=0.0)
    assert factors[:80] == [1.0] * 80
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05)


def test_constant_stays():
    assert curve(name="constant", warmup=0) == [1.0] * 100


def test_a_time_budget_goes_by_progress():
    config = ScheduleConfig(name="cosine", warmup=0.1, final=0.0)
    assert learning_rate_factor(config, 7, None, 0.05) == pytest.approx(0.5)
    assert learning_rate_factor(config, 7, None, 0.55) == pytest.approx(0.5)
    assert learning_rate_factor(config, 0, None, 0.0) > 0


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_never_negative_nor_above_one(name):
    for warmup, decay, progress in itertools.product([0, 0.5, 1, 5, 1.0], [0, 0.5, 1], [0, 0.5, 1]):
        config = ScheduleConfig(name=name, warmup=warmup, decay=decay)
        for total in (1, 10, None):
            assert 0 <= learning_rate_factor(config, 3, total, progress) <= 1
