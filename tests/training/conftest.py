from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt.compose import compose_run
from gpt.config import RunConfig

TINY = [
    "debug=golden",
    "train.log_every=1",
    "train.eval_every=0",
    "train.eval_tokens=1024",
    "train.final_eval_tokens=1024",
    "train.sample_prompts=[import]",
    "train.sample_tokens=4",
]
needs_neuron_sim = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="the simulated device needs torch 2.13, as TorchNeuron does"
)


@pytest.fixture
def tiny_config(tmp_path: Path, corpus: Path, cache_dir: Path) -> Callable[..., RunConfig]:
    """Composes a run of a tiny model on a small corpus; takes overrides."""

    def compose(*overrides: str) -> RunConfig:
        places = [f"data.paths=[{corpus}]", f"data.cache_dir={cache_dir}", f"run.dir={tmp_path / 'runs'}"]
        return compose_run("pretrain", [*TINY, "data=text", *places, *overrides])

    return compose


def settings(tmp_path: Path, cache_dir: Path) -> list[str]:
    """A tiny run of which every step is logged."""
    return ["debug=golden", f"data.cache_dir={cache_dir}", f"run.dir={tmp_path / 'runs'}", "train.sample_tokens=2", "train.log_every=1"]


@pytest.fixture
def text_run(tmp_path: Path, corpus: Path, cache_dir: Path) -> Callable[..., RunConfig]:
    """Configs of tiny runs on real text."""

    def make(*overrides: str) -> RunConfig:
        places = ["data=text", f"data.paths=[{corpus}]", *settings(tmp_path, cache_dir)]
        return compose_run("pretrain", [*places, "train.eval_tokens=1024", "train.final_eval_tokens=1024", *overrides])

    return make
