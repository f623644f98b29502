"""The request of each preset, whole. `make golden` rewrites them after a change that is meant to change them."""

from __future__ import annotations

import json

import pytest
from botocore.session import Session
from botocore.validate import ParamValidator

from scripts.golden import JOBS, REQUESTS, golden_job


@pytest.mark.parametrize("name", JOBS)
def test_the_request_is_the_golden_one(name):
    assert golden_job(name) == json.loads((REQUESTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", JOBS)
def test_botocore_knows_every_field(name):
    shape = Session().get_service_model("sagemaker").operation_model("CreateTrainingJob").input_shape
    request = json.loads((REQUESTS / f"{name}.json").read_text(encoding="utf-8"))["request"]
    assert not ParamValidator().validate(request, shape).has_errors()
    assert ParamValidator().validate(request | {"Unknown": 1}, shape).has_errors()


def test_there_is_a_golden_request_of_each_preset_and_no_other():
    assert {path.stem for path in REQUESTS.glob("*.json")} == set(JOBS)
