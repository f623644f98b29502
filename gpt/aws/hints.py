"""What to do about the errors that training jobs commonly end, or are refused, with: AWS's words -> the remedy."""

from __future__ import annotations

import re

# The first that fits what AWS said, or the job's log did, counts. The words are those of the errors of SageMaker, S3, KMS and torch.
_HINTS = (
    (
        r"ResourceLimitExceeded|account-level service limit|service quota",
        "The quota of this account is used up: ask for more in Service Quotas, Amazon SageMaker, the quota that is named there "
        "({quota}), or take another launch.instance_type; quotas of spot jobs and of warm pools are separate ones.",
    ),
    (
        r"CapacityError|Insufficient ?(Instance)?Capacity|Unable to provision requested ML compute capacity|MaxWaitTimeExceeded",
        "AWS has none of these machines free just now: try again later, another launch.region or launch.instance_type, "
        "or with launch.spot=true a longer launch.max_wait.",
    ),
    (
        r"iam:PassRole",
        "You may not hand launch.role to SageMaker: have the account's owner allow you iam:PassRole on that role (docs/sagemaker.md).",
    ),
    (
        r"[Cc]ould not assume role|cannot be assumed|principal.{0,3}sagemaker\.amazonaws\.com",
        "SageMaker may not take launch.role: let sagemaker.amazonaws.com assume it (IAM, the role, Trust relationships); "
        "gpt doctor aws=true role=<name> checks it.",
    ),
    (
        r"\bKMS|\bkms:",
        "A KMS key refuses: launch.role needs kms:Decrypt, kms:GenerateDataKey and kms:CreateGrant on the keys of launch.*_kms_key, "
        "you need the first two on launch.upload_kms_key, and the keys must be in the region of the job.",
    ),
    (
        r"Cannot find.{0,20} image|image .{0,60}(does not exist|not found|not authorized)|CannotPull|ecr:|\.dkr\.ecr\.|manifest unknown|"
        r"ImageNotFound|pull .{0,20}image|exec format error|ContainerEntrypoint|python3?: (not found|No such file)",
        "The image could not be used: see that launch.image_uri exists in the region of the job, is made for its processor, and that "
        "launch.role may pull it (ecr:BatchGetImage, ecr:GetDownloadUrlForLayer, ecr:GetAuthorizationToken).",
    ),
    (
        r"OutOfMemory|out of memory|\bOOM\b|Cannot allocate memory|SIGKILL|exit code:? ?(137|-9)\b|RESOURCE_EXHAUSTED",
        "It ran out of memory: give train.micro_batch a smaller number, train.activation_checkpointing=full, parallel=fsdp, or take "
        "machines with more memory (launch.instance_type).",
    ),
    (
        r"No space left on device|[Dd]isk.{0,20}full|ENOSPC",
        "The machines' storage is full: give launch.volume_gb more, or keep fewer checkpoints (checkpoint.keep_last).",
    ),
    (
        r"NoSuchBucket|bucket does not exist|PermanentRedirect|IllegalLocationConstraint|AuthorizationHeaderMalformed",
        "See that the bucket of launch.output exists, in the region of the job.",
    ),
    (
        r"s3:|\bS3\b|\bs3://|AccessDenied.{0,80}(Object|Bucket)|Access ?Denied$|Forbidden|\b403\b",
        "The bucket cannot be reached: see that launch.output and launch.channels name buckets that exist, and that launch.role (and you) "
        "have s3:GetObject, s3:PutObject and s3:ListBucket there (docs/sagemaker.md).",
    ),
    (
        r"MaxRuntimeExceeded|MaxRuntimeInSeconds",
        "It reached launch.max_runtime; what it had saved is kept: go on with a longer one.",
    ),
    (
        r"\bInterrupted\b|SpotInterruption|spot (capacity|instance).{0,40}(interrupt|reclaim)",
        "AWS took the spot machines back; what it had saved is kept: go on, or without launch.spot.",
    ),
    (
        r"AccessDenied|not authorized to perform|UnauthorizedOperation",
        "You, or launch.role, lack a permission that is named there; docs/sagemaker.md lists them all.",
    ),
)  # fmt: skip


def hint_for(text: str) -> str:
    """What to do, in a sentence, about an error that AWS or a job's log tells of; empty where nothing is known."""
    for pattern, hint in _HINTS:
        if re.search(pattern, text):
            quota = re.search(r"service limit '([^']+)'", text)
            return hint.format(quota=quota[1] if quota else "<instance type> for training job usage")
    return ""
