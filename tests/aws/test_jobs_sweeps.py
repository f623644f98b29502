"""Sweeps of training jobs: a bounded number at once, gone on with after a stop, and one table."""

from __future__ import annotations

import functools
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from gpt.aws import sweeping
from tests.aws.conftest import BUCKET
from tests.aws.moto_jobs import SETTINGS, every_job, force

SWEEP = ("pretrain", "-m", *SETTINGS, "run.id=lr", "train.budget=10steps")
RATES = "optimizer.lr=0.001,0.002,0.003,0.004,0.005"


class World:
    """What happens at AWS while a sweep waits: each job runs for three looks, and leaves its files in S3."""

    def __init__(self, aws: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.aws, self.most, self.looks = aws, 0, 0
        self.ends: dict[str, tuple[str, str]] = {}
        self.stop_after = 10**9
        self._age: dict[str, int] = {}
        from moto.sagemaker.models import SageMakerModelBackend

        create = SageMakerModelBackend.create_training_job

        def created(backend: Any, **asked: Any) -> Any:
            job = create(backend, **asked)
            force("InProgress", job)
            self.most = max(self.most, sum(one.training_job_status == "InProgress" for one in every_job()))
            return job

        monkeypatch.setattr(SageMakerModelBackend, "create_training_job", created)
        monkeypatch.setattr(sweeping, "run_jobs", functools.partial(sweeping.run_jobs, pause=self.pause))
        monkeypatch.setattr(sweeping, "EVERY", 1)
        monkeypatch.setattr("gpt.training.charts.svg", lambda title, draw: f"<svg>{title}</svg>")
        monkeypatch.setattr("gpt.runs.compare.svg", lambda title, draw: f"<svg>{title}</svg>")

    def pause(self, seconds: float) -> None:
        self.looks += 1
        assert self.looks < 200, "it waits for ever"
        if self.looks == self.stop_after:
            signal.raise_signal(signal.SIGINT)
        for job in every_job():
            name = job.training_job_name
            self._age[name] = self._age.get(name, 0) + 1
            if job.training_job_status == "InProgress" and self._age[name] == 3:
                self._end(job, *next((end for key, end in self.ends.items() if name.startswith(key)), ("Completed", "")))

    def _end(self, job: Any, status: str, reason: str) -> None:
        force(status, job, failure_reason=reason or None)
        run_id = next(tag["Value"] for tag in job.tags if tag["Key"] == "gpt:run")
        loss = 3 + int(run_id.split("-")[1]) / 10
        lines = [{"step": 10, "tokens": 40960, "loss": loss, "seconds": 4.0}, {"step": 10, "val_loss": loss, "val_bpb": loss}]
        metrics = "".join(json.dumps(line) + "\n" for line in lines)
        files = {"metrics.jsonl": metrics, "model/model.safetensors": "weights", "environment.json": "{}"}
        for name, content in files.items():
            self.aws.client("s3").put_object(Bucket=BUCKET, Key=f"gpt/{run_id}/checkpoints/{run_id}/{name}", Body=content.encode())


@pytest.fixture
def world(aws, monkeypatch) -> World:
    return World(aws, monkeypatch)


def runs_of(asked) -> list[str]:
    """The run of each job that was submitted, in the order of submission."""
    created = [arguments for operation, arguments in asked if operation == "CreateTrainingJob"]
    return [next(tag["Value"] for tag in one["Tags"] if tag["Key"] == "gpt:run") for one in created]


def test_one_job_each_at_most_so_many_at_once_and_one_table(gpt, world, asked):
    code, out, err = gpt(*SWEEP, RATES, "launch.max_parallel=2")
    assert code == 0, err
    assert runs_of(asked) == [f"lr-0{number}-lr_0.00{number}" for number in range(1, 6)]
    assert world.most == 2
    rows = [line.split() for line in out.splitlines()]
    assert [(row[0], row[1], row[2], row[-1]) for row in rows[1:]] == [(f"0{n}", f"0.00{n}", f"3.{n}000", "finished") for n in range(1, 6)]
    assert "[3/5] optimizer.lr=0.003: submitted lr-03-lr-0-003-" in err
    for number in range(1, 6):
        directory = Path(f"runs/lr-0{number}-lr_0.00{number}")
        assert (directory / "metrics.jsonl").is_file()
        assert not (directory / "model").exists(), "weights are brought when they are asked for"
    assert Path("runs/lr.html").is_file()
    assert Path("runs/lr.txt").read_text() == out


@pytest.mark.parametrize("most", [1, 3])
def test_how_many_run_at_once_is_the_user_s_to_say(gpt, world, most):
    assert gpt(*SWEEP, RATES, f"launch.max_parallel={most}")[0] == 0
    assert world.most == most


def test_the_same_command_runs_nothing_twice(gpt, world, asked):
    assert gpt(*SWEEP, RATES)[0] == 0
    code, out, err = gpt(*SWEEP, RATES)
    assert (code, err.count("finished before"), len(runs_of(asked))) == (0, 5, 5)
    assert out.count("finished") == 5


def test_ctrl_c_leaves_the_jobs_and_the_same_command_goes_on_with_them(gpt, world, asked):
    world.stop_after = 2
    code, _, err = gpt(*SWEEP, RATES, "launch.max_parallel=2")
    assert code == 130
    assert "left; 2 jobs go on. Stop them: gpt jobs stop lr-01-lr_0.001 lr-02-lr_0.002\n" in err
    assert "interrupted; continue with: gpt pretrain -m" in err
    assert [job.training_job_status for job in every_job()] == ["InProgress", "InProgress"]
    world.stop_after = 10**9
    code, out, err = gpt(*SWEEP, RATES, "launch.max_parallel=2")
    assert code == 0, err
    assert err.count(" is under way") == 2
    assert len(runs_of(asked)) == len(set(runs_of(asked))) == 5
    assert world.most == 2
    assert out.count("finished") == 5


def test_one_that_fails_does_not_stop_the_others_and_is_tried_again(gpt, world, asked):
    world.ends = {"lr-02": ("Failed", "AlgorithmError: torch.OutOfMemoryError: CUDA out of memory, exit code: 1")}
    code, out, err = gpt(*SWEEP, "optimizer.lr=0.001,0.002,0.003")
    assert code == 1
    assert "hint: It ran out of memory" in err
    assert re.search(r"^02 .* failed +torch\.OutOfMemoryError: CUDA out of memory, exit code: 1$", out, re.MULTILINE)
    assert out.count("finished") == 2
    assert "1 of 3 runs did not finish; the same command tries them again" in err
    world.ends = {}
    assert gpt(*SWEEP, "optimizer.lr=0.001,0.002,0.003")[0] == 0
    assert runs_of(asked)[3:] == ["lr-02-lr_0.002"]


def test_one_that_is_stopped_counts_as_interrupted(gpt, world):
    world.ends = {"lr-01": ("Stopped", "")}
    code, out, _ = gpt(*SWEEP, "optimizer.lr=0.001,0.002")
    assert (code, re.search(r"^01 .* interrupted$", out, re.MULTILINE) is not None) == (1, True)


def test_one_that_aws_refuses_does_not_stop_the_others(gpt, world, monkeypatch):
    from job_standins import refusal

    real = sweeping.send

    def refuse_the_second(config, *rest):
        if config.run.id.startswith("lr-02"):
            from gpt.aws.session import explained

            with explained("launch=sagemaker: not submitted"):
                raise refusal("ResourceLimitExceeded", "The account-level service limit 'x' is 1")
        return real(config, *rest)

    monkeypatch.setattr(sweeping, "send", refuse_the_second)
    code, out, err = gpt(*SWEEP, "optimizer.lr=0.001,0.002,0.003")
    assert (code, out.count("finished")) == (1, 2)
    assert "[2/3] optimizer.lr=0.002: failed; launch=sagemaker: not submitted: ResourceLimitExceeded" in err


def test_files_that_do_not_come_home_are_a_warning(gpt, world, monkeypatch):
    from gpt.errors import UserError

    def full(*_: Any) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(sweeping, "fetch", full)
    code, out, err = gpt(*SWEEP, "optimizer.lr=0.001,0.002")
    assert (code, out.count("finished"), err.count("warning: the disk is full")) == (0, 2, 2)


# Refused before the first job


def test_all_together_may_not_cost_more_than_allowed(gpt, world, asked):
    code, _, err = gpt(*SWEEP, RATES, "launch.max_cost=100")
    assert code == 2
    assert "gpt: launch.max_cost=100: the 5 jobs of this sweep can cost 150.00 USD together" in err
    assert runs_of(asked) == []
    assert gpt(*SWEEP, RATES, "launch.max_cost=151")[0] == 0


def test_one_combination_that_cannot_be_stops_all_before_the_first(gpt, world, asked):
    code, _, err = gpt(*SWEEP, "launch.max_runtime=1h,2000h")
    assert code == 2
    assert "of [2/2] launch.max_runtime=2000h; no job was submitted" in err
    assert runs_of(asked) == []


def test_a_sweep_stays_with_its_jobs(gpt, world, asked):
    code, _, err = gpt(*SWEEP, RATES, "launch.follow=false")
    assert (code, runs_of(asked)) == (2, [])
    assert err.splitlines()[-1].startswith("gpt: launch.follow=false: a sweep stays with its jobs")


def test_a_dry_run_prints_every_request_and_what_all_can_cost(gpt, asked):
    code, out, err = gpt(*SWEEP, RATES, "launch.dry_run=true")
    assert (code, asked) == (0, [])
    requests, decoder = [], json.JSONDecoder()
    while out.strip():
        request, end = decoder.raw_decode(out.lstrip())
        requests.append(request)
        out = out.lstrip()[end:]
    assert [request["HyperParameters"]["optimizer.lr"] for request in requests] == [f"0.00{number}" for number in range(1, 6)]
    assert len({request["CheckpointConfig"]["S3Uri"] for request in requests}) == 5
    assert err.endswith("worst case of all 5 jobs: 150.00 USD\n")
    assert not Path("runs").exists()


def test_a_dry_run_counts_what_is_unknown_and_refuses_what_is_too_much(gpt, asked):
    machines = "launch.instance_type=ml.g6.2xlarge,ml.g6.4xlarge"
    code, _, err = gpt(*SWEEP, machines, "launch.dry_run=true", "launch.region=eu-west-1", "launch.image_uri=x")
    assert "worst case of all 2 jobs: 30.00 USD, and 1 of them of which it is unknown\n" in err
    code, _, err = gpt(*SWEEP, RATES, "launch.dry_run=true", "launch.max_cost=100")
    assert code == 2
    assert err.splitlines()[-1].startswith("problem: launch.max_cost=100: the 5 jobs of this sweep can cost 150.00 USD together")


def test_a_search_of_plans_stays_here(gpt, asked, tmp_path):
    from gpt.config import RunConfig
    from gpt.errors import UserError
    from gpt.plan_search import _refuse

    config = RunConfig()
    config.launch.name = "sagemaker"
    with pytest.raises(UserError, match=r"^launch=sagemaker: a search runs on this machine"):
        _refuse(config)
