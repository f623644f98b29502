"""A run that was trained here goes on as a job: the trainer itself takes what was sent for what it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.aws import jobs
from tests.aws.conftest import BUCKET
from tests.aws.moto_jobs import SETTINGS
from tests.aws.request_builder import content_of

TINY = (
    "debug=golden", "train.log_every=1", "train.eval_every=0", "train.eval_tokens=1024", "train.final_eval_tokens=1024",
    "train.sample_prompts=[import]", "train.sample_tokens=4", "device=cpu", "compile=false", "checkpoint.every=2steps",
)  # fmt: skip


def run(config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "gpt.launch", str(config)], capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.slow
def test_the_trainer_goes_on_from_what_a_job_was_given(gpt, aws, tmp_path, monkeypatch):
    settings = [*TINY, "data=text", "data.paths=[book.txt]", f"data.cache_dir={tmp_path / 'cache'}", "run.id=here", "train.budget=4steps"]
    assert gpt("pretrain", *settings)[0] == 0
    planned = []
    real = jobs.plan
    monkeypatch.setattr(jobs, "plan", lambda config: planned.append(real(config)) or planned[-1])
    elsewhere = [one for one in SETTINGS if not one.startswith("data")]
    code, _, err = gpt("pretrain", "resume=runs/here", "train.budget=8steps", "launch.instance_type=ml.m5.xlarge", *elsewhere)
    assert code == 0, err

    # The container's file system, at another root.
    root = tmp_path / "container"
    places = {"gpt/here/checkpoints/": root / "checkpoints"}
    for channel in planned[0].request["InputDataConfig"]:
        places[channel["DataSource"]["S3DataSource"]["S3Uri"].removeprefix(f"s3://{BUCKET}/")] = (
            root / "input/data" / channel["ChannelName"]
        )
    s3 = aws.client("s3")
    for prefix, folder in places.items():
        for entry in s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]:
            path = folder / entry["Key"].removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            s3.download_file(BUCKET, entry["Key"], str(path))
    config = json.loads(content_of(planned[0], "config.json").decode().replace("/opt/ml", str(root)))
    config["data"]["cache_dir"] = config["device"]["cache_dir"] = str(tmp_path / "cache of the container")
    config["device"]["name"] = "cpu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run(tmp_path / "config.json")
    assert done.returncode == 0, done.stderr
    assert "step-00000004" in done.stderr
    lines = [json.loads(line) for line in (root / "checkpoints/here/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
