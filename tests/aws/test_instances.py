"""What each machine is."""

from __future__ import annotations

import re

import pytest
from botocore.session import Session

from gpt.aws.instances import INSTANCES, find_instance, has_own_disks
from gpt.errors import UserError

OFFERED = Session().get_service_model("sagemaker").shape_for("TrainingInstanceType").enum
REFUSED = ("ml.trn1.", "ml.trn1n.", "ml.p2.")
UNKNOWN = ("ml.g7.",)  # newer than what is known of it


@pytest.mark.parametrize("name", OFFERED)
def test_each_type_that_sagemaker_offers_is_known_refused_or_to_be_described(name):
    if name.startswith(REFUSED):
        with pytest.raises(UserError, match=rf"^launch\.instance_type={re.escape(name)}: .*take "):
            find_instance(name)
        return
    found = find_instance(name)
    if name.startswith(UNKNOWN):
        assert found is None
        return
    assert found is not None
    accelerated = name.split(".")[1][0] in "pg" or name.startswith("ml.trn")
    assert (found.device == "cpu") == (not accelerated)
    assert found.processes >= 1
    assert (found.processes == 1) or accelerated
    assert bool(found.chip) == bool(found.memory_gb) == accelerated


def test_no_type_is_listed_that_sagemaker_does_not_offer():
    assert INSTANCES.keys() <= set(OFFERED)


@pytest.mark.parametrize(
    ("name", "device", "processes", "chip", "memory"),
    [
        ("ml.g6.2xlarge", "cuda", 1, "L4", 24),
        ("ml.p5.48xlarge", "cuda", 8, "H100", 80),
        ("ml.p5.4xlarge", "cuda", 1, "H100", 80),
        ("ml.p5en.48xlarge", "cuda", 8, "H200", 141),
        ("ml.g4dn.12xlarge", "cuda", 4, "T4", 16),
        ("ml.g4dn.16xlarge", "cuda", 1, "T4", 16),
        ("ml.trn2.48xlarge", "neuron", 64, "Trainium2", 24),
        ("ml.m5.xlarge", "cpu", 1, "", 0),
        ("ml.c7i-flex.2xlarge", "cpu", 1, "", 0),
    ],
)
def test_what_it_computes_on(name, device, processes, chip, memory):
    found = find_instance(name)
    assert found is not None
    assert (found.device, found.processes, found.chip, found.memory_gb) == (device, processes, chip, memory)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("g6.2xlarge", "is no type of training instance, such as ml.g6.2xlarge. Did you mean ml.g6.2xlarge?"),
        ("ml.p5.48xlarg", "is no type of training instance, such as ml.g6.2xlarge. Did you mean ml.p5.48xlarge?"),
        ("ml.p5.24xlarge", "there is no such size. Did you mean ml.p5.4xlarge? There are: ml.p5.4xlarge, ml.p5.48xlarge"),
        ("", "is no type of training instance, such as ml.g6.2xlarge"),
    ],
)
def test_what_is_none_is_named_with_the_nearest(name, says):
    with pytest.raises(UserError) as error:
        find_instance(name)
    assert str(error.value) == f"launch.instance_type={name}: {says}"


def test_which_have_disks_of_their_own():
    assert [has_own_disks(f"ml.{name}") for name in ("g6.2xlarge", "p5.48xlarge", "r5d.large", "p3.2xlarge", "m5.large", "g7.2xlarge")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
