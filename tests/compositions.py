"""What Hydra makes of a choice of groups, once in a process: it takes longer than a small run. Imports no torch."""

import copy
import functools
from typing import Any

import hydra

from gpt.arguments import config_directory

hydra_compose = hydra.compose


@functools.cache
def _composed(folder: str, root: str, overrides: tuple[str, ...]) -> Any:
    return hydra_compose(root, list(overrides))


def _compose(root: str, overrides: list[str]) -> Any:
    if any(override.startswith("hydra.searchpath=") for override in overrides):  # a user's own folder may change
        return hydra_compose(root, overrides)
    return copy.deepcopy(_composed(str(config_directory()), root, tuple(overrides)))


def compose_once() -> None:
    """From here on nothing is composed twice in this process."""
    hydra.compose = _compose
