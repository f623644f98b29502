"""The measured peak: the rate of a matrix product that was timed here, whatever the dtype, and no random number used."""

from __future__ import annotations

import time

import pytest
import torch

from gpt.runtime.peak import measured_peak_flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_rate_of_a_large_product(dtype):
    state = torch.get_rng_state()
    started = time.perf_counter()
    peak = measured_peak_flops(dtype)
    assert time.perf_counter() - started < 5  # some 0.2 s where nothing else runs
    a = torch.ones(1024, 1024, dtype=dtype)
    seconds = []
    for _ in range(20):
        begun = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begun)
    assert 0.2 < peak / (2 * 1024**3 / min(seconds)) < 5  # other work on this machine comes and goes
    assert torch.equal(torch.get_rng_state(), state)


def test_more_work_at_once_is_not_taken_for_more_speed():
    """The rate is per second, not per product: of fp32 no CPU core is above a few TFLOP/s, and none below 0.1 GFLOP/s."""
    per_thread = measured_peak_flops(torch.float32) / torch.get_num_threads()
    assert 1e8 < per_thread < 5e12
