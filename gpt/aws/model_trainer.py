"""A job for people who live in the SageMaker Python SDK: a `ModelTrainer` for the very request that `launch=sagemaker` sends.

The SDK's own drivers start a shell as the container's first process, which loses the SIGTERM of a spot interruption, and it has no setting
for another. So this is a ModelTrainer that starts our entrypoint, and differs in nothing else.
"""

from __future__ import annotations

import random
import string
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from gpt.aws.dry_run import check_before
from gpt.aws.training_job import TrainingJob, job_name, plan_job, region_of
from gpt.config import RunConfig
from gpt.errors import UserError

if TYPE_CHECKING:
    from sagemaker.core.helper.session_helper import Session  # pyright: ignore[reportMissingImports]  # of the extra sagemaker
    from sagemaker.train import ModelTrainer  # pyright: ignore[reportMissingImports]


def as_model_trainer(config: RunConfig, sagemaker_session: Session | None = None) -> ModelTrainer:
    """The job of a run as `sagemaker.train.ModelTrainer`: `train()` starts it, a Pipeline's step may hold it.

    What the job takes along is uploaded at once, as far as S3 lacks it. Every job that the trainer starts is of the same run and goes on
    from its checkpoints; for another run make another trainer.

    Args:
        config: of the run, with launch=sagemaker, such as `gpt.compose.compose_run("pretrain", ["launch=sagemaker", ...])` gives.
        sagemaker_session: the SDK's, a PipelineSession in a Pipeline; None: one of the config's region.

    Raises:
        UserError: the SDK is not installed, something is wrong with the job (all of it, a note each), or its files cannot be uploaded.
    """
    if config.launch.name != "sagemaker":
        raise UserError(f"launch={config.launch.name}: a ModelTrainer is of launch=sagemaker; compose the config with that")
    try:
        import boto3  # pyright: ignore[reportMissingImports]  # of the extra aws
        from sagemaker.core import shapes  # pyright: ignore[reportMissingImports]
        from sagemaker.core.helper.session_helper import Session  # pyright: ignore[reportMissingImports]
        from sagemaker.core.training import configs  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "the SageMaker Python SDK, which as_model_trainer needs, is not installed; pip install 'gpt-trainer[sagemaker]'"
        ) from error
    session = sagemaker_session or Session(boto_session=boto3.Session(region_name=region_of(config)))
    job = _plan(config, session.boto_region_name)
    check_before(job, config).refuse()
    request = job.request
    compute, stop = request["ResourceConfig"], request["StoppingCondition"]
    trainer = _trainer_class()(
        sagemaker_session=session,
        role=request["RoleArn"],
        base_job_name=job.run_id,
        training_image=request["AlgorithmSpecification"]["TrainingImage"],
        compute=configs.Compute(
            instance_type=compute["InstanceType"],
            instance_count=compute["InstanceCount"],
            volume_size_in_gb=compute["VolumeSizeInGB"],
            volume_kms_key_id=compute.get("VolumeKmsKeyId"),
            keep_alive_period_in_seconds=compute.get("KeepAlivePeriodInSeconds"),
            enable_managed_spot_training=request["EnableManagedSpotTraining"],
        ),
        networking=configs.Networking(
            subnets=request.get("VpcConfig", {}).get("Subnets"),
            security_group_ids=request.get("VpcConfig", {}).get("SecurityGroupIds"),
            enable_network_isolation=request["EnableNetworkIsolation"],
            enable_inter_container_traffic_encryption=request["EnableInterContainerTrafficEncryption"],
        ),
        stopping_condition=configs.StoppingCondition(
            max_runtime_in_seconds=stop["MaxRuntimeInSeconds"], max_wait_time_in_seconds=stop.get("MaxWaitTimeInSeconds")
        ),
        output_data_config=configs.OutputDataConfig(
            s3_output_path=request["OutputDataConfig"]["S3OutputPath"],
            compression_type=request["OutputDataConfig"]["CompressionType"],
            kms_key_id=request["OutputDataConfig"].get("KmsKeyId"),
        ),
        checkpoint_config=configs.CheckpointConfig(
            s3_uri=request["CheckpointConfig"]["S3Uri"], local_path=request["CheckpointConfig"]["LocalPath"]
        ),
        input_data_config=[_channel(channel, configs) for channel in request["InputDataConfig"]],
        environment=request.get("Environment", {}),
        hyperparameters=request["HyperParameters"],
        tags=[configs.Tag(key=tag["Key"], value=tag["Value"]) for tag in request["Tags"]],
    ).with_metric_definitions(
        [shapes.MetricDefinition(name=one["Name"], regex=one["Regex"]) for one in request["AlgorithmSpecification"]["MetricDefinitions"]]
    )
    if retry := request.get("RetryStrategy"):
        trainer.with_retry_strategy(shapes.RetryStrategy(maximum_retry_attempts=retry["MaximumRetryAttempts"]))
    if board := request.get("TensorBoardOutputConfig"):
        trainer.with_tensorboard_output_config(
            shapes.TensorBoardOutputConfig(s3_output_path=board["S3OutputPath"], local_path=board["LocalPath"])
        )
    _upload(job, session, config.launch.upload_kms_key)
    return trainer


def _plan(config: RunConfig, region: str) -> TrainingJob:
    from gpt.runtime.environment import git_commit

    return plan_job(config, datetime.now(UTC), _token(), region, git_commit())


def _token() -> str:
    return "".join(random.SystemRandom().choices(string.ascii_lowercase, k=4))


def _trainer_class() -> type[ModelTrainer]:
    """A ModelTrainer whose jobs start our entrypoint, and have names that no other has."""
    from sagemaker.core import shapes  # pyright: ignore[reportMissingImports]
    from sagemaker.train import ModelTrainer  # pyright: ignore[reportMissingImports]

    from gpt.aws.training_job import ENTRYPOINT_COMMAND

    class OwnEntrypoint(ModelTrainer):
        """What the SDK has no setting for."""

        def _create_training_job_args(self, input_data_config: Any = None, boto3: bool = False) -> dict[str, Any]:
            arguments = super()._create_training_job_args(input_data_config, boto3)
            if "AlgorithmSpecification" in arguments:  # as a Pipeline, which names its jobs itself, and boto3 have it
                arguments["AlgorithmSpecification"] |= {"ContainerEntrypoint": ENTRYPOINT_COMMAND, "EnableSageMakerMetricsTimeSeries": True}
                return arguments | {"ProfilerConfig": {"DisableProfiler": True}}
            specification = arguments["algorithm_specification"]
            specification.container_entrypoint, specification.enable_sage_maker_metrics_time_series = ENTRYPOINT_COMMAND, True
            name = job_name(self.base_job_name, datetime.now(UTC), _token())
            return arguments | {"training_job_name": name, "profiler_config": shapes.ProfilerConfig(disable_profiler=True)}

    return OwnEntrypoint


def _channel(channel: dict[str, Any], configs: Any) -> Any:
    source = channel["DataSource"]["S3DataSource"]
    return configs.Channel(
        channel_name=channel["ChannelName"],
        data_source=configs.DataSource(
            s3_data_source=configs.S3DataSource(
                s3_data_type=source["S3DataType"], s3_uri=source["S3Uri"], s3_data_distribution_type=source["S3DataDistributionType"]
            )
        ),
        input_mode=channel["InputMode"],
        compression_type=channel["CompressionType"],
    )


def _upload(job: TrainingJob, session: Session, kms_key: str | None) -> None:
    """Send what S3 lacks, as whom the SDK's session is."""
    from gpt.aws.session import Aws
    from gpt.aws.uploading import upload

    upload(Aws(job.region, session=session.boto_session), job.uploads, kms_key, lambda text: print(text, file=sys.stderr))
