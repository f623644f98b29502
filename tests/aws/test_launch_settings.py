"""Settings of a job on the command line: names with values, groups within groups, overlays and sweeps over them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gpt.arguments import sweep_values
from gpt.cli import main
from gpt.compose import compose_run
from gpt.errors import UserError
from tests.aws.request_builder import planned


@pytest.mark.parametrize(
    ("settings", "tags"),
    [
        (["launch.tags.team=nlp"], {"team": "nlp"}),
        (["launch.tags.team=nlp", "launch.tags.cost-centre=42"], {"team": "nlp", "cost-centre": "42"}),
        (["launch.tags={team: nlp, stage: 'a, b'}"], {"team": "nlp", "stage": "a, b"}),
        (["launch.tags={team: nlp}", "launch.tags.stage=x"], {"team": "nlp", "stage": "x"}),
        (["launch.tags.team=a", "launch.tags.team=b"], {"team": "b"}),
        (['launch.tags.owner=Zoë O\'Neil = "me"'], {"owner": 'Zoë O\'Neil = "me"'}),
        (["launch.tags.path=${HOME}"], {"path": "${HOME}"}),
    ],
)
def test_names_with_values_come_together_and_arrive_as_they_are(settings, tags):
    assert compose_run("pretrain", settings).launch.tags == tags


def test_a_name_may_have_dots_and_a_value_be_a_uri():
    given = {"train.books": "s3://b/x", "train.de": "s3://b/y=1/"}
    for settings in (
        ["launch.channels={train.books: s3://b/x, train.de: s3://b/y=1/}"],
        [f"launch.channels.{k}={v}" for k, v in given.items()],
    ):
        assert compose_run("pretrain", settings).launch.channels == given


def test_values_have_the_type_of_their_key():
    assert compose_run("pretrain", ["launch.prices.ml.g6.2xlarge=1.5"]).launch.prices == {"ml.g6.2xlarge": 1.5}
    with pytest.raises(UserError, match=r"launch\.prices\.ml\.g6\.2xlarge=dear: must be a number"):
        compose_run("pretrain", ["launch.prices.ml.g6.2xlarge=dear"])
    with pytest.raises(UserError, match=r"launch\.tags=nlp: must be names with values"):
        compose_run("pretrain", ["launch.tags=nlp"])


def test_groups_within_groups():
    assert compose_run("pretrain", ["launch/instance=h200"]).launch.instance_type == "ml.p5en.48xlarge"
    both = compose_run("pretrain", ["launch/instance=trn2", "launch.volume_gb=7", "launch=emulated"]).launch
    assert (both.name, both.instance_type, both.volume_gb) == ("emulated", "ml.trn2.48xlarge", 7)
    with pytest.raises(UserError, match=r"launch/instance=h10: no such option. Did you mean h100\? There are: gpu, h100, h200, trn2"):
        compose_run("pretrain", ["launch/instance=h10"])


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """A folder of the user's own options, such as a team has."""
    (tmp_path / "launch" / "instance").mkdir(parents=True)
    (tmp_path / "launch" / "ours.yaml").write_text(
        "name: sagemaker\nrole: arn:aws:iam::123456789012:role/r\noutput: s3://bucket/p\nimage_uri: i\ntags: {team: nlp}\n"
    )
    (tmp_path / "launch" / "instance" / "cheap.yaml").write_text("# @package launch\ninstance_type: ml.g5.xlarge\nspot: true\n")
    return tmp_path


def test_an_overlay_has_options_of_both_kinds(overlay):
    launch = compose_run("pretrain", ["launch=ours", "launch/instance=cheap", "launch.tags.stage=x"], overlay).launch
    assert (launch.name, launch.instance_type, launch.spot) == ("sagemaker", "ml.g5.xlarge", True)
    assert launch.tags == {"team": "nlp", "stage": "x"}
    assert (
        compose_run("pretrain", ["launch=ours", "launch/instance=h100", "parallel=ddp"], overlay).launch.instance_type == "ml.p5.48xlarge"
    )


def test_sweeps_over_machines_and_names(overlay, capsys):
    assert sweep_values("launch/instance=gpu,h100") == ["launch/instance=gpu", "launch/instance=h100"]
    assert sweep_values("launch/instance=glob(h*)") == ["launch/instance=h100", "launch/instance=h200"]
    assert sweep_values("launch/instance=cheap,gpu", overlay) == ["launch/instance=cheap", "launch/instance=gpu"]
    settings = ["launch=ours", "launch/instance=cheap,gpu", "optimizer.lr=0.1,0.2", "--config-dir", str(overlay), "--cfg"]
    assert main(["pretrain", "-m", *settings]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_what_is_printed_can_be_composed_again(overlay, capsys, tmp_path):
    assert main(["pretrain", "--cfg", "launch=ours", "launch.channels.x=s3://b/x", "--config-dir", str(overlay)]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["launch"]
    assert printed["tags"] == {"team": "nlp"}
    assert printed["channels"] == {"x": "s3://b/x"}


def test_a_setting_reaches_the_request_word_for_word():
    job = planned("launch.tags.note=a = 'b', ü", 'launch.environment.GREETING=say "hi" = $X')
    assert {"Key": "note", "Value": "a = 'b', ü"} in job.request["Tags"]
    assert job.request["Environment"] == {"GREETING": 'say "hi" = $X'}
