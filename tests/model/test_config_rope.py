"""The rope_* fields of GPTConfig: their ranges, and where they may be used."""

from __future__ import annotations

import math

import pytest

from gpt import GPTConfig

ROTARY = {"positions": "rotary"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rope_scaling": "llama3"}, "rope_scaling=llama3 with positions=learned must be none: nothing is rotated there"),
        ({**ROTARY, "rope_scaling": "yarn"}, "rope_scaling=yarn must be one of none, llama3"),
        ({"rope_scaling_factor": 0.5}, "rope_scaling_factor=0.5 must be at least 1 and finite"),
        ({"rope_scaling_factor": math.inf}, "rope_scaling_factor=inf must be at least 1 and finite"),
        ({"rope_scaling_factor": math.nan}, "rope_scaling_factor=nan must be at least 1 and finite"),
        ({"rope_low_frequency_factor": 0.0}, "rope_low_frequency_factor=0.0 must be greater than 0 and finite"),
        (
            {"rope_low_frequency_factor": 4.0},
            "rope_high_frequency_factor=4.0 must be greater than rope_low_frequency_factor=4.0 and finite",
        ),
        (
            {"rope_high_frequency_factor": math.nan},
            "rope_high_frequency_factor=nan must be greater than rope_low_frequency_factor=1.0 and finite",
        ),
        ({"rope_original_context": 0}, "rope_original_context=0 must be at least 1"),
    ],
)
def test_values_that_are_refused(values, said):
    with pytest.raises(ValueError) as caught:
        GPTConfig(**values)
    assert str(caught.value) == said


def test_scaling_as_the_tables_take_it():
    assert GPTConfig(**ROTARY).llama3_scaling is None
    config = GPTConfig(**ROTARY, rope_scaling="llama3", rope_scaling_factor=2.0, rope_original_context=64)
    assert config.llama3_scaling == (2.0, 1.0, 4.0, 64)
