"""`gpt doctor`: the list of checks, the table and the JSON. Imports no torch: a torch that is broken is one of its findings."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gpt import __version__
from gpt.commands import DoctorConfig
from gpt.doctor import accelerators, cloud, devices, machine, neuron, processes
from gpt.doctor.result import Check
from gpt.doctor.runner import Row, run_checks

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_DRIVER = "the driver does not answer: see nvidia-smi or neuron-ls, and restart the machine if they hang too"
_TORCH = "pip install --force-reinstall torch; an old processor may need another build of it"
_DISK = "run.dir=<folder on another disk>: this one does not answer"
_NETWORK = "see that AWS can be reached from here (a proxy, a VPC endpoint)"

CHECKS = (
    Check("Python", machine.python),
    Check("torch", devices.torch_build, seconds=60, if_stuck=_TORCH),
    Check("processor", devices.processor, if_stuck=_TORCH, needs="torch"),
    Check("bf16 instructions", devices.bf16_instructions, if_stuck=_TORCH, needs="torch"),
    Check("accelerators", accelerators.accelerators, seconds=120, if_stuck=_DRIVER, needs="torch"),
    Check("flash attention", accelerators.flash_attention, seconds=60, if_stuck=_DRIVER, needs="torch", lets_go=True),
    Check("torch.compile", processes.compiler, seconds=90, if_stuck="compile=false until it is mended", needs="torch"),
    Check("torch-neuronx", neuron.package),
    Check("Neuron cores", neuron.cores, seconds=30, if_stuck=_DRIVER),
    Check("run directory", machine.run_directory, if_stuck=_DISK),
    Check("/dev/shm", machine.shared_memory),
    Check("open files", machine.open_files),
    Check("process limit", machine.process_limit),
    Check("process group", processes.process_group, seconds=40, needs="torch"),
    Check("Hugging Face", cloud.hugging_face, if_stuck="export HF_HOME=<folder on another disk>: this one does not answer"),
)
AWS_CHECKS = (
    Check("AWS credentials", cloud.aws_credentials, seconds=30, if_stuck=_NETWORK),
    Check("AWS region", cloud.aws_region, if_stuck=_NETWORK),
    Check("AWS role", cloud.aws_role, if_stuck=_NETWORK),
)
_COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor(config: DoctorConfig) -> int:
    """Carry out `gpt doctor`; 0 if nothing is a problem, else 1."""
    checks = (*CHECKS, *(AWS_CHECKS if config.aws else ()))
    return report(checks, config)


def report(checks: Sequence[Check], config: DoctorConfig) -> int:
    """Carry out checks and print them, as a table or as one JSON object; 0 if nothing is a problem, else 1."""
    from rich.console import Console

    progress = Console(stderr=True)
    if progress.is_terminal:
        with progress.status("starting") as status:
            rows = run_checks(checks, config, _announcer(status.update, len(checks)))
    else:
        rows = run_checks(checks, config)
    if config.json:
        print(json.dumps(as_json(rows), indent=2))
    else:
        print_table(rows, Console(highlight=False))
    return int(any(row.result.state == "problem" for row in rows))


def _announcer(show: Callable[[str], None], total: int) -> Callable[[Check], None]:
    done = iter(range(1, total + 1))
    return lambda check: show(f"checking {check.name} ({next(done)} of {total})")


def as_json(rows: Sequence[Row]) -> dict[str, object]:
    """What `--json` prints: counts, and name, state, found, fix and seconds of each check."""
    states = [row.result.state for row in rows]
    checks = [{"name": row.name, **vars(row.result), "seconds": round(row.seconds, 2)} for row in rows]
    return {"version": __version__, "problems": states.count("problem"), "warnings": states.count("warning"), "checks": checks}


def print_table(rows: Sequence[Row], console: Console) -> None:
    """A line for each check, below it the fix where there is one; at the end the counts and what took long."""
    with console.capture() as drawn:
        console.print(as_table(rows))
    print("\n".join(line.rstrip() for line in drawn.get().splitlines()))  # the cells are padded
    states = [row.result.state for row in rows]
    counts = ", ".join(f"{states.count(s)} {s}{'s' * (states.count(s) > 1)}" for s in ("problem", "warning") if s in states)
    slowest = sorted(rows, key=lambda row: -row.seconds)[:2]
    slow = " and ".join(f"{row.name} {row.seconds:.0f}" for row in slowest if row.seconds >= 1)
    print(f"\n{counts or 'all well'}; took {sum(row.seconds for row in rows):.0f} s{f' ({slow})' if slow else ''}")


def as_table(rows: Sequence[Row]) -> Table:
    """The checks, what was found, and the fixes."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("found", overflow="fold")
    for row in rows:
        result = row.result
        found = Text(result.found)
        if result.fix:
            found.append("".join(f"\nfix: {line}" for line in result.fix.splitlines()), style="bold")
        table.add_row(row.name, Text(result.state, style=_COLOURS[result.state]), found)
    return table
