"""From `gpt pretrain launch=sagemaker` to a job at AWS (moto), and going on with it. What was asked of AWS is captured: moto forgets
fields."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from gpt.aws import jobs
from gpt.aws.records import read_submissions
from tests.aws.conftest import BUCKET
from tests.aws.job_standins import refusal
from tests.aws.moto_jobs import SETTINGS, force, write_log

JOB_NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9])*")


def created(asked) -> list[dict[str, Any]]:
    return [arguments for operation, arguments in asked if operation == "CreateTrainingJob"]


def test_a_run_is_submitted_written_down_and_followed_to_its_end(gpt, asked):
    code, out, err = gpt("pretrain", *SETTINGS, "run.id=first")
    assert code == 0, err
    (request,) = created(asked)
    assert JOB_NAME.fullmatch(request["TrainingJobName"])
    assert request["TrainingJobName"].startswith("first-")
    assert {"Key": "gpt:run", "Value": "first"} in request["Tags"]
    assert request["CheckpointConfig"]["S3Uri"] == f"s3://{BUCKET}/gpt/first/checkpoints"
    (record,) = json.loads(Path("runs/first/job.json").read_text())
    assert record["name"] == request["TrainingJobName"]
    assert record["arn"].endswith(f":training-job/{record['name']}")
    assert (record["instance_type"], record["instance_count"], record["spot"], record["price"]) == ("ml.g6.2xlarge", 1, False, 1.25)
    assert (record["region"], record["status"]) == ("us-east-1", "Completed")
    config = yaml.safe_load(Path("runs/first/config.yaml").read_text())
    assert (config["run"], config["launch"]["name"], config["data"]["paths"]) == ({"id": "first", "dir": "runs"}, "sagemaker", ["book.txt"])
    assert err.index("submitted first-") < err.index("[00:00:00] Starting") < err.index("gpt jobs fetch first")
    assert out == ""


def test_everything_the_job_reads_lies_in_s3_before_it_is_submitted(gpt, asked, aws):
    assert gpt("pretrain", *SETTINGS, "launch.follow=false")[0] == 0
    operations = [operation for operation, _ in asked]
    submitted = operations.index("CreateTrainingJob")
    assert "PutObject" in operations[:submitted]
    assert "PutObject" not in operations[submitted:]
    keys = [entry["Key"] for entry in aws.client("s3").list_objects_v2(Bucket=BUCKET)["Contents"]]
    for channel in created(asked)[0]["InputDataConfig"]:
        prefix = channel["DataSource"]["S3DataSource"]["S3Uri"].removeprefix(f"s3://{BUCKET}/")
        assert any(key.startswith(prefix) for key in keys)
    assert any(key.endswith("/container.py") for key in keys)
    assert any(key.endswith("/book.txt") for key in keys)


def test_without_following_it_says_how_to_look_and_to_stop(gpt):
    code, _, err = gpt("pretrain", *SETTINGS, "launch.follow=false", "run.dir=elsewhere", "run.id=first")
    assert code == 0
    assert "look at it: gpt jobs logs first dir=elsewhere; stop it: gpt jobs stop first dir=elsewhere" in err
    assert read_submissions(Path("elsewhere/first"))[0].status == "InProgress"


def test_a_run_without_an_id_gets_one(gpt, asked):
    assert gpt("pretrain", *SETTINGS)[0] == 0
    (directory,) = Path("runs").iterdir()
    assert re.fullmatch(r"pretrain-\d{8}-\d{6}-[a-z]{4}", directory.name)
    assert {"Key": "gpt:run", "Value": directory.name} in created(asked)[0]["Tags"]
    assert "ListTrainingJobs" not in {operation for operation, _ in asked}, "nobody else has this id"


@pytest.mark.parametrize("suffix", ["2", "1"])
def test_a_job_that_fails_ends_with_its_reason_and_its_code(gpt, monkeypatch, suffix, aws):
    reason = f"AlgorithmError: gpt: data.paths: no file matches, exit code: {suffix}"

    def fails(*arguments, **settings):
        force("Failed", failure_reason=reason)
        write_log(aws, arguments[1], "loading", "gpt: data.paths: no file matches")
        return follow(*arguments, **settings)

    follow = jobs.follow
    monkeypatch.setattr(jobs, "follow", fails)
    code, out, err = gpt("pretrain", *SETTINGS, "run.id=first")
    assert code == int(suffix)
    assert out == "loading\ngpt: data.paths: no file matches\n"
    assert f"reason: {reason}" in err
    assert "last lines of algo-1:\n  loading\n  gpt: data.paths" in err
    assert "go on from its last checkpoint: gpt pretrain resume=runs/first" in err
    assert read_submissions(Path("runs/first"))[0].status == "Failed"


def test_ctrl_c_leaves_the_job_running_and_says_so(gpt, monkeypatch, asked):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "follow", interrupted)
    code, _, err = gpt("pretrain", *SETTINGS, "run.id=first")
    assert code == 130
    assert "the job goes on. Look at it: gpt jobs logs first; stop it: gpt jobs stop first" in err
    assert "StopTrainingJob" not in {operation for operation, _ in asked}


# Refused before anything is sent


def test_all_problems_at_once_and_nothing_is_sent(gpt, asked):
    code, out, err = gpt("pretrain", *SETTINGS, "launch.max_cost=1", "launch.environment.HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyzABCDEFGH")
    assert (code, out) == (2, "")
    assert "launch.max_cost=1" in err
    assert "HF_TOKEN" in err
    assert asked == []
    assert not Path("runs").exists()


def test_a_dry_run_asks_nothing_and_leaves_nothing(gpt, asked, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    code, out, err = gpt("pretrain", *SETTINGS, "launch.dry_run=true", "run.id=first")
    assert (code, asked) == (0, [])
    assert json.loads(out)["Tags"][0] == {"Key": "gpt:run", "Value": "first"}
    assert "30.00 USD" in err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("code", "message", "said"),
    [
        (
            "ResourceLimitExceeded",
            "The account-level service limit 'ml.g6.2xlarge for training job usage' is 0",
            "The quota of this account",
        ),
        ("AccessDeniedException", "not authorized to perform: iam:PassRole on resource: role", "allow you iam:PassRole"),
        ("ValidationException", "Could not assume role arn", "Trust relationships"),
    ],
)
def test_what_sagemaker_refuses_is_one_line_with_the_remedy(gpt, monkeypatch, code, message, said):
    from botocore.client import BaseClient

    real = BaseClient._make_api_call

    def refuse(self, operation, arguments):
        if operation == "CreateTrainingJob":
            raise refusal(code, message, operation)
        return real(self, operation, arguments)

    monkeypatch.setattr(BaseClient, "_make_api_call", refuse)
    result, _, err = gpt("pretrain", *SETTINGS, "run.id=first")
    line = err.splitlines()[-1]
    assert result == 2
    assert line.startswith("gpt: launch=sagemaker: first-")
    assert f"was not submitted: {code}: {message}" in line
    assert said in line
    assert not Path("runs/first").exists()


def test_an_answer_that_got_lost_is_no_second_job(gpt, monkeypatch, asked):
    from botocore.client import BaseClient

    real = BaseClient._make_api_call

    def lost(self, operation, arguments):
        answer = real(self, operation, arguments)
        if operation == "CreateTrainingJob":
            raise refusal("ResourceInUse", "Training job names must be unique", operation)
        return answer

    monkeypatch.setattr(BaseClient, "_make_api_call", lost)
    assert gpt("pretrain", *SETTINGS, "run.id=first")[0] == 0
    assert len(read_submissions(Path("runs/first"))) == len(created(asked)) == 1


# Going on


def test_a_run_goes_on_under_a_new_name_over_the_same_checkpoints(gpt, asked):
    assert gpt("pretrain", *SETTINGS, "run.id=first", "train.budget=100steps")[0] == 0
    code, _, err = gpt("pretrain", "resume=runs/first", "train.budget=200steps")
    assert code == 0, err
    first, second = created(asked)
    assert first["TrainingJobName"] != second["TrainingJobName"]
    assert first["CheckpointConfig"] == second["CheckpointConfig"]
    assert [one.name for one in read_submissions(Path("runs/first"))] == [first["TrainingJobName"], second["TrainingJobName"]]
    assert yaml.safe_load(Path("runs/first/config.yaml").read_text())["train"]["budget"] == "200steps"
    assert "upload: " in err
    assert "upload: nothing" not in err, "the config is another"


def test_another_machine_may_be_chosen_for_what_goes_on(gpt, asked):
    assert gpt("pretrain", *SETTINGS, "run.id=first")[0] == 0
    instance = ["launch/instance=h100", "launch.prices.ml.p5.48xlarge=60", "parallel.name=ddp"]
    code, _, err = gpt("pretrain", "resume=runs/first", "launch=sagemaker", *instance)
    assert code == 0, err
    assert created(asked)[1]["ResourceConfig"]["InstanceType"] == "ml.p5.48xlarge"
    code, _, err = gpt("pretrain", "resume=runs/first", "model=gpt2")
    assert code == 2
    assert "model=gpt2: a run is continued with the groups it has" in err


@pytest.mark.parametrize("status", ["InProgress", "Stopping"])
def test_a_run_in_progress_is_refused(gpt, asked, status):
    assert gpt("pretrain", *SETTINGS, "run.id=first", "launch.follow=false")[0] == 0
    force(status)
    for again in (["resume=runs/first"], [*SETTINGS, "run.id=first"]):
        code, _, err = gpt("pretrain", *again)
        assert code == 2
        assert re.search(
            rf"^gpt: run\.id=first: its job first-\d{{13}}-[a-z]{{4}} is {status}; wait for its end \(gpt jobs wait first\)", err, re.M
        )
    Path("runs").rename("runs of another machine")
    code, _, err = gpt("pretrain", *SETTINGS, "run.id=first")
    assert (code, f"is {status}" in err) == (2, True), "found by its tag"
    assert len(created(asked)) == 1


def test_a_job_of_another_run_with_a_name_alike_is_none_of_ours(gpt):
    assert gpt("pretrain", *SETTINGS, "run.id=first-b", "launch.follow=false")[0] == 0
    force("InProgress")
    assert gpt("pretrain", *SETTINGS, "run.id=first", "launch.follow=false")[0] == 0


def test_never_means_never(gpt, asked, aws):
    assert gpt("pretrain", *SETTINGS, "run.id=first")[0] == 0
    code, _, err = gpt("pretrain", *SETTINGS, "run.id=first", "resume=never")
    assert (code, "run.id=first: runs/first exists, and resume=never; choose another run.id" in err) == (2, True)
    aws.client("s3").put_object(Bucket=BUCKET, Key="gpt/second/checkpoints/second/metrics.jsonl", Body=b"")
    code, _, err = gpt("pretrain", *SETTINGS, "run.id=second", "resume=never")
    assert (code, f"s3://{BUCKET}/gpt/second/checkpoints/second/ exists, and resume=never" in err) == (2, True)
    assert len(created(asked)) == 1


def test_a_job_json_that_cannot_be_read_is_named(gpt):
    Path("runs/first").mkdir(parents=True)
    Path("runs/first/job.json").write_text("{")
    code, _, err = gpt("pretrain", *SETTINGS, "run.id=first")
    assert (code, err.startswith("gpt: runs/first/job.json cannot be read (")) == (2, True)


# A run that was trained here


@pytest.fixture
def trained_here(gpt) -> Path:
    """A run directory as a run on this machine leaves it, so far as a job cares."""
    assert gpt("pretrain", *SETTINGS, "run.id=here", "launch.dry_run=true")[0] == 0
    from gpt.compose import compose_run

    run = Path("runs/here")
    for step in (10, 20):
        checkpoint = run / "checkpoints" / f"step-{step:08d}"
        (checkpoint / "optimizer").mkdir(parents=True)
        for name in ("model.safetensors", "optimizer/state.safetensors", "state.json", "COMPLETE"):
            (checkpoint / name).write_text(f"{name} of {step}")
    torn = run / "checkpoints" / "step-00000030"
    torn.mkdir()
    (torn / "state.json").write_text("{}")
    for name in ("metrics.jsonl", "tokenizer.json", "report.html", ".lock"):
        (run / name).write_text(name)
    config = compose_run("pretrain", ["data=text", "data.paths=[book.txt]", "run.id=here", "optimizer.lr=0.004"])
    (run / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    return run


def test_a_run_of_this_machine_takes_its_checkpoints_along(gpt, trained_here, asked, aws):
    code, _, err = gpt("pretrain", "resume=runs/here", *(one for one in SETTINGS if not one.startswith("data")))
    assert code == 0, err
    assert "runs/here has been trained here: its checkpoints go with it" in err
    root = "gpt/here/checkpoints/here/"
    stored = aws.client("s3").list_objects_v2(Bucket=BUCKET, Prefix=root)["Contents"]
    whole = [
        f"checkpoints/step-000000{n}0/{name}"
        for n in (1, 2)
        for name in ("COMPLETE", "model.safetensors", "optimizer/state.safetensors", "state.json")
    ]
    assert sorted(entry["Key"].removeprefix(root) for entry in stored) == sorted([*whole, "config.yaml", "metrics.jsonl", "tokenizer.json"])
    sent = [arguments["Key"].removeprefix(root) for operation, arguments in asked if operation == "PutObject" and root in arguments["Key"]]
    assert {Path(key).name for key in sent[-2:]} == {"COMPLETE"}, "a checkpoint counts once it is whole"
    config = yaml.safe_load(aws.client("s3").get_object(Bucket=BUCKET, Key=f"{root}config.yaml")["Body"].read())
    assert config["data"]["paths"] == ["/opt/ml/input/data/train"] or config["data"]["paths"][0].startswith("/opt/ml/input/data/train")
    assert (config["run"]["dir"], config["launch"]["name"], config["optimizer"]["lr"]) == ("/opt/ml/checkpoints", "local", 0.004)


def test_what_the_user_changes_is_not_made_out_to_be_the_run_s_own(gpt, trained_here, aws):
    settings = [*(one for one in SETTINGS if not one.startswith("data")), "seed=7"]
    assert gpt("pretrain", "resume=runs/here", *settings)[0] == 0
    body = aws.client("s3").get_object(Bucket=BUCKET, Key="gpt/here/checkpoints/here/config.yaml")["Body"].read()
    assert yaml.safe_load(body)["seed"] == 1337, "the job refuses another seed, as a run here does"


def test_checkpoints_that_are_in_s3_already_are_not_sent_again(gpt, trained_here, asked):
    settings = [one for one in SETTINGS if not one.startswith("data")]
    assert gpt("pretrain", "resume=runs/here", *settings)[0] == 0
    asked.clear()
    code, _, err = gpt("pretrain", "resume=runs/here")
    assert (code, "trained here" in err) == (0, False)
    assert not [arguments for operation, arguments in asked if operation == "PutObject" and "checkpoints/" in arguments["Key"]]


def test_a_run_that_a_process_here_is_training_is_refused(gpt, trained_here, asked):
    with FileLock(trained_here / ".lock"):
        code, _, err = gpt("pretrain", "resume=runs/here", *(one for one in SETTINGS if not one.startswith("data")))
    assert (code, "run.id=here: another process is working in" in err) == (2, True)
    assert created(asked) == []
