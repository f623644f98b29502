"""launch=sagemaker: a run becomes a training job, which is followed to its end. What is written down of it: `gpt.aws.records`.

A run that has had a job goes on under a new job name over the same checkpoints. One that has only been trained here takes its
checkpoints along.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import string
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpt.aws.digest import digest, exit_code
from gpt.aws.dry_run import check_before, dry_run
from gpt.aws.finding import describe, jobs_at_aws, name_contains, run_of
from gpt.aws.following import Line, follow, last_lines
from gpt.aws.pricing import price_of
from gpt.aws.records import FILE, Submission, keep_submission, read_submissions, seen, submission_of, write_aside
from gpt.aws.session import Aws, code_of, explained
from gpt.aws.shipping import Upload
from gpt.aws.training_job import CONFIG, TrainingJob, plan_job, region_of
from gpt.aws.uploading import split_uri, upload
from gpt.config import RunConfig
from gpt.errors import UserError
from gpt.runtime.environment import git_commit

_NOT_CARRIED = ("config.yaml", FILE, "report.html", "error.txt")  # of a run directory, besides what is hidden


def submit(config: RunConfig) -> int:
    """Submit a run, or with launch.dry_run=true only say what would be, and follow it unless launch.follow=false.

    Returns:
        0: the job has done its work, or was submitted and is not followed; 2: it says that the user's input was wrong; 1: it failed
        otherwise; 143: it was stopped; 130: the user follows it no longer, and it goes on.

    Raises:
        UserError: nothing was submitted; why, all of it at once.
    """
    named = bool(config.run.id)
    job = plan(config)
    if config.launch.dry_run:
        return dry_run(job, config)
    check = check_before(job, config)
    check.refuse()
    for warning in check.warnings:
        say(f"warning: {warning}")
    aws = Aws(job.region)
    if named:
        refuse_what_goes_on(config, aws)
    ship(config, job, aws, say)
    submission = send(config, job, aws, say)
    if not config.launch.follow:
        say(how_to_look(config))
        return 0
    return watch(aws, submission, run_directory(config), show_lines(submission), how_to_look(config))


def plan(config: RunConfig) -> TrainingJob:
    """The job that a run becomes; a run without an id is given one.

    Raises:
        UserError: something that it reads cannot be shipped.
    """
    token = "".join(random.SystemRandom().choices(string.ascii_lowercase, k=4))
    job = plan_job(config, datetime.now(UTC), token, region_of(config), git_commit())
    config.run.id = job.run_id
    return job


def run_directory(config: RunConfig) -> Path:
    """`<run.dir>/<run.id>` on this machine."""
    return Path(config.run.dir).expanduser() / config.run.id


def how_to_look(config: RunConfig) -> str:
    """How the job of a run is looked at, and stopped."""
    where = config.run.id if config.run.dir == "runs" else f"{config.run.id} dir={config.run.dir}"
    return f"look at it: gpt jobs logs {where}; stop it: gpt jobs stop {where}"


def refuse_what_goes_on(config: RunConfig, aws: Aws) -> None:
    """Refuse a run that another job, or a process here, is training; or that exists, with resume=never.

    Raises:
        UserError: it is so.
    """
    directory, key = run_directory(config), f"run.id={config.run.id}"
    submissions = read_submissions(directory)
    if config.resume == "never" and (submissions or (directory / "config.yaml").is_file()):
        raise UserError(f"{key}: {directory} exists, and resume=never; choose another run.id")
    if config.resume == "never" and _keys(aws, _checkpoints(config), 1):
        raise UserError(f"{key}: {_checkpoints(config)} exists, and resume=never; choose another run.id")
    names = [submissions[-1].name] if submissions and not submissions[-1].ended else []
    names += [
        one["TrainingJobName"]
        for status in ("InProgress", "Stopping")
        for one in jobs_at_aws(aws, name_contains(config.run.id), status)
        if run_of(aws, one["TrainingJobArn"]) == config.run.id
    ]
    for name in names:
        description = describe(aws, name)
        if description is not None and description["TrainingJobStatus"] in ("InProgress", "Stopping"):
            raise UserError(
                f"{key}: its job {name} is {description['TrainingJobStatus']}; wait for its end (gpt jobs wait {config.run.id}) or stop it "
                f"(gpt jobs stop {config.run.id}) first"
            )


def ship(config: RunConfig, job: TrainingJob, aws: Aws, say: Callable[[str], None]) -> None:
    """Upload what a job needs and is not in S3 yet.

    Args:
        config: of the run.
        job: as `plan` has it.
        aws: clients of the job's region.
        say: prints a line for people.

    Raises:
        UserError: something cannot be read, or written there.
    """
    directory = run_directory(config)
    with _held(directory, config):
        taken, marks = _taken_along(config, job, aws, directory)
        if marks:
            say(f"{directory} has been trained here: its checkpoints go with it")
        upload(aws, [*job.uploads, *taken], config.launch.upload_kms_key, say)
        if marks:  # a checkpoint counts once its mark is there
            upload(aws, marks, config.launch.upload_kms_key, say)


def send(config: RunConfig, job: TrainingJob, aws: Aws, say: Callable[[str], None]) -> Submission:
    """Submit a job whose files are in S3, and write it down. For the arguments see `ship`.

    Raises:
        UserError: SageMaker refuses it, or it cannot be written down; which of the two it says.
    """
    import yaml

    directory = run_directory(config)
    arn = _create(aws, job.request)
    price, _ = price_of(config.launch.instance_type, job.region, config.launch.prices)
    submission = submission_of({"TrainingJobArn": arn, "CreationTime": datetime.now(UTC), **job.request}, price)
    try:
        keep_submission(directory, submission)
        write_aside(directory / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
    except UserError as error:
        error.add_note(f"the job was submitted all the same, and is not written down here: gpt jobs stop {job.name}")
        raise
    say(f"submitted {job.name} ({config.launch.instance_count} x {config.launch.instance_type}, {job.region}); run {config.run.id}")
    return submission


def _create(aws: Aws, request: dict[str, Any]) -> str:
    """Its ARN."""
    name = request["TrainingJobName"]
    with explained(f"launch=sagemaker: {name} was not submitted", aws.session):
        try:
            return aws.client("sagemaker").create_training_job(**request)["TrainingJobArn"]
        except Exception as error:  # boto3 makes the classes of its errors at run time
            if code_of(error) == "ResourceInUse" and (made := describe(aws, name)):  # no other has this name: the answer had got lost
                return made["TrainingJobArn"]
            raise


def watch(aws: Aws, submission: Submission, directory: Path, show: Callable[[Line], None] | None, look: str, last: int = 0) -> int:
    """Follow a job and say what came of it.

    Args:
        aws: clients of its region.
        submission: which job.
        directory: of its run; its name is the run's id.
        show: takes each line of its log; None: the log is not followed.
        look: how to look again, said when the user leaves.
        last: begin with the last so many lines of each host; 0: with the first.

    Returns:
        see `submit`.
    """
    try:
        with explained(submission.name, aws.session):
            outcome = follow(aws, submission.name, show, say, last)
    except KeyboardInterrupt:
        say(f"\nleft; the job goes on. {look[0].upper()}{look[1:]}")
        return 130
    submission = seen(directory, submission, outcome.status)
    tails = outcome.tails or (last_lines(aws, submission.name) if outcome.status == "Failed" else {})
    for line in digest(outcome.description, submission, directory.name, tails, outcome.metrics):
        say(line)
    if outcome.status != "Completed" and (command := _command_of(directory)):
        say(f"go on from its last checkpoint: gpt {command} resume={directory}")
    return exit_code(outcome.description)


def _command_of(directory: Path) -> str:
    """`pretrain` or `finetune`, as the run's config says; nothing for a run of another machine."""
    config = directory / "config.yaml"
    match = re.search(r"^command: (\w+)$", config.read_text(encoding="utf-8"), re.MULTILINE) if config.is_file() else None
    return match[1] if match else ""


def show_lines(submission: Submission) -> Callable[[Line], None]:
    """Prints lines of a log, those of several hosts with their names."""

    def show(line: Line) -> None:
        print(f"{line.host} | {line.text}" if submission.instance_count > 1 else line.text, flush=True)

    return show


def say(text: str) -> None:
    """Print a line for people."""
    print(text, file=sys.stderr, flush=True)


# A run that was trained here


def _checkpoints(config: RunConfig) -> str:
    """Where the run directory is in S3."""
    return f"{(config.launch.output or '').rstrip('/')}/{config.run.id}/checkpoints/{config.run.id}/"


def _keys(aws: Aws, uri: str, most: int = 1000) -> list[str]:
    """Keys of objects below an uri, from there on, in S3's order."""
    bucket, prefix = split_uri(uri)
    with explained(f"launch.output: {uri} cannot be listed", aws.session):
        found = aws.client("s3").list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=most).get("Contents", ())
    return [entry["Key"][len(prefix) :] for entry in found]


@contextmanager
def _held(directory: Path, config: RunConfig) -> Iterator[None]:
    """The lock of a run directory, where it has one.

    Raises:
        UserError: a process is training there.
    """
    from filelock import FileLock, Timeout

    if not (directory / ".lock").is_file():
        yield
        return
    try:
        with FileLock(directory / ".lock", timeout=0.5):
            yield
    except Timeout as error:
        raise UserError(
            f"run.id={config.run.id}: another process is working in {directory}; wait for it or choose another run.id"
        ) from error


def _taken_along(config: RunConfig, job: TrainingJob, aws: Aws, directory: Path) -> tuple[list[Upload], list[Upload]]:
    """What a job needs to go on from checkpoints that are only here: files, and the marks that make them count, to be uploaded last."""
    import yaml

    here = sorted(mark.parent for mark in (directory / "checkpoints").glob("step-*/COMPLETE"))
    if not here:
        return [], []
    root = _checkpoints(config)
    there = [match[1] for key in _keys(aws, f"{root}checkpoints/") if (match := re.fullmatch(r"(step-\d+)/COMPLETE", key))]
    if there and max(there) >= here[-1].name:
        return [], []
    files = [path for path in directory.iterdir() if path.is_file() and path.name not in _NOT_CARRIED and not path.name.startswith(".")]
    files += [path for folder in here for path in folder.rglob("*") if path.is_file()]
    uploads = [_upload(f"{root}{path.relative_to(directory).as_posix()}", path) for path in sorted(files)]
    marks = [one for one in uploads if one.uri.rpartition("/")[2] == "COMPLETE"]
    its_config = yaml.safe_dump(_as_there(config, job, directory), sort_keys=False, allow_unicode=True).encode()
    others = [one for one in uploads if one not in marks]
    return [*others, _upload(f"{root}config.yaml", its_config)], marks


def _upload(uri: str, source: Path | bytes) -> Upload:
    if isinstance(source, bytes):
        return Upload(uri, source, hashlib.sha256(source).hexdigest(), len(source))
    with source.open("rb") as file:
        return Upload(uri, source, hashlib.file_digest(file, "sha256").hexdigest(), file.tell())


def _as_there(config: RunConfig, job: TrainingJob, directory: Path) -> dict[str, Any]:
    """The config that a run was started with here, with the paths that its files have in the container: what the job compares its own
    config with before it goes on."""
    from gpt.compose import load_run

    (there,) = (one.source for one in job.uploads if one.uri.endswith(f"/{CONFIG}") and isinstance(one.source, bytes))
    before, now, container = load_run(directory).to_dict(), config.to_dict(), json.loads(there)
    return _translated(before, now, container) | {key: container[key] for key in ("run", "launch")}


def _translated(before: Any, now: Any, container: Any) -> Any:
    """`before`, but where it is what stands in the config now, what that has become in the container."""
    if isinstance(before, dict) and isinstance(now, dict) and isinstance(container, dict):
        return {key: _translated(value, now.get(key), container.get(key, value)) for key, value in before.items()}
    return container if before == now else before
