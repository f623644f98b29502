"""Where a run runs: in this process, or in one process per device, which this one starts and watches.

A process that `torchrun`, `accelerate launch` or this file has started is a worker: it trains at once. Workers get the config
resolved, in a file (`python -m gpt.launch <config.yaml>`); none composes it again.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt.compose import load_config
from gpt.config import LaunchConfig as LaunchSection
from gpt.config import RunConfig, RunSection, TrackingConfig
from gpt.errors import UserError, exit_code_of
from gpt.runtime.environment import prepare_environment


def launch(config: RunConfig) -> int:
    """Run a training run where its config says, and return the exit code."""
    if config.precompile:
        return precompile(config)
    if config.launch.name == "sagemaker":
        from gpt.aws.jobs import submit

        return submit(config)
    if config.launch.name == "emulated":
        from gpt.aws.emulator import emulate

        return emulate(config)
    prepare_environment(config.device)
    from gpt.runtime.distributed import is_worker

    return _work(config) if is_worker() else _run(config)


def precompile(config: RunConfig) -> int:
    """Fill the device's cache of compiled graphs with those of a run, and return the exit code.

    Raises:
        UserError: a launcher has started this process; it starts those of the run itself.
    """
    prepare_environment(config.device)
    from gpt.runtime.distributed import is_worker

    if is_worker():
        raise UserError("gpt precompile starts its processes itself (launch.nproc): call it without torchrun or accelerate launch")
    if config.compile is False:
        raise UserError("compile=false: there is nothing to compile ahead; leave it out")
    train = replace(config.train, budget="2steps", log_every=1, eval_every=0, eval_tokens=config.train.batch_tokens)
    with tempfile.TemporaryDirectory(prefix="gpt-precompile-") as folder:
        run, tracking = RunSection("precompile", folder), TrackingConfig()
        return _run(replace(config, precompile=True, compile=True, resume="never", run=run, train=train, tracking=tracking))


def _run(config: RunConfig) -> int:
    """Start the processes of a run, or be its only one."""
    processes = _processes(config)
    if processes * config.launch.nnodes == 1 and not config.launch.max_restarts:
        return _train(config)
    return _start(config, processes)


def run_file(path: str | Path) -> int:
    """Run the training run whose resolved config stands in a file, or be one of its processes, those of `precompile` too."""
    config = load_config(Path(path))
    prepare_environment(config.device)
    from gpt.runtime.distributed import is_worker

    return _work(config) if is_worker() else launch(config)


def _train(config: RunConfig) -> int:
    from gpt.training.trainer import Trainer

    return Trainer(config).fit().exit_code


def _processes(config: RunConfig) -> int:
    """How many to start on this machine."""
    if config.parallel.name == "none":
        return 1
    from gpt.runtime.device import count_devices

    found = count_devices(config.device)
    if config.launch.nproc == "auto":
        return found or 1
    if found is not None and found < config.launch.nproc:
        raise UserError(
            f"launch.nproc={config.launch.nproc}: each process needs a device, and there are {found} here; launch.nproc=auto takes them all"
        )
    return config.launch.nproc


def _work(config: RunConfig) -> int:
    """Train as one of several processes, of which only the first to fail says why."""
    from gpt.runtime.distributed import is_first_failure, lost_the_others

    _heed_the_launcher()
    try:
        return _train(config)
    except (Exception, KeyboardInterrupt) as error:
        silent = lost_the_others(error) and "TORCHELASTIC_RUN_ID" in os.environ  # whoever watches the processes says which one has gone
        if silent or not is_first_failure():
            _keep_failure("")
            _end(2 if isinstance(error, UserError) else 1)
        raise


def _heed_the_launcher() -> None:
    """Be sent a SIGTERM when the process that started this one is gone (Linux): a worker that nobody watches saves and ends."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        import ctypes

        set_parent_death_signal = 1  # prctl(2), PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _keep_failure(text: str) -> None:
    """Write why the run failed into the file that whoever started it has named; an empty one says that another process tells."""
    if name := os.environ.get("GPT_FAILURE_FILE"):
        with open(name, "w" if text else "a", encoding="utf-8") as file:
            file.write(text)


def _end(code: int) -> None:
    """End this process now: connections to processes that are gone or stuck are not waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _start(config: RunConfig, processes: int) -> int:
    """Start processes on this machine with torch's elastic agent, which restarts them if it may, and wait for their end."""
    import yaml
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from gpt.training.run_directory import new_run_id

    if config.launch.nnodes == 1:
        config.run.id = config.run.id or new_run_id(config.command)  # the same after a restart
    elif not config.run.id:
        raise UserError("run.id: on several machines, and for restarts on them, a run must have a name; give run.id=<name>")
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the processes speak for themselves
    patience = int(config.launch.patience(600))
    settings = LaunchConfig(
        min_nodes=config.launch.nnodes, max_nodes=config.launch.nnodes, nproc_per_node=processes, run_id=config.run.id,
        rdzv_backend="c10d", rdzv_endpoint=config.launch.endpoint or "localhost:0",
        rdzv_configs={"join_timeout": patience, "is_host": config.launch.node_rank == 0},
        max_restarts=config.launch.max_restarts, local_addr=_address(config.launch),
    )  # fmt: skip
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")  # seconds for a last checkpoint after a signal
    with tempfile.TemporaryDirectory(prefix="gpt-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
        try:
            elastic_launch(settings, sys.executable)("-m", "gpt.launch", str(file))
        except ChildFailedError as error:
            return _failed(error.failures)
        except SignalException as stopped:
            return 128 + stopped.sigval
        except RendezvousTimeoutError:
            return _said(f"launch.endpoint={config.launch.endpoint}: not all {config.launch.nnodes} machines came within {patience} s")
        except (RendezvousError, DistError) as error:
            print(f"gpt: the connection to the other machines is lost ({error})", file=sys.stderr)
            _keep_failure("")
            return 1
    return 0


def _address(launch: LaunchSection) -> str | None:
    """Under which name this machine meets the others; None: its own.

    Processes are numbered by the order of these names, and it must be that of node_rank, also after a restart: the run directory is on the
    first machine's disk. Only the first name is ever looked up.
    """
    if launch.nnodes == 1:
        return None
    host = launch.endpoint.rpartition(":")[0]
    return f"{host}~{launch.node_rank:06d}" if launch.node_rank else host


def _failed(failures: dict[int, Any]) -> int:
    """The exit code for processes that have failed. What they raised they have said; of one that a signal ended nobody has."""
    codes = [failure.exitcode for failure in sorted(failures.values(), key=lambda failure: failure.timestamp)]
    if 2 in codes:
        return 2
    for rank, failure in failures.items():
        number = -failure.exitcode
        if number > 0 and number != signal.SIGTERM:  # which the others were sent because of it
            hint = "; was it out of memory?" if number == signal.SIGKILL else ""
            return _said(f"process {rank} of the run was ended by {signal.Signals(number).name}{hint}, and the others with it")
    return next((code for code in codes if code > 0), 128 + signal.SIGTERM)


def _said(text: str) -> int:
    """Say why the run failed, and return the exit code."""
    print(f"gpt: {text}", file=sys.stderr)
    _keep_failure(text)
    return 1


def _run_file_keeping_failure(path: str) -> int:
    try:
        return run_file(path)
    except UserError as error:
        _keep_failure("\n".join([str(error), *getattr(error, "__notes__", [])]))
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        last = "".join(traceback.format_exception_only(error)).strip()
        _keep_failure(f"{last}\n(in {where.name}, {Path(where.filename).name}:{where.lineno}; the log has the traceback)")
        raise


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m gpt.launch <config.yaml>")
    try:
        code = exit_code_of(lambda: _run_file_keeping_failure(sys.argv[1]))
    except Exception:
        traceback.print_exc()
        code = 1
    _end(code)
