"""Fixtures for all tests: nothing reaches the network, and text comes from Python's own standard library."""

import gc
import os
import signal
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

import gpt.compose
import gpt.model.native_library
from tests.compositions import compose_once

os.environ["HF_HUB_OFFLINE"] = "1"
if device := os.environ.get("GPT_TEST_DEVICE"):  # runs that name no device take this one (tests/training/test_neuron_sim_runs.py)
    compose_run = gpt.compose.compose_run

    def compose_run_there(command: str, arguments: Sequence[str], *rest: Any) -> Any:
        named = any(argument.startswith(("device=", "device.name=")) for argument in arguments)
        return compose_run(command, arguments if named else [*arguments, f"device.name={device}"], *rest)

    gpt.compose.compose_run = compose_run_there
compose_once()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what is to run in the background; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("gpt", deadline=None)  # tests share their cores with others
settings.load_profile("gpt")


def pytest_collection_finish() -> None:
    """What is there once all tests are collected is not looked at again for garbage: it takes half a second, and every run asks for it."""
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None  # a run's end would undo it


def pytest_runtest_setup() -> None:
    """A test draws the same numbers in every run: limits of rounding are there to hold for any, but not for one draw in a thousand."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def stdlib_files() -> list[Path]:
    """Real text files of moderate size."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(p for p in root.glob("*.py") if 2_000 < p.stat().st_size < 60_000)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, stdlib_files: list[Path]) -> Path:
    """A folder of 40 small text files."""
    folder = tmp_path_factory.mktemp("corpus")
    for path in stdlib_files[:40]:
        (folder / path.name).write_text(path.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder for tokenised text."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session", autouse=True)
def native_library_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each C++ file is built once in a session of tests, by whichever process needs it first."""
    folder = tmp_path_factory.getbasetemp()
    gpt.model.native_library.CACHE = str((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "native")


@pytest.fixture(scope="session")
def sentencepiece_tokenizer():
    """A tokenizer of Llama 2's kind: spaces are "▁", one stands before every text, unknown characters fall back to bytes."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, normalizers

    from gpt.data.tokenizer import Tokenizer

    pieces = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁b", "ba", "▁ba"]
    merges = [("▁", "b"), ("b", "a"), ("▁b", "a")]
    backend = HFTokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "</s>"])
    return Tokenizer(backend)


# Small fine-tuning runs (tests/training/finetuning.py)


@pytest.fixture(scope="session")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model to fine-tune, as a Hugging Face directory."""
    from tests.training.finetuning import save_small_model

    return save_small_model(tmp_path_factory.mktemp("init") / "model")


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end with model/, without a report, which takes longer than the run."""
    monkeypatch.setattr("gpt.training.results.write_report", lambda directory, *_: directory / "report.html")
