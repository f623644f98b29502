"""A sweep's runs as training jobs, at most launch.max_parallel at once. One process submits them in turn, looks after all of them, and
brings home what the table and the page are made of. Jobs that are under way when it starts are looked after, not submitted again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpt.aws.digest import digest
from gpt.aws.dry_run import check_before, dry_run
from gpt.aws.fetching import SMALL, fetch
from gpt.aws.finding import describe
from gpt.aws.following import Patience, Transitions, last_lines, look
from gpt.aws.jobs import plan, refuse_what_goes_on, run_directory, say, send, ship
from gpt.aws.pricing import Cost, money, worst_cost
from gpt.aws.records import ENDED, Submission, read_submissions, seen
from gpt.aws.session import Aws, explained
from gpt.aws.training_job import TrainingJob
from gpt.config import RunConfig
from gpt.errors import UserError
from gpt.runtime.signals import StopRequest
from gpt.typed import shown

EVERY = 15  # seconds between two looks at the jobs
_TAIL = 30  # lines of a failed job's log that error.txt keeps


@dataclass
class SweptJob:
    """A run of a sweep that is to be a job."""

    head: str
    """What it is called in what is said: its number and its values."""
    config: RunConfig
    plan: TrainingJob | None = None
    submission: Submission | None = None
    transitions: Transitions = field(default_factory=Transitions)

    @property
    def directory(self) -> Path:
        """Of the run on this machine."""
        return run_directory(self.config)

    def say(self, text: str) -> None:
        """Print a line for people that begins with what this is called."""
        say(f"{self.head}: {text}")


def run_jobs(runs: Sequence[tuple[str, RunConfig]], stop: StopRequest, pause: Callable[[float], None] = time.sleep) -> None:
    """Submit jobs and wait for their ends, until all have ended or the user asks to stop, which leaves them running.

    Args:
        runs: of one sweep, without those that are finished: what each is called, and its config.
        stop: whose `signal` is set when the user asks to stop.
        pause: waits so many seconds.

    Raises:
        UserError: nothing was submitted: one of them cannot be, or all together could cost more than launch.max_cost.
    """
    jobs = [SweptJob(head, config) for head, config in runs]
    if not all(job.config.launch.follow for job in jobs):
        raise UserError(
            "launch.follow=false: a sweep stays with its jobs, of which launch.max_parallel run at once; leave it out, Ctrl-C leaves the "
            "jobs running"
        )
    most = min(job.config.launch.max_parallel for job in jobs)
    clients, costs = dict[str, Aws](), list[Cost]()
    for job in jobs:  # all of them, before the first costs anything
        try:
            job.plan = plan(job.config)
            check = check_before(job.plan, job.config)
            check.refuse()
        except UserError as error:
            error.add_note(f"of {job.head}; no job was submitted")
            raise
        costs.append(check.cost)
        if job.plan.region not in clients:
            clients[job.plan.region] = Aws(job.plan.region)
    patience = {region: Patience(aws, say, pause) for region, aws in clients.items()}
    _refuse_together(costs, jobs[0].config.launch.max_cost)
    waiting, running = list[SweptJob](), list[SweptJob]()
    for job in jobs:
        (running if _is_under_way(job, clients) else waiting).append(job)
    while (waiting or running) and not stop.signal:
        while waiting and len(running) < most and not stop.signal:
            job = waiting.pop(0)
            if _submit(job, _clients(job, clients), stop):
                running.append(job)
        for job in list(running):
            if not stop.signal and _has_ended(job, _clients(job, clients), patience[_region(job)]):
                running.remove(job)
        for _ in range(EVERY if running else 0):  # in short steps: a signal is heeded at once
            if not stop.signal:
                pause(1)
    if running:
        ids = " ".join(job.config.run.id for job in running)
        folder = running[0].config.run.dir
        say(f"\nleft; {len(running)} jobs go on. Stop them: gpt jobs stop {ids}{'' if folder == 'runs' else f' dir={folder}'}")


def rehearse_jobs(runs: Sequence[tuple[str, RunConfig]]) -> int:
    """launch.dry_run=true of a sweep: each job as `gpt.aws.dry_run` prints it, one after the other, and on stderr what all can cost.

    Returns:
        0: all would be submitted; 2: one at least has a problem.
    """
    codes, costs = list[int](), list[Cost]()
    for head, config in runs:
        say(f"\n{head}")
        job = plan(config)
        codes.append(dry_run(job, config))
        costs.append(worst_cost(job.request, job.region, config.launch.prices))
    known, unknown = _together(costs)
    say(f"\nworst case of all {len(runs)} jobs: {money(known)}{f', and {unknown} of them of which it is unknown' if unknown else ''}")
    try:
        _refuse_together(costs, runs[0][1].launch.max_cost)
    except UserError as error:
        say(f"problem: {error}")
        codes.append(2)
    return max(codes)


def _together(costs: Sequence[Cost]) -> tuple[float, int]:
    """USD of the jobs whose cost is known, and of how many it is not."""
    known = [cost.usd for cost in costs if cost.usd is not None]
    return sum(known), len(costs) - len(known)


def _refuse_together(costs: Sequence[Cost], most: float | None) -> None:
    """Raises UserError if the jobs could cost more than launch.max_cost together; for each of them that was looked at before."""
    known, _ = _together(costs)
    if most is not None and known > most:
        raise UserError(
            f"launch.max_cost={shown(most)}: the {len(costs)} jobs of this sweep can cost {money(known)} together; try fewer values, lower "
            "launch.max_runtime, or raise the limit"
        )


def _region(job: SweptJob) -> str:
    assert job.plan is not None
    return job.plan.region


def _clients(job: SweptJob, clients: dict[str, Aws]) -> Aws:
    return clients[_region(job)]


def _is_under_way(job: SweptJob, clients: dict[str, Aws]) -> bool:
    """Whether a job that was submitted earlier has not been seen to end."""
    submissions = read_submissions(job.directory)
    if not submissions or submissions[-1].ended or describe(_clients(job, clients), submissions[-1].name) is None:
        return False
    job.submission = submissions[-1]
    job.say(f"its job {job.submission.name} is under way")
    return True


def _submit(job: SweptJob, aws: Aws, stop: StopRequest) -> bool:
    """Submit one; one that AWS refuses counts as failed, and the others go on. Returns whether it was submitted."""
    assert job.plan is not None
    (job.directory / "error.txt").unlink(missing_ok=True)
    try:
        refuse_what_goes_on(job.config, aws)
        ship(job.config, job.plan, aws, job.say)
        if stop.signal:
            return False
        job.submission = send(job.config, job.plan, aws, job.say)
    except UserError as error:
        _failed(job, [*getattr(error, "__notes__", ()), str(error)])
        return False
    return True


def _has_ended(job: SweptJob, aws: Aws, patience: Patience) -> bool:
    """Say what is new about a job; once it has ended bring its small files home."""
    assert job.submission is not None
    name = job.submission.name
    with explained(job.head, aws.session):
        description = patience.ask(lambda: look(aws, name))
    for text in job.transitions.news(description):
        job.say(text)
    status = description["TrainingJobStatus"]
    if status not in ENDED:
        return False
    _bring_home(job, job.submission, aws)
    job.submission = seen(job.directory, job.submission, status)
    tails = last_lines(aws, name) if status == "Failed" else {}
    for text in digest(description, job.submission, job.config.run.id, tails, {}):
        say(text)
    if status == "Failed":
        last = [text for lines in tails.values() for text in lines][-_TAIL:]
        _failed(job, [*last, " ".join(str(description.get("FailureReason") or "no reason is given").split())])
    return True


def _bring_home(job: SweptJob, submission: Submission, aws: Aws) -> None:
    """What tables and pages are made of; without it the run still counts as what its job says."""
    try:
        fetch(aws, f"{submission.checkpoints}/{job.config.run.id}", job.directory, lambda name: name in SMALL, job.say)
    except UserError as error:
        job.say(f"warning: {error}")


def _failed(job: SweptJob, lines: Sequence[str]) -> None:
    """Keep why it failed where `gpt.sweep` looks for it: the last line is the reason."""
    job.say(f"failed; {lines[-1]}")
    try:
        job.directory.mkdir(parents=True, exist_ok=True)
        (job.directory / "error.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        job.say(f"warning: {job.directory / 'error.txt'} could not be written ({error}); the others are run")
