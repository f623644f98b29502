"""The settings of `gpt jobs`. Imports neither torch nor boto3."""

from __future__ import annotations

from dataclasses import dataclass, field

from gpt.errors import UserError


@dataclass
class JobsConfig:
    """One call of `gpt jobs list`."""

    dir: str = "runs"
    """The folder of this machine's runs."""
    region: str | None = None
    """Of AWS, such as us-east-1; null: that of the environment or of ~/.aws/config."""
    n: int = 20
    """How many jobs at most, the newest ones."""

    def validate(self) -> None:
        """Raises UserError for values that cannot be."""
        if not 1 <= self.n <= 100:
            raise UserError(f"n={self.n} must be from 1 to 100")


@dataclass
class JobConfig:
    """One call of `gpt jobs status`, `wait` or `stop`."""

    runs: list[str] = field(default_factory=list)
    """Which runs: their ids, as much of the beginning or end of an id as tells it from others, their directories, or the name of a job.
    They may be written as words, without `runs=`."""
    dir: str = "runs"
    """The folder in which ids are looked up; a run that is not there is looked for at AWS."""
    region: str | None = None
    """Of AWS; null: that in which the run was submitted, or that of the environment or of ~/.aws/config."""
    job: str = ""
    """Name of one of the run's jobs; empty: its last one."""

    def validate(self) -> None:
        """Raises UserError for values that cannot be."""
        if not self.runs:
            raise UserError("runs: which run? Give its id, e.g. gpt jobs status <id>; gpt jobs lists them")
        if self.job and len(self.runs) > 1:
            raise UserError(f"job={self.job} is of one run, and these are {len(self.runs)}; name one")


@dataclass
class LogsConfig(JobConfig):
    """One call of `gpt jobs logs`."""

    lines: int = 0
    """Begin with the last so many lines of each host; 0: with the first."""

    def validate(self) -> None:
        """Raises UserError for values that cannot be."""
        super().validate()
        if len(self.runs) > 1:
            raise UserError(f"runs: {', '.join(self.runs)}: one log at a time; name one run")
        if not 0 <= self.lines <= 10000:
            raise UserError(f"lines={self.lines} must be from 0 to 10000")


@dataclass
class FetchConfig(JobConfig):
    """One call of `gpt jobs fetch`."""

    checkpoints: bool = False
    """Bring the checkpoints too, to go on with the run here."""
