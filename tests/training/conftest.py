from collections.abc import Callable
from pathlib import Path

import pytest

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


@pytest.fixture
def tiny_config(tmp_path: Path, corpus: Path, cache_dir: Path) -> Callable[..., RunConfig]:
    """Composes a run of a tiny model on a small corpus; takes overrides."""

    def compose(*overrides: str) -> RunConfig:
        places = [f"data.paths=[{corpus}]", f"data.cache_dir={cache_dir}", f"run.dir={tmp_path / 'runs'}"]
        return compose_run("pretrain", [*TINY, "data=text", *places, *overrides])

    return compose
