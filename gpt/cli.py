"""The `gpt` command: find the command, compose its config, hand over.

Nothing here imports torch, so help and config errors come at once. Exit codes: 0 done, 1 our fault (or that `gpt doctor`
found a problem), 2 the user's input, 130/143 interrupted.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt import __version__
from gpt.commands import COMMANDS, ModelUse
from gpt.config import RunConfig
from gpt.errors import UserError, exit_code_of

# Where each command is carried out: imported when it is, since most need torch.
_RUNS = {
    "pretrain": "gpt.launch:launch",
    "finetune": "gpt.launch:launch",
    "generate": "gpt.inference.command:generate",
    "evaluate": "gpt.evaluation.command:evaluate",
    "parity": "gpt.training.parity:parity",
    "precompile": "gpt.launch:precompile",
    "export": "gpt.training.export:export",
    "prepare": "gpt.data.command:prepare",
    "inspect": "gpt.inspection.command:inspect",
    "inspect tokens": "gpt.inspection.command:inspect_tokens",
    "runs": "gpt.runs.command:runs",
    "runs compare": "gpt.runs.command:compare",
    "jobs": "gpt.aws.command:jobs",
    "jobs list": "gpt.aws.command:jobs",
    "jobs status": "gpt.aws.command:status",
    "jobs logs": "gpt.aws.command:logs",
    "jobs wait": "gpt.aws.command:wait",
    "jobs stop": "gpt.aws.command:stop",
    "jobs fetch": "gpt.aws.command:fetch",
    "doctor": "gpt.doctor.command:doctor",
}
FLAGS = ("--help", "--cfg", "--config-dir", "--multirun", "-m", "--version")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one `gpt` command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a character that the terminal does not have is no reason to stop
    return exit_code_of(lambda: _dispatch(arguments))


def run() -> None:
    """The `gpt` console script: `main`, then the end of the process, also while a compilation goes on in the background."""
    warnings.formatwarning = _warning
    code = main()
    if threading.active_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


_pythons_warning = warnings.formatwarning


def _warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """Our own warnings in a line, as all that a command says; others' as Python shows them, with their place."""
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parent):
        return f"gpt: warning: {message}\n"
    return _pythons_warning(message, category, filename, lineno, line)


def _dispatch(arguments: list[str]) -> int:
    from gpt import help as help_text
    from gpt.typed import nearest, nearest_and_all

    if arguments[:1] == ["--version"]:
        print(f"gpt {__version__}")
        return 0
    arguments = ["--help", *arguments[1:]] if arguments[:1] == ["help"] else arguments
    wants_help = "-h" in arguments or "--help" in arguments
    command, *rest = [a for a in arguments if a not in ("-h", "--help")] or [""]
    if rest and f"{command} {rest[0]}" in COMMANDS:
        command = f"{command} {rest.pop(0)}"
    if not command and len(arguments) == wants_help:
        print(help_text.overview())
        return 0
    if command not in COMMANDS:
        if command in FLAGS or "=" in command:
            raise UserError(f"{command}: the command comes first: gpt {next(iter(COMMANDS))} {command}")
        if command.startswith("-"):
            raise UserError(f"{command}: no such flag{nearest_and_all(command, FLAGS)}")
        raise UserError(f"{command or repr('')}: no such command{nearest_and_all(command, COMMANDS)}")
    for longer in COMMANDS:
        of, _, word = longer.partition(" ")
        if of == command and word and rest and nearest(rest[0], [word]):
            raise UserError(f"{command} {rest[0]}: no such command. Did you mean gpt {longer}?")
    rest, config_dir, show, multirun = _options(rest, COMMANDS[command].flags)
    if config_dir and not COMMANDS[command].root:
        raise UserError(f"--config-dir {config_dir}: gpt {command} has no config groups")
    if wants_help:
        print(help_text.command(command, config_dir))
        return 0
    if multirun:
        if not COMMANDS[command].trains:
            raise UserError(f"-m: gpt {command} has no sweeps; they are of gpt pretrain and gpt finetune")
        from gpt.sweep import sweep

        return sweep(command, rest, config_dir, show)
    return _run_command(command, rest, config_dir, show)


def _options(arguments: list[str], own: Sequence[str]) -> tuple[list[str], Path | None, bool, bool]:
    """Split off --config-dir DIR, --cfg and -m; what remains is key=value, as the command's own flags become."""
    rest: list[str] = []
    config_dir, show, multirun = None, False, False
    iterator = iter(arguments)
    for argument in iterator:
        if argument == "--cfg":
            show = True
        elif argument in ("-m", "--multirun"):
            multirun = True
        elif argument == "--config-dir" or argument.startswith("--config-dir="):
            value = argument.partition("=")[2] or next(iterator, "")
            if not value:
                raise UserError("--config-dir: which folder?")
            config_dir = Path(value)
        elif argument.startswith("--") and argument[2:] in own:
            rest.append(f"{argument[2:]}=true")
        elif argument.startswith("-"):
            from gpt.typed import nearest_and_all

            plain = f". Settings are written without dashes: {argument.lstrip('-')}" if "=" in argument else ""
            raise UserError(f"{argument}: no such flag{plain or nearest_and_all(argument, (*FLAGS, *(f'--{key}' for key in own)))}")
        else:
            rest.append(argument)
    return rest, config_dir, show, multirun


def _run_command(command: str, arguments: list[str], config_dir: Path | None, show: bool) -> int:
    from gpt.arguments import sweep_values
    from gpt.compose import compose_run, compose_use

    compose, trains = compose_run if COMMANDS[command].config is RunConfig else compose_use, COMMANDS[command].trains
    try:
        config: Any = compose(command, arguments, config_dir)
    except UserError as error:
        wrong = [a for a in arguments if str(error).startswith(f"{a}:") and len(sweep_values(a, config_dir)) > 1] if trains else []
        if wrong:
            raise UserError(f"{str(error).rstrip('.')}{'' if str(error).endswith('?') else '.'} Add -m for a run of each value") from error
        raise
    if isinstance(config, RunConfig):
        _refuse_search(command, arguments, config)
    if show:
        import yaml

        from gpt.typed import plain

        print(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True), end="")
        return 0
    if isinstance(config, RunConfig) and config.freeze.name == "search":
        from gpt.plan_search import search

        return search(arguments, config, config_dir)
    if isinstance(config, (ModelUse, RunConfig)):
        from gpt.runtime.environment import prepare_environment

        prepare_environment(config.device_config if isinstance(config, ModelUse) else config.device)
    module, _, function = _RUNS[command].partition(":")
    return getattr(importlib.import_module(module), function)(config)


def _refuse_search(command: str, arguments: Sequence[str], config: RunConfig) -> None:
    """Raises UserError where what is of freeze=search is given to something else."""
    if config.freeze.name == "search" and command != "finetune":
        raise UserError(f"freeze=search: gpt {command} tries no plans, gpt finetune does; choose one plan, such as freeze=none")
    own = [argument for argument in arguments if argument.startswith("freeze.search_")]
    if own and config.freeze.name != "search":
        raise UserError(f"{own[0]}: is of freeze=search, and this is freeze={config.freeze.name}; add freeze=search")


if __name__ == "__main__":
    run()
