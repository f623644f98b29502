"""What a SageMaker training job is told besides the run itself: the keys of `launch` that a run on this machine does not read.

Units and limits are those of CreateTrainingJob (SageMaker API reference). Imports neither torch nor boto3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

UNSET = "(required)"
"""What a preset says of a value that only the user can name."""


@dataclass
class EmulatedConfig:
    """Of launch=emulated: what is rehearsed."""

    interrupt_after: str | None = None
    """Interrupt the job as managed spot does, so long after it started (`20s`): SIGTERM, SIGKILL after `notice`, and a new start from the
    last checkpoint. null: never."""
    interruptions: int = 1
    """How often, each time so long after the start."""
    notice: str = "120s"
    """From SIGTERM to SIGKILL."""
    isolation: Literal["auto", "namespaces", "portable"] = "auto"
    """namespaces: hosts see the true /opt/ml, and the entrypoint is process 1, as in a container (Linux); portable: another root, by an
    environment variable. auto: namespaces where the system allows them."""


@dataclass
class TrainingJobConfig:
    """The training job that carries a run."""

    dry_run: bool = False
    """Only print the request, and on stderr what would be uploaded, what it could cost and what is wrong with it; AWS is not called."""
    region: str | None = None
    """Such as us-east-1; null: that of the environment or of ~/.aws/config."""
    role: str | None = None
    """ARN of the role that the job runs as."""
    image_uri: str | None = None
    """The container's image; null: AWS's own for this torch, looked up with the sagemaker SDK. Trainium's must be given."""
    instance_type: str = "ml.g6.2xlarge"
    """Kind of machine; launch/instance=... names some."""
    instance_count: int = 1
    """How many of them."""
    volume_gb: int = 100
    """Storage of each, in GB; machines with disks of their own use those, and may not have less."""
    output: str | None = None
    """s3://<bucket>/<prefix> below which everything of the run goes: code, inputs, checkpoints, model, report."""
    channels: dict[str, str] = field(default_factory=dict)
    """Inputs besides those that the config names itself, channel: s3 uri or local folder; `train` and `train.<name>` become data.paths."""
    spot: bool = False
    """Managed spot: cheaper, may be interrupted, goes on from the last checkpoint."""
    max_runtime: str = "24h"
    """The job is stopped after so long."""
    max_wait: str | None = None
    """spot: waiting and running together; null: max_runtime and an hour."""
    max_retries: int = 0
    """How often SageMaker starts the job again after a fault of its own, at most 30."""
    keep_alive: str | None = None
    """Warm pool: the machines stay, and are paid for, so long after the job, such as 30min; null: not at all."""
    volume_kms_key: str | None = None
    """KMS key (ARN, or id) that encrypts the machines' storage; disks of their own are encrypted by their hardware, and take none."""
    output_kms_key: str | None = None
    """KMS key of what the job writes to S3."""
    upload_kms_key: str | None = None
    """KMS key of what is uploaded for the job."""
    subnets: list[str] = field(default_factory=list)
    """VPC: where the machines' network interfaces are."""
    security_groups: list[str] = field(default_factory=list)
    """VPC: what they may reach."""
    network_isolation: bool = False
    """The container reaches no network at all, S3 aside, which SageMaker reads and writes for it."""
    encrypt_traffic: bool = False
    """Encrypt what the machines tell each other; slower."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the job, besides the run's id and its commit."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the container. Never a secret."""
    tensorboard: bool = False
    """Have TensorBoard's files kept in S3 while the job runs, with tracking=tensorboard."""
    max_cost: float | None = None
    """Refuse what could cost more, in USD; null: no limit."""
    prices: dict[str, float] = field(default_factory=dict)
    """instance type: USD per hour of one, instead of the table in the package."""
    follow: bool = True
    """After submitting, show the log until the job ends; Ctrl-C leaves it running."""
    max_parallel: int = 2
    """-m: jobs of a sweep that run at the same time."""
    emulated: EmulatedConfig = field(default_factory=EmulatedConfig)

    def left_open(self) -> list[str]:
        """Keys that a preset leaves to the user, and the user has not set."""
        return [key for key, value in vars(self).items() if value in (UNSET, [UNSET])]
