"""A training job while it runs: its log over all hosts and the changes of its state, in spite of whatever happens to the connection.

The log is CloudWatch's group /aws/sagemaker/TrainingJobs, with a stream `<job>/algo-<n>-<time>` per host, which is there only once the
host has said something. Where a stream has been read to is a token that CloudWatch gave, so that a line is neither lost nor shown twice.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gpt.aws.records import ENDED
from gpt.aws.session import LOG_IN, Aws, code_of, explanation, is_transient, needs_login
from gpt.errors import UserError

GROUP = "/aws/sagemaker/TrainingJobs"
EVERY = 4.0  # seconds between two looks
_KEPT = 60  # of the last lines of each host
_PAGES = 20  # of a stream in one look, each at most 1 MB: the state must not wait for a long log
_DRAIN = 10  # looks for lines that CloudWatch still holds back after the job's end, until there are none twice
_RETRY, _LONGEST_RETRY, _LOGIN_RETRY = 2.0, 30.0, 15.0  # seconds
T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """A line of a job's log."""

    milliseconds: int
    """Since 1970."""
    host: str
    """Such as algo-1."""
    text: str


class LogTail:
    """The lines of a job's log that have not been read yet.

    Args:
        aws: the clients.
        job: its name.
        last: begin with the last so many lines of each stream; 0: with the first.
    """

    def __init__(self, aws: Aws, job: str, last: int = 0) -> None:
        self._aws, self._job, self._last = aws, job, last
        self._tokens: dict[str, str] = {}
        self._waiting: list[Line] = []

    def read(self) -> list[Line]:
        """What there is that was not returned before, in the order of time; after an error the same call goes on where it broke off."""
        for stream in self._streams():
            self._read_stream(stream)
        lines, self._waiting = sorted(self._waiting, key=lambda line: line.milliseconds), []
        return lines

    def _streams(self) -> list[str]:
        pages = self._aws.client("logs").get_paginator("describe_log_streams")
        try:
            found = [page["logStreams"] for page in pages.paginate(logGroupName=GROUP, logStreamNamePrefix=f"{self._job}/")]
        except Exception as error:  # boto3 makes the classes of its errors at run time
            if code_of(error) == "ResourceNotFoundException":  # the first job of a region makes the group
                return []
            raise
        return [stream["logStreamName"] for page in found for stream in page]

    def _read_stream(self, stream: str) -> None:
        match = re.search(r"algo-\d+", stream.rpartition("/")[2])
        host = match[0] if match else stream.rpartition("/")[2]
        for _ in range(_PAGES):
            token = self._tokens.get(stream)
            if token is not None:
                where: dict[str, Any] = {"nextToken": token, "startFromHead": True}
            else:
                where = {"startFromHead": False, "limit": self._last} if self._last else {"startFromHead": True}
            page = self._aws.client("logs").get_log_events(logGroupName=GROUP, logStreamName=stream, **where)
            self._waiting += [Line(event["timestamp"], host, event["message"].rstrip("\r\n")) for event in page["events"]]
            self._tokens[stream] = page["nextForwardToken"]
            if page["nextForwardToken"] == token:  # the end of what there is
                return


@dataclass
class Outcome:
    """A job after it was followed."""

    description: dict[str, Any]
    """DescribeTrainingJob's last answer."""
    tails: dict[str, deque[str]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=_KEPT)))
    """Host -> its last lines."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Name of a metric -> its last value, as the log gives it."""

    @property
    def status(self) -> str:
        """TrainingJobStatus."""
        return self.description["TrainingJobStatus"]


class Patience:
    """Asks AWS until it answers: throttled, unreachable or with expired credentials it is asked again later. Says what it waits for, once.

    Args:
        aws: the clients.
        say: prints a line for people.
        pause: waits so many seconds.
    """

    def __init__(self, aws: Aws, say: Callable[[str], None], pause: Callable[[float], None] = time.sleep) -> None:
        self._aws, self._say, self._pause = aws, say, pause
        self._answered = False
        self._waits_for = ""

    def ask(self, question: Callable[[], T]) -> T:
        """The answer to a question; what waiting does not mend is raised, and so are credentials that never were right."""
        wait = _RETRY
        while True:
            try:
                answer = question()
            except Exception as error:  # a family of libraries, each with errors of its own
                if needs_login(error) and self._answered:
                    self._note("login", f"your credentials have expired: {explanation(error, self._aws.session)}. Log in again in another "
                               f"terminal ({LOG_IN}); the job goes on, and so will this")  # fmt: skip
                    self._pause(_LOGIN_RETRY)
                    self._aws.renew()
                elif is_transient(error):
                    if wait > _RETRY:
                        self._note(
                            "network", f"AWS does not answer ({explanation(error, self._aws.session)}); asking again; the job goes on"
                        )
                    self._pause(wait)
                    wait = min(2 * wait, _LONGEST_RETRY)
                else:
                    raise
                continue
            if self._waits_for:
                self._say("AWS answers again")
            self._answered, self._waits_for = True, ""
            return answer

    def _note(self, what: str, text: str) -> None:
        if self._waits_for != what:
            self._say(text)
        self._waits_for = what


def follow(
    aws: Aws,
    job: str,
    show: Callable[[Line], None] | None,
    say: Callable[[str], None],
    last: int = 0,
    pause: Callable[[float], None] = time.sleep,
) -> Outcome:
    """Wait for the end of a job, showing its log and its state.

    Args:
        aws: the clients.
        job: its name.
        show: takes each line of the log; None: the log is not read.
        say: prints a line for people: a change of state, or what is being waited for.
        last: begin with the last so many lines of each host's log; 0: with the first.
        pause: waits so many seconds.

    Raises:
        UserError: there is no such job, or AWS may not be asked.
        KeyboardInterrupt: the user has seen enough; the job goes on.
    """
    patience, tail = Patience(aws, say, pause), LogTail(aws, job, last) if show else None
    transitions, outcome = Transitions(), Outcome({})
    while True:
        outcome.description = patience.ask(lambda: look(aws, job))
        for text in transitions.news(outcome.description):
            say(text)
        ended = outcome.status in ENDED
        if tail is not None and show is not None:
            readable = _pass_on(patience, tail, show, say, outcome)
            empty = 0
            for _ in range(_DRAIN if ended and readable else 0):
                pause(EVERY / 2)
                empty = 0 if _pass_on(patience, tail, show, say, outcome) == "lines" else empty + 1
                if empty == 2:
                    break
            tail = tail if readable else None
        if ended:
            return outcome
        pause(EVERY)


def look(aws: Aws, job: str) -> dict[str, Any]:
    """DescribeTrainingJob.

    Raises:
        UserError: there is no such job, or it may not be looked at. What waiting may mend is raised as it comes.
    """
    try:
        return aws.client("sagemaker").describe_training_job(TrainingJobName=job)
    except Exception as error:  # boto3 makes the classes of its errors at run time
        if code_of(error) and not needs_login(error) and not is_transient(error):
            raise UserError(f"{job}: cannot be looked at: {explanation(error, aws.session)}") from error
        raise


def _pass_on(patience: Patience, tail: LogTail, show: Callable[[Line], None], say: Callable[[str], None], outcome: Outcome) -> str:
    """Show what is new in the log; returns `lines`, `none`, or nothing if the log may not be read."""
    try:
        lines = patience.ask(tail.read)
    except Exception as error:  # boto3 makes the classes of its errors at run time
        if not code_of(error).startswith("AccessDenied"):
            raise
        say(f"the log may not be read: you need logs:DescribeLogStreams and logs:GetLogEvents on {GROUP}; following the state alone")
        return ""
    definitions = outcome.description.get("AlgorithmSpecification", {}).get("MetricDefinitions") or ()
    for line in lines:
        outcome.tails[line.host].append(line.text)
        outcome.metrics |= metrics_of(line.text, definitions)
        show(line)
    return "lines" if lines else "none"


def metrics_of(text: str, definitions: Any) -> dict[str, float]:
    """What a line of the log says of the job's metrics, read as SageMaker reads it.

    Args:
        text: the line.
        definitions: MetricDefinitions of the job: a name and a regular expression with a group each.
    """
    found = {}
    for definition in definitions:
        match = re.search(definition["Regex"], text)
        if match and match.groups():
            try:
                found[definition["Name"]] = float(match[1])
            except ValueError:  # a dash, or half a number
                continue
    return found


class Transitions:
    """The changes of a job's state that have not been told yet."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, Any], str] = {}

    def news(self, description: dict[str, Any]) -> list[str]:
        """A line for each new secondary state, or new words about one: time since the job was made, state, message."""
        lines = []
        for one in description.get("SecondaryStatusTransitions") or ():
            key, message = (one["Status"], one.get("StartTime")), one.get("StatusMessage", "")
            if self._told.get(key) != message:
                self._told[key] = message
                lines.append(f"[{_clock(description, one.get('StartTime'))}] {one['Status']}{f': {message}' if message else ''}")
        return lines


def _clock(description: dict[str, Any], moment: Any) -> str:
    """hh:mm:ss from a job's creation to a moment."""
    created = description.get("CreationTime")
    seconds = max(0, round((moment - created).total_seconds())) if moment and created else 0
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def last_lines(aws: Aws, job: str) -> dict[str, deque[str]]:
    """Host -> the last lines of its log; of a log that cannot be read there are none."""
    outcome = Outcome({})
    try:
        lines = LogTail(aws, job, _KEPT).read()
    except Exception as error:  # boto3 makes the classes of its errors at run time
        if not code_of(error):
            raise
        return outcome.tails
    for line in lines:
        outcome.tails[line.host].append(line.text)
    return outcome.tails
