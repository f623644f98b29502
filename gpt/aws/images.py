"""Which image a training job runs in: the one that is named, or AWS's own for the torch that is installed here."""

from __future__ import annotations

from importlib.metadata import version

from gpt.aws.instances import find_instance
from gpt.config import LaunchConfig
from gpt.errors import UserError

FRAMEWORK = "pytorch-amzn2023"
_WITH_SDK = "pip install 'gpt-trainer[sagemaker]', which looks it up"


def image_of(launch: LaunchConfig, region: str) -> str:
    """The image's uri. Calls nobody: the SDK has a table of AWS's images.

    Raises:
        UserError: none is named, and there is none for this machine, or no SDK to look it up with.
    """
    if launch.image_uri:
        return launch.image_uri
    instance = find_instance(launch.instance_type)
    if instance is not None and instance.needs_own_image:
        raise UserError(
            f"launch.image_uri=null: {launch.instance_type} needs an image of yours; make docker-neuron builds it, docs/containers.md says "
            "how to push it to ECR; then give launch.image_uri=<account>.dkr.ecr.<region>.amazonaws.com/gpt:neuron"
        )
    try:
        from sagemaker.core import image_uris  # pyright: ignore[reportMissingImports]  # of the extra sagemaker
    except ImportError as error:
        raise UserError(
            f"launch.image_uri=null: name the container's image, launch.image_uri=<account>.dkr.ecr.<region>.amazonaws.com/<name>:<tag>, "
            f"or {_WITH_SDK}"
        ) from error
    torch = ".".join(version("torch").split(".")[:2])
    try:
        return image_uris.retrieve(FRAMEWORK, region, version=torch, instance_type=launch.instance_type, image_scope="training")
    except ValueError as error:
        raise UserError(
            f"launch.image_uri=null: there is no image of AWS's for torch {torch} on {launch.instance_type} in {region} "
            f"({' '.join(str(error).split())}); name one with launch.image_uri=..."
        ) from error
