"""`gpt runs` and `gpt runs compare`."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from gpt.commands import RunsCompareConfig, RunsConfig
from gpt.errors import UserError
from gpt.runs.compare import differing_keys, short_names, write_comparison
from gpt.runs.listing import ORDERS, describe_run, find_run, find_runs, format_table


def runs(config: RunsConfig) -> int:
    """Carry out `gpt runs`."""
    directory = _directory(config.dir)
    paths = find_runs(directory)
    if not paths:
        print(f"no runs in {config.dir} yet; gpt pretrain makes one" if config.dir == RunsConfig.dir else f"no runs in {config.dir}")
        return 0
    rows = sorted(map(describe_run, paths), key=ORDERS[config.sort])
    print(format_table(rows, [row.path.relative_to(directory).as_posix() for row in rows]))
    return 0


def compare(config: RunsCompareConfig) -> int:
    """Carry out `gpt runs compare`."""
    page = Path(os.path.expanduser(config.output))
    if page.is_dir() or not page.parent.is_dir():
        wrong = "is a folder; name a file in it" if page.is_dir() else f"there is no folder {page.parent}; make it, or write elsewhere"
        raise UserError(f"output={config.output}: {wrong}")
    directory = _directory(config.dir)
    found = {path.resolve(): path for path in (find_run(name, directory) for name in config.runs)}
    if len(found) < 2:
        raise UserError(f"runs: {', '.join(config.runs)} are all the same run; name another one to compare it with")
    rows = sorted(map(describe_run, found.values()), key=ORDERS["val_loss"])
    names = short_names([row.path for row in rows])
    write_comparison([row.path for row in rows], page, f"{len(rows)} runs compared" if len(rows) > 2 else " and ".join(names))
    print(format_table(rows, names))
    if differing := differing_keys(rows):
        print(f"\nThey differ in: {', '.join(differing)}")
    print(f"page: {page}")
    return 0


def _directory(name: str) -> Path:
    """The folder of runs; only the default one need not be there yet.

    Raises:
        UserError: it is not.
    """
    path = Path(os.path.expanduser(name))
    if not os.path.isdir(path) and (name != RunsConfig.dir or os.path.exists(path)):
        beside = [entry.name for entry in path.parent.glob("*/")] if not os.path.exists(path) else []
        near = difflib.get_close_matches(path.name, beside, 1, 0.6)
        raise UserError(f"dir={name}: there is no such folder" + (f". Did you mean {path.parent / near[0]}?" if near else ""))
    return path
