"""What a check is and what it returns; small things that several checks need. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt.commands import DoctorConfig

State = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Result:
    """What a check returns.

    Attributes:
        state: ok: as it should be, or of no concern here; warning: training works, but slower or not for long; problem: something does not.
        found: what there is, in words.
        fix: of a warning or a problem: the command or setting that mends it; of several troubles, a line for each.
    """

    state: State
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert bool(self.fix) == (self.state != "ok"), self


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        name: of the row.
        run: the check, a function of a module, so that another process can import it.
        seconds: after which it counts as stuck and is ended.
        if_stuck: the fix where it has to be ended, or ends the process that it runs in.
        needs: the name of an earlier check without which there is nothing to find out.
        lets_go: the process that it runs in is ended after it, so that devices which it holds are free for the next checks.
    """

    name: str
    run: Callable[[DoctorConfig], Result]
    seconds: float = 20
    if_stuck: str = "run gpt doctor again when the machine has less to do; else it is a fault of gpt doctor, please report it"
    needs: str = ""
    lets_go: bool = False


def one_line(text: object, most: int = 300) -> str:
    """A message on one line, cut if it is long."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


def gib(number: float) -> str:
    """Bytes in GiB, with a decimal where it matters."""
    value = number / 2**30
    return f"{value:.1f} GiB" if value < 9.95 else f"{value:.0f} GiB"


def nearest_folder(path: Path) -> Path:
    """A path, or of one that is not there, the nearest one above it that is."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())
