"""Fixtures of what prepares data."""

from pathlib import Path

import pytest

from tests.data.workshop import Workshop


@pytest.fixture
def short_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fast encoder, by the slow one, which would take most of the time."""
    monkeypatch.setattr("gpt.data.survey.CHECK_CHARACTERS", 2000)


@pytest.fixture
def workshop(corpus: Path, tmp_path: Path, short_check: None) -> Workshop:
    return Workshop(corpus, tmp_path)
