"""The golden run, twenty steps on a fixed text, and the golden requests of training jobs.

`make golden` rewrites tests/golden/ after a change that is meant to change them.
"""

from __future__ import annotations

import json
import re
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpt.aws.training_job import plan_job
from gpt.compose import compose_run
from gpt.training.metrics import read_metrics
from gpt.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "losses.json"
REQUESTS = ROOT / "tests" / "golden" / "aws"
OPTIMIZERS = ("adamw", "muon")
_KEY = "arn:aws:kms:eu-west-1:123456789012:key/0a1b2c3d-1234-1234-1234-0123456789ab"
_KEYS = (f"launch.output_kms_key={_KEY}", f"launch.upload_kms_key={_KEY}")
_VPC = ("launch.subnets=[subnet-0123456789abcdef0,subnet-0123456789abcdef1]", "launch.security_groups=[sg-0123456789abcdef0]")
JOBS = {
    "gpu": ("launch/instance=gpu", "launch.tags.team=nlp", "launch.environment={NCCL_DEBUG: WARN}"),
    "h100": ("launch/instance=h100", "parallel=fsdp", "launch.instance_count=2", "launch.channels={train.books: s3://corpora/books}"),
    "h200": ("launch/instance=h200", "parallel=ddp", "launch.keep_alive=30min", "tracking=tensorboard", "launch.tensorboard=true"),
    "trn2": ("launch/instance=trn2", "parallel=ddp", "launch.volume_gb=1000"),
    "secure": ("launch.instance_type=ml.m5.xlarge", "launch/security=secure", f"launch.volume_kms_key={_KEY}", *_KEYS, *_VPC),
    "spot": ("launch.spot=true", "launch.max_runtime=6h", "launch.max_wait=12h", "launch.max_retries=3"),
    "vpc": _VPC,
}
"""Preset -> settings of a job, besides those that each needs."""


def golden_losses(optimizer: str, folder: Path) -> list[float]:
    """Train on this project's licence, which does not change, and return the loss of each step."""
    overrides = ["debug=golden", f"optimizer={optimizer}", "data=text", f"data.paths=[{ROOT / 'LICENSE'}]"]
    overrides += [f"data.cache_dir={folder / 'cache'}", f"run.dir={folder / 'runs'}", f"run.id={optimizer}"]
    run = Trainer(compose_run("pretrain", overrides)).fit().run_directory
    return [m["loss"] for m in read_metrics(run / "metrics.jsonl") if "loss" in m]


def golden_job(name: str) -> dict[str, Any]:
    """The request of a job that reads this project's licence, what is uploaded for it, and in what its config differs from the run's."""
    settings = [
        "launch=sagemaker", "run.id=golden", "launch.role=arn:aws:iam::123456789012:role/training", "launch.output=s3://bucket/prefix",
        "launch.image_uri=123456789012.dkr.ecr.eu-west-1.amazonaws.com/gpt:cuda", "data=text", f"data.paths=[{ROOT / 'LICENSE'}]",
        *JOBS[name],
    ]  # fmt: skip
    config = compose_run("pretrain", settings)
    job = plan_job(config, datetime(2026, 11, 22, 3, 30, tzinfo=UTC), "abcd", "eu-west-1", "0123456789ab")
    (inside,) = [upload.source for upload in job.uploads if upload.uri.endswith("/config.json")]
    assert isinstance(inside, bytes)
    made = {
        "settings": list(JOBS[name]),
        "request": job.request,
        "uploads": [upload.uri for upload in job.uploads],
        "config": _differences(config.to_dict(), json.loads(inside)),
    }
    # The code's hash is another after each change of the code.
    return json.loads(re.sub(r"/code/[0-9a-f]{16}/", "/code/<hash>/", json.dumps(made)))


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Key -> its value in `after`, for those that have another one in `before`, but for what `launch` loses."""
    found: dict[str, Any] = {}
    for key, value in after.items():
        if isinstance(value, dict):
            found |= _differences(before[key], value, f"{prefix}{key}.")
        elif value != before[key]:
            found[f"{prefix}{key}"] = value
    return found


def main() -> None:
    """Rewrite the golden files."""
    for name in JOBS:
        (REQUESTS / f"{name}.json").write_text(json.dumps(golden_job(name), indent=1) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        losses = {optimizer: golden_losses(optimizer, Path(folder)) for optimizer in OPTIMIZERS}
    GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
    print(f"wrote {GOLDEN.relative_to(ROOT)} and {len(JOBS)} requests in {REQUESTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
