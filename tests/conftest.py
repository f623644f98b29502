"""Fixtures for all tests: nothing reaches the network, and text comes from Python's own standard library."""

import os
import sysconfig
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


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
