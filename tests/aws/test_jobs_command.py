"""`gpt jobs list|status|logs|wait|stop|fetch`."""

from __future__ import annotations

import datetime
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from botocore.stub import Stubber

from gpt.aws.records import local_runs, read_submissions
from gpt.aws.session import Aws
from tests.aws.conftest import BUCKET
from tests.aws.job_standins import START, transition
from tests.aws.moto_jobs import SETTINGS, every_job, force, write_log


@pytest.fixture
def submitted(gpt) -> Any:
    """Submit runs of these ids; returns the names of their jobs."""

    def submit(*ids: str) -> list[str]:
        for run_id in ids:
            code, _, err = gpt("pretrain", *SETTINGS, f"run.id={run_id}", "launch.follow=false")
            assert code == 0, err
        return [read_submissions(Path("runs") / run_id)[-1].name for run_id in ids]

    return submit


@pytest.fixture
def stop_stub(monkeypatch) -> Any:
    """Stubs StopTrainingJob, which moto lacks: answers for the jobs in turn, an error's code or nothing."""

    def stub(*answers: tuple[str, str | None]) -> None:
        real = Aws.client

        def client(self: Aws, service: str) -> Any:
            found = real(self, service)
            if service != "sagemaker" or hasattr(found, "stubbed"):
                return found
            found.stubbed = True
            describe = found.describe_training_job
            stubber = Stubber(found)
            for name, code in answers:
                if code:
                    message = "The request was rejected because the training job is in status Completed."
                    stubber.add_client_error("stop_training_job", code, message, expected_params={"TrainingJobName": name})
                else:
                    stubber.add_response("stop_training_job", {}, {"TrainingJobName": name})
            stop = found.stop_training_job

            def stopped(**asked: Any) -> Any:
                with stubber:
                    return stop(**asked)

            found.stop_training_job, found.describe_training_job = stopped, describe
            return found

        monkeypatch.setattr(Aws, "client", client)

    return stub


# list


def test_jobs_of_this_machine_and_of_others_the_newest_last(gpt, submitted):
    first, second = submitted("pretrain-a", "pretrain-b")
    shutil.rmtree("runs/pretrain-a")
    for job, status in zip(every_job(), ("Completed", "InProgress"), strict=True):
        force(status, job)
    every_job()[1].secondary_status = "Downloading"
    for command in (["jobs"], ["jobs", "list"]):
        code, out, _ = gpt(*command)
        head, a, b = out.splitlines()
        assert code == 0
        assert head.split() == ["run", "job", "state", "machines", "submitted", "trained", "cost"]
        assert re.match(rf"pretrain-a  {first[-18:]}  Completed +1 x ml\.g6\.2xlarge  \d{{4}}-\d\d-\d\dT\d\d:\d\d  -", a)
        assert re.match(rf"pretrain-b  {second[-18:]}  Downloading +1 x ml\.g6\.2xlarge ", b)


def test_a_listing_keeps_the_state_it_has_seen(gpt, submitted):
    submitted("a")
    assert read_submissions(Path("runs/a"))[0].status == "InProgress"
    gpt("jobs")
    assert read_submissions(Path("runs/a"))[0].status == "Completed"


def test_jobs_of_others_are_not_listed_and_not_more_than_wanted(gpt, submitted, aws):
    submitted("a", "b", "c")
    for job in every_job():
        job.tags = [tag for tag in job.tags if job.training_job_name.startswith(("a", "c")) or not tag["Key"].startswith("gpt:")]
    shutil.rmtree("runs")
    assert [line.split()[0] for line in gpt("jobs")[1].splitlines()[1:]] == ["a", "c"]
    assert len(gpt("jobs", "n=1")[1].splitlines()) == 2
    assert gpt("jobs", "n=0")[2] == "gpt: n=0 must be from 1 to 100\n"


def test_without_jobs_it_says_how_to_make_one(gpt):
    assert gpt("jobs")[1] == "no jobs of gpt in us-east-1; gpt pretrain launch=sagemaker makes one\n"


# Which run


def test_a_run_is_found_by_much_of_its_id_its_directory_or_its_job(gpt, submitted):
    name, _ = submitted("pretrain-20261120-101112-kmqz", "pretrain-20261121-101112-abcd")
    for word in ("pretrain-20261120-101112-kmqz", "kmqz", "pretrain-20261120", "runs/pretrain-20261120-101112-kmqz", name):
        code, out, err = gpt("jobs", "status", word)
        assert (code, out.splitlines()[0]) == (0, "run pretrain-20261120-101112-kmqz"), err
    code, _, err = gpt("jobs", "status", "pretrain")
    assert (code, err) == (
        2,
        "gpt: runs: pretrain may be pretrain-20261120-101112-kmqz, pretrain-20261121-101112-abcd; write more of the name\n",
    )
    code, _, err = gpt("jobs", "status", "pretrain-20261120-101112-kmqx")
    assert (code, err.endswith("Did you mean pretrain-20261120-101112-kmqz?\n")) == (2, True)
    assert "no job of such a run in us-east-1" in err
    assert "runs: which run? Give its id" in gpt("jobs", "status")[2]


def test_a_run_of_another_machine_is_found_by_its_tag(gpt, submitted):
    (name,) = submitted("pretrain-kmqz")
    shutil.rmtree("runs")
    for word in ("pretrain-kmqz", "kmqz", name):
        code, out, err = gpt("jobs", "status", word)
        assert (code, out.splitlines()[0]) == (0, "run pretrain-kmqz"), err
    assert not Path("runs").exists(), "to look writes nothing"


def test_one_of_several_jobs_of_a_run(gpt, submitted):
    (first,), (second,) = submitted("a"), submitted("a")
    assert first != second
    assert second in gpt("jobs", "status", "a")[1]
    assert first in gpt("jobs", "status", "a", f"job={first}")[1]
    assert first in gpt("jobs", "status", first)[1]
    assert f"job=x: the run a has no such job; it has {first}, {second}" in gpt("jobs", "status", "a", "job=x")[2]


def test_a_job_that_aws_has_forgotten(gpt, submitted):
    (name,) = submitted("a")
    from moto.sagemaker.models import sagemaker_backends

    sagemaker_backends["123456789012"]["us-east-1"].training_jobs.clear()
    code, _, err = gpt("jobs", "status", "a")
    assert (code, err) == (2, f"gpt: runs: a: there is no job {name} in us-east-1; region= names another\n")


# status


def test_the_status_has_states_with_their_times_metrics_and_the_reason(gpt, submitted):
    submitted("a")
    states = [
        {**transition("Starting", 0, "Preparing"), "EndTime": START + datetime.timedelta(minutes=3)},
        transition("Training", 3, "Training in progress"),
    ]
    force("Failed", secondary_status_transitions=states, failure_reason="AlgorithmError: boom,\n exit code: 1")
    code, out, _ = gpt("jobs", "status", "a")
    assert code == 0
    assert "  metrics: train:progress=100\n" in out
    assert "  2026-11-20 10:11:12  Starting (3min): Preparing\n  2026-11-20 10:14:12  Training: Training in progress\n" in out
    assert out.endswith("  reason: AlgorithmError: boom, exit code: 1\n")


# logs and wait


def test_the_log_of_several_hosts_and_the_end(gpt, submitted, aws):
    (name,) = submitted("a")
    record = Path("runs/a/job.json")
    record.write_text(record.read_text().replace('"instance_count": 1', '"instance_count": 2'))
    write_log(aws, name, "one", "two")
    write_log(aws, name, "eins", host=2)
    code, out, err = gpt("jobs", "logs", "a")
    assert (code, out) == (0, "algo-1 | one\nalgo-2 | eins\nalgo-1 | two\n")
    assert "bring the model and the report home: gpt jobs fetch a" in err
    assert gpt("jobs", "logs", "a", "lines=1")[1] == "algo-2 | eins\nalgo-1 | two\n"
    assert "one log at a time" in gpt("jobs", "logs", "a", "b")[2]


def test_leaving_a_log_leaves_the_job(gpt, submitted, monkeypatch):
    submitted("a")
    force("InProgress")
    from gpt.aws import jobs

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "follow", interrupted)
    code, _, err = gpt("jobs", "logs", "a")
    assert (code, "the job goes on. Look at it: gpt jobs logs a; stop it: gpt jobs stop a" in err) == (130, True)
    assert gpt("jobs", "wait", "a", "a")[2].count("the job goes on") == 1


def test_waiting_ends_with_the_code_of_the_first_that_failed(gpt, submitted):
    submitted("a", "b", "c")
    for job, (status, reason) in zip(
        every_job(), [("Completed", None), ("Stopped", None), ("Failed", "AlgorithmError: x, exit code: 1")], strict=True
    ):
        force(status, job, failure_reason=reason)
    code, out, err = gpt("jobs", "wait", "a", "b", "c")
    assert (code, out) == (143, "")
    assert [re.search(rf"{name}-\d+-[a-z]+: (\w+)", err)[1] for name in "abc"] == ["Completed", "Stopped", "Failed"]  # pyright: ignore
    assert gpt("jobs", "wait", "a")[0] == 0
    assert gpt("jobs", "wait", "c", "b")[0] == 1


# stop


def test_stopping(gpt, submitted, stop_stub):
    names = submitted("a", "b")
    force("InProgress")
    stop_stub(*((name, None) for name in names))
    code, out, err = gpt("jobs", "stop", "a", "b")
    assert (code, out) == (0, "")
    assert err.splitlines()[0] == f"{names[0]}: is being stopped; it has two minutes to save a checkpoint. Wait for it: gpt jobs wait a"
    assert [read_submissions(path)[0].status for path in local_runs(Path("runs")).values()] == ["Stopping", "Stopping"]


def test_stopping_what_has_ended_is_no_error(gpt, submitted, stop_stub):
    (name,) = submitted("a")
    stop_stub((name, "ValidationException"))
    assert gpt("jobs", "stop", "a") == (0, "", f"{name}: is Completed already\n")


def test_who_may_not_stop_is_told(gpt, submitted, stop_stub):
    (name,) = submitted("a")
    force("InProgress")
    stop_stub((name, "AccessDeniedException"))
    code, _, err = gpt("jobs", "stop", "a")
    assert (code, err.startswith(f"gpt: gpt jobs stop: {name}: AccessDeniedException: ")) == (2, True)


# fetch


@pytest.fixture
def trained(submitted, aws) -> dict[str, bytes]:
    """A run `a` whose job has left these files in S3."""
    from gpt.config import RunConfig

    submitted("a")
    there = RunConfig()
    there.run.id, there.run.dir, there.train.budget = "a", "/opt/ml/checkpoints", "10steps"
    metrics = [{"step": 10, "tokens": 40960, "loss": 3.5, "seconds": 4.0, "tokens_per_second": 10240.0}, {"step": 10, "val_loss": 3.25}]
    files = {
        "config.yaml": yaml.safe_dump(there.to_dict()).encode(),
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in metrics).encode(),
        "model/config.json": b"{}",
        "model/model.safetensors": b"weights",
        "checkpoints/step-00000010/COMPLETE": b"{}",
    }
    for name, content in files.items():
        aws.client("s3").put_object(Bucket=BUCKET, Key=f"gpt/a/checkpoints/a/{name}", Body=content)
    return files


def test_a_run_comes_home_into_its_directory(gpt, trained):
    config = Path("runs/a/config.yaml").read_bytes()
    code, out, err = gpt("jobs", "fetch", "a")
    assert (code, out) == (0, ""), err
    assert "runs/a: 3 fetched, " in err
    assert "write with it: gpt generate model=runs/a" in err
    assert Path("runs/a/model/model.safetensors").read_bytes() == b"weights"
    assert Path("runs/a/config.yaml").read_bytes() == config, "that of this machine"
    assert not Path("runs/a/checkpoints").exists()
    code, _, err = gpt("jobs", "fetch", "a", "checkpoints=true")
    assert (code, "1 fetched, 2 B; 3 were here already" in err) == (0, True)


def test_a_run_of_another_machine_comes_home_with_its_config(gpt, trained):
    shutil.rmtree("runs")
    assert gpt("jobs", "fetch", "a")[0] == 0
    code, out, _ = gpt("runs")
    assert code == 0
    row = out.splitlines()[1].split()
    assert row[:3] == ["a", "finished", "10"]


def test_there_is_nothing_to_fetch_yet(gpt, submitted):
    submitted("a")
    code, _, err = gpt("jobs", "fetch", "a")
    assert (code, err) == (2, f"gpt: runs: a: there is nothing at s3://{BUCKET}/gpt/a/checkpoints/a yet; gpt jobs status a\n")


def test_gpt_runs_counts_a_completed_job_as_finished_before_its_weights_are_here(gpt, submitted, trained):
    assert gpt("jobs", "wait", "a")[0] == 0
    Path("runs/a/metrics.jsonl").write_bytes(trained["metrics.jsonl"])
    config = Path("runs/a/config.yaml")
    config.write_text(re.sub(r"  budget: .*", "  budget: 10steps", config.read_text()))
    assert gpt("runs")[1].splitlines()[1].split()[:2] == ["a", "finished"]
