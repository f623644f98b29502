"""The step that makes a token, compiled: the same tokens, and no second compilation for another text."""

from __future__ import annotations

import pytest
import torch
from inference_models import GREEDY, alone, prompt_of, random_model, rows_of
from torch._dynamo.utils import counters

from gpt.config import DeviceConfig
from gpt.inference.decode import generate_tokens
from gpt.inference.sampling import Sampling
from gpt.runtime.device import find_device

OBSTACLE = find_device(DeviceConfig("cpu")).compile_obstacle()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))]
SAMPLED = Sampling(temperature=1.2, top_p=0.95, repetition_penalty=1.1, seed=3)


def test_compiled_it_makes_the_same_tokens_and_compiles_once():
    model = random_model("qwen3", context_length=600)
    torch._dynamo.reset()
    counters.clear()
    assert alone(model, prompt_of(9), 40, compiled=True) == alone(model, prompt_of(9), 40)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 1
    for length in (1, 30, 100):  # all within a cache of 256
        assert alone(model, prompt_of(length), 40, SAMPLED, compiled=True) == alone(model, prompt_of(length), 40, SAMPLED)
    assert counters["stats"]["unique_graphs"] == graphs

    prompts = [prompt_of(length) for length in (3, 17, 8)]  # padding is another graph, of which there is one too
    for chosen in (prompts, prompts[::-1]):
        expected = rows_of(list(generate_tokens(model, chosen, 30, GREEDY, n=2)))
        assert rows_of(list(generate_tokens(model, chosen, 30, GREEDY, n=2, compiled=True))) == expected
    assert counters["stats"]["unique_graphs"] == graphs + 1


def test_compiled_it_slides_too():
    model = random_model("gpt2", context_length=24)
    assert alone(model, prompt_of(9), 60, compiled=True, overflow="slide") == alone(model, prompt_of(9), 60, overflow="slide")
