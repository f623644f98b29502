"""`gpt jobs`: list, status, logs, wait, stop and fetch, by run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpt.aws.digest import cost_of, summary
from gpt.aws.dry_run import size
from gpt.aws.fetching import fetch as fetch_files
from gpt.aws.fetching import weights_and_report
from gpt.aws.finding import Clients, Target, describe, find_job, jobs_at_aws, price_at, run_of
from gpt.aws.jobs import say, show_lines, watch
from gpt.aws.jobs_config import FetchConfig, JobConfig, JobsConfig, LogsConfig
from gpt.aws.pricing import duration
from gpt.aws.records import Submission, local_runs, read_submissions, seen, submission_of
from gpt.aws.session import Aws, code_of, explained
from gpt.errors import UserError


def jobs(config: JobsConfig) -> int:
    """Carry out `gpt jobs` and `gpt jobs list`."""
    clients, folder = Clients(config.region), _folder(config.dir)
    here = {submission.name: (run_id, path, submission) for run_id, path, submission in _kept(folder)}
    rows: list[tuple[str, Submission, dict[str, Any] | None]] = []
    aws = clients.of()
    for summary_ in jobs_at_aws(aws, most=10 * config.n):
        if len(rows) == config.n:
            break
        name = summary_["TrainingJobName"]
        run_id, path, submission = here.pop(name, (None, None, None))
        run_id = run_id or run_of(aws, summary_["TrainingJobArn"])
        description = describe(aws, name) if run_id else None
        if run_id and description:
            submission = submission or submission_of(description, price_at(description))
            rows.append((run_id, seen(path, submission, description["TrainingJobStatus"]), description))
    elsewhere = [(run_id, submission, None) for run_id, _, submission in here.values() if submission.region != aws.region]
    rows = sorted([*rows, *elsewhere], key=lambda row: row[1].time)[-config.n :]
    if not rows:
        print(f"no jobs of gpt in {aws.region}; gpt pretrain launch=sagemaker makes one")
        return 0
    print(_table([("run", "job", "state", "machines", "submitted", "trained", "cost")] + [_row(*row) for row in rows]))
    return 0


def _kept(folder: Path) -> list[tuple[str, Path, Submission]]:
    return [(run_id, path, submission) for run_id, path in local_runs(folder).items() for submission in read_submissions(path)]


def _row(run_id: str, submission: Submission, description: dict[str, Any] | None) -> tuple[str, ...]:
    known = description or {}
    state = known.get("SecondaryStatus") or submission.status
    machines = f"{submission.instance_count} x {submission.instance_type}{' spot' if submission.spot else ''}"
    trained, cost = known.get("TrainingTimeInSeconds"), cost_of(known, submission)
    state = state if description is not None else f"{state} ({submission.region})"
    paid = "-" if cost is None else f"{cost:,.2f} USD"
    return run_id, submission.name[-18:], state, machines, submission.time[:16], "-" if trained is None else duration(trained), paid


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def status(config: JobConfig) -> int:
    """Carry out `gpt jobs status`."""
    for target, aws in _targets(config):
        description = _described(aws, target)
        submission = seen(target.directory, target.submission, description["TrainingJobStatus"])
        print(f"run {target.run_id}")
        print("\n".join(summary(description, submission)))
        for one in description.get("SecondaryStatusTransitions") or ():
            ended = one.get("EndTime")
            took = f" ({duration(round((ended - one['StartTime']).total_seconds()))})" if ended else ""
            print(f"  {one['StartTime']:%Y-%m-%d %H:%M:%S}  {one['Status']}{took}: {one.get('StatusMessage', '')}".rstrip(": "))
        if reason := description.get("FailureReason"):
            print(f"  reason: {' '.join(reason.split())}")
    return 0


def logs(config: LogsConfig) -> int:
    """Carry out `gpt jobs logs`."""
    ((target, aws),) = _targets(config)
    return watch(aws, target.submission, target.directory, show_lines(target.submission), _how_to_look(config, target), config.lines)


def wait(config: JobConfig) -> int:
    """Carry out `gpt jobs wait`: the exit code is that of the first job, in the order given, that did not do its work."""
    codes = []
    for target, aws in _targets(config):
        codes.append(watch(aws, target.submission, target.directory, None, _how_to_look(config, target)))
        if codes[-1] == 130:
            break
    return next((code for code in codes if code), 0)


def stop(config: JobConfig) -> int:
    """Carry out `gpt jobs stop`."""
    for target, aws in _targets(config):
        name = target.submission.name
        with explained(f"gpt jobs stop: {name}", aws.session):
            try:
                aws.client("sagemaker").stop_training_job(TrainingJobName=name)
            except Exception as error:  # boto3 makes the classes of its errors at run time
                now = _described(aws, target)["TrainingJobStatus"] if code_of(error).startswith("Validation") else ""
                if now in ("", "InProgress"):
                    raise
                seen(target.directory, target.submission, now)
                say(f"{name}: is {now} already")
                continue
        seen(target.directory, target.submission, "Stopping")
        say(f"{name}: is being stopped; it has two minutes to save a checkpoint. Wait for it: gpt jobs wait {target.run_id}")
    return 0


def fetch(config: FetchConfig) -> int:
    """Carry out `gpt jobs fetch`."""
    for target, aws in _targets(config):
        uri = f"{target.submission.checkpoints}/{target.run_id}"
        wanted: Callable[[str], bool] = (lambda name: True) if config.checkpoints else weights_and_report
        done = fetch_files(aws, uri, target.directory, wanted, say)
        if not done.brought + done.unchanged:
            raise UserError(f"runs: {target.run_id}: there is nothing at {uri} yet; gpt jobs status {target.run_id}")
        description = describe(aws, target.submission.name)
        if description is not None:
            seen(target.directory, target.submission, description["TrainingJobStatus"])
        checked = f"; {done.by_size} of them compared by size alone" if done.by_size else ""
        say(f"{target.directory}: {done.brought} fetched, {size(done.bytes)}{checked}; {done.unchanged} were here already")
        if (target.directory / "model" / "config.json").is_file():
            say(f"write with it: gpt generate model={target.directory}")
    return 0


def _targets(config: JobConfig) -> list[tuple[Target, Aws]]:
    """What the command speaks of, each with the clients of its region.

    Raises:
        UserError: a word means no job, or several.
    """
    clients, folder = Clients(config.region), _folder(config.dir)
    targets = [find_job(word, folder, config.job, clients) for word in config.runs]
    return [(target, clients.of(config.region or target.submission.region)) for target in targets]


def _described(aws: Aws, target: Target) -> dict[str, Any]:
    description = describe(aws, target.submission.name)
    if description is None:
        raise UserError(f"runs: {target.run_id}: there is no job {target.submission.name} in {aws.region}; region= names another")
    return description


def _how_to_look(config: JobConfig, target: Target) -> str:
    where = target.run_id if config.dir == "runs" else f"{target.run_id} dir={config.dir}"
    return f"look at it: gpt jobs logs {where}; stop it: gpt jobs stop {where}"


def _folder(name: str) -> Path:
    """The folder of runs; it need not be there, for jobs of other machines."""
    return Path(os.path.expanduser(name))
