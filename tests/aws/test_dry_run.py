"""A dry run says everything of a job, calls nobody and needs no account; nothing that has a problem is submitted."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gpt.aws.dry_run import check_before, describe, dry_run, size
from gpt.aws.training_job import NO_REGION, plan_job
from gpt.errors import UserError
from tests.aws.request_builder import COMMIT, IMAGE, NEEDED, NOW, REGION, TOKEN, job_config, planned

ROOT = Path(__file__).parents[2]
SECRET = "ghp_abcdefghijklmnopqrstuvwxyz0123456789"
# Whatever opens a connection or looks up a name ends the process at once, so that nobody can catch it. (urllib3 binds a port of this
# machine when it is imported, to see whether there is IPv6.)
NO_SOCKETS = """
import os, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"):
        print("network:", event, arguments, file=sys.stderr, flush=True)
        os._exit(99)
sys.addaudithook(watch)
"""
RUN = "import runpy\nsys.argv[0] = 'gpt'\nrunpy.run_module('gpt', run_name='__main__')\n"


def in_a_process(folder: Path, code: str, *arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run code where there are no sockets, no settings of AWS, and an empty home."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"HOME": str(folder), "PYTHONPATH": str(ROOT), "AWS_EC2_METADATA_DISABLED": "false"}
    command = [*prefix, sys.executable, "-c", NO_SOCKETS + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, env=environment, check=False)


def dry(folder: Path, *settings: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return in_a_process(folder, RUN, "pretrain", "launch=sagemaker", "launch.dry_run=true", *settings, prefix=prefix)


def test_sockets_are_forbidden_there(tmp_path):
    assert in_a_process(tmp_path, "import socket; socket.create_connection(('127.0.0.1', 9))").returncode == 99
    assert in_a_process(tmp_path, "import socket; socket.getaddrinfo('localhost', 80)").returncode == 99


def test_stdout_is_the_very_request_and_nothing_is_asked(tmp_path):
    (tmp_path / "text.txt").write_text("some text\n" * 100)
    settings = (*NEEDED, f"launch.region={REGION}", "data=text", f"data.paths=[{tmp_path / 'text.txt'}]", "run.id=my-run")
    done = dry(tmp_path, *settings)
    assert done.returncode == 0, done.stderr
    request = json.loads(done.stdout)
    milliseconds, token = re.fullmatch(r"my-run-(\d{13})-([a-z]{4})", request["TrainingJobName"]).groups()
    (commit,) = [tag["Value"] for tag in request["Tags"] if tag["Key"] == "gpt:commit"]
    now = datetime.fromtimestamp(int(milliseconds) / 1000, UTC)
    job = plan_job(job_config(*settings, "launch.dry_run=true"), now, token, REGION, None if commit == "unknown" else commit)
    assert request == job.request
    assert "text.txt 1.0 kB" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"], "a dry run writes nothing"


def test_without_any_network_at_all(tmp_path):
    unshare = shutil.which("unshare")
    prefix = (unshare or "", "--user", "--map-root-user", "--net")
    if not unshare or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces are not allowed here")
    done = dry(tmp_path, *NEEDED, f"launch.region={REGION}", prefix=prefix)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ResourceConfig"]["InstanceType"] == "ml.g6.2xlarge"


def test_everything_is_told_at_once(tmp_path):
    done = dry(
        tmp_path, "launch.spot=true", "launch.max_wait=1h", "launch.network_isolation=true", "data=hf", "data.name=me/texts",
        f"launch.environment.GITHUB_TOKEN={SECRET}", "launch.max_cost=5", "launch.subnets=[subnet-1]", "launch.encrypt_traffic=true",
    )  # fmt: skip
    assert done.returncode == 2
    told = [line.split()[1].partition("=")[0].rstrip(":") for line in done.stderr.splitlines() if line.startswith("problem ")]
    assert sorted(told) == [
        "data.name", "launch.environment.GITHUB_TOKEN", "launch.image_uri", "launch.max_cost", "launch.max_wait", "launch.output",
        "launch.region", "launch.role", "launch.security_groups",
    ]  # fmt: skip
    assert "warning   launch.encrypt_traffic=true" in done.stderr
    assert "9 problems: this would not be submitted" in done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert json.loads(done.stdout)["Environment"]["GITHUB_TOKEN"] == "***"


def test_what_follows_from_a_region_is_not_told_where_none_is_set(tmp_path):
    done = dry(tmp_path, *NEEDED)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("problem")] == [f"problem   {NO_REGION}"]
    assert "cost      unknown: no region is set" in done.stderr
    assert "us-east-1" not in done.stderr.replace(NO_REGION, "")


def test_what_a_value_has_is_shown_in_one_line():
    config = job_config(f"launch.region={REGION}")
    config.launch.tags = {"note": "a\x1b[31mb\nc&"}
    stream, job = io.StringIO(), plan_job(config, NOW, TOKEN, REGION, COMMIT)
    describe(job, check_before(job, config), stream)
    assert "problem   launch.tags.note=a\\x1b[31mb\\nc&: tags are" in stream.getvalue()


@pytest.mark.parametrize("launch", ["local", "emulated"])
def test_what_sends_nothing_has_no_dry_run(tmp_path, launch):
    done = in_a_process(tmp_path, RUN, "pretrain", f"launch={launch}", "launch.dry_run=true")
    assert done.returncode == 2
    assert done.stderr.startswith(f"gpt: launch.dry_run=true is of launch=sagemaker, and this is launch={launch}, which sends nothing")


def test_a_sum_that_may_be_spent(capsys):
    config = job_config("launch.max_runtime=2h", "launch.prices.ml.g6.2xlarge=1.5", "launch.max_cost=3", f"launch.region={REGION}")
    job = plan_job(config, NOW, TOKEN, REGION, COMMIT)
    assert check_before(job, config).refused == ()
    check_before(job, config).refuse()
    dear = replace(config, launch=replace(config.launch, max_cost=2.99))
    with pytest.raises(UserError, match="the job has 1 problem, and nothing was sent") as caught:
        check_before(job, dear).refuse()
    assert caught.value.__notes__ == [
        "launch.max_cost=2.99: the job can cost 3.00 USD; lower launch.max_runtime or launch.instance_count, take a cheaper machine, or "
        "raise the limit"
    ]
    assert (dry_run(job, config), dry_run(job, dear)) == (0, 2)
    assert capsys.readouterr().err.count("cost      at most 3.00 USD: 1 x ml.g6.2xlarge at 1.5 USD/h (launch.prices) for 2h\n") == 2


def test_what_can_cost_anything_is_refused_by_a_limit():
    config = job_config("launch.max_cost=1000", f"launch.region={REGION}")
    (problem,) = check_before(plan_job(config, NOW, TOKEN, REGION, COMMIT), config).refused
    assert problem.key == "launch.max_cost"
    assert "unknown" in problem.text
    assert "launch.prices.ml.g6.2xlarge=<USD per hour>" in problem.text


def test_uploads_are_grouped_by_channel(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("x" * (number + 1) * 1000)
    config = job_config("data=text", f"data.paths=[{tmp_path}]", f"launch.region={REGION}", "run.id=r")
    job = plan_job(config, NOW, TOKEN, REGION, COMMIT)
    stream = io.StringIO()
    describe(job, check_before(job, config), stream)
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["run       r", f"job       {job.name} in {REGION}"]
    assert re.fullmatch(r"uploads   8 files, [\d.]+ MB; what lies there already is not sent again", lines[2])
    assert re.fullmatch(r" {10}code   3 files, [\d.]+ MB, to s3://bucket/prefix/r/code/[0-9a-f]{16}/", lines[3])
    assert re.match(r" {17}gpt_trainer-\S+\.whl [\d.]+ MB, ", lines[4])
    assert re.fullmatch(r" {10}train  5 files, 15\.0 kB, to s3://bucket/prefix/inputs/[0-9a-f]{16}/", lines[5])
    assert lines[6].strip() == ", ".join([*(f"{tmp_path}/{n}.txt {n + 1}.0 kB" for n in (4, 3, 2)), "and 2 more"])
    assert lines[7].startswith("cost      unknown: ")
    assert lines[8:] == ["This would be submitted. It is a dry run, and nothing was sent."]


def test_lines_are_wrapped_in_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "60")
    config = job_config(f"launch.region={REGION}")
    job, wide, narrow = planned(), io.StringIO(), Terminal()
    describe(job, check_before(job, config), wide)
    describe(job, check_before(job, config), narrow)
    assert " ".join(wide.getvalue().split()) == " ".join(narrow.getvalue().split())
    cost = narrow.getvalue().partition("cost ")[2].splitlines()
    assert all(line.startswith(" " * 10) for line in cost[1:3])
    assert max(map(len, cost[:3])) <= 60


def test_a_short_secret_hides_no_other_value(capsys):
    config = job_config("launch.environment.DB_PASSWORD=gpt", f"launch.region={REGION}")
    assert dry_run(plan_job(config, NOW, TOKEN, REGION, COMMIT), config) == 2
    request = json.loads(capsys.readouterr().out)
    assert request["Environment"] == {"DB_PASSWORD": "***"}
    assert request["AlgorithmSpecification"]["TrainingImage"] == IMAGE


def test_sizes_as_people_write_them():
    sizes = (0, 999, 1000, 12_345, 999_400, 999_500, 1_234_567, 5_000_000_000, 7_000_000_000_000)
    assert [size(count) for count in sizes] == ["0 B", "999 B", "1.0 kB", "12.3 kB", "999 kB", "1.0 MB", "1.2 MB", "5.0 GB", "7.0 TB"]
