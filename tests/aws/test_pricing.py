"""What a job can cost at most, and what is unknown."""

from __future__ import annotations

import re

import pytest

from gpt.aws.pricing import Cost, duration, money, price_of, refusal, table, worst_cost
from tests.aws.request_builder import planned

US = "us-east-1"


def cost_of(*settings: str, region: str = US, **prices: float) -> Cost:
    return worst_cost(planned(*settings).request, region, {f"ml.{name.replace('_', '.')}": price for name, price in prices.items()})


def test_the_bound_is_price_times_machines_times_time():
    assert cost_of("launch.max_runtime=90min").usd == pytest.approx(1.222 * 1.5)
    assert cost_of("launch.max_runtime=2h", "launch.instance_count=3", "parallel=ddp").usd == pytest.approx(1.222 * 3 * 2)
    assert cost_of("launch/instance=h100", "parallel=fsdp").usd == pytest.approx(63.296 * 24)


def test_a_warm_pool_costs_and_retries_do_not():
    assert cost_of("launch.max_runtime=2h", "launch.keep_alive=30min").usd == pytest.approx(1.222 * 2.5)
    assert cost_of("launch.max_runtime=2h", "launch.max_retries=30").usd == pytest.approx(1.222 * 2)


def test_spot_costs_no_more_than_on_demand_and_waiting_nothing():
    spot = cost_of("launch.max_runtime=2h", "launch.spot=true", "launch.max_wait=20h")
    assert spot.usd == pytest.approx(1.222 * 2)
    assert "spot costs less" in spot.how


def test_prices_of_the_user_count_first():
    assert cost_of("launch.max_runtime=1h", g6_2xlarge=0.5).usd == pytest.approx(0.5)
    found = cost_of("launch.max_runtime=1h", "launch.instance_type=ml.m5.xlarge", region="eu-west-1", m5_xlarge=0.25)
    assert (found.usd, found.per_hour) == (0.25, 0.25)
    assert "launch.prices" in found.how


@pytest.mark.parametrize(
    ("machine", "region", "why"),
    [("ml.p5en.48xlarge", US, "no ml.p5en.48xlarge in us-east-1"), ("ml.g6.2xlarge", "eu-west-1", "no region eu-west-1")],
)
def test_what_is_not_in_the_table_is_unknown(machine, region, why):
    assert price_of(machine, region, {})[0] is None
    request = planned(f"launch.instance_type={machine}", "parallel=ddp" if "48" in machine else "parallel=none").request
    found = worst_cost(request, region, {})
    assert found.usd is None
    assert why in str(found)
    assert f"launch.prices.{machine}=" in str(found)
    assert str(found).startswith("unknown: ")


def test_a_limit_refuses_what_could_cost_more_and_what_is_unknown():
    known = Cost(29.33, 1.222, "24h of it")
    assert refusal(known, None) is None
    assert refusal(known, 29.33) is None
    assert refusal(known, 29.32).startswith("launch.max_cost=29.32: the job can cost 29.33 USD; lower launch.max_runtime")
    unknown = Cost(None, None, "nobody knows; give it, launch.prices.ml.x=<USD per hour>")
    assert refusal(unknown, None) is None
    assert refusal(unknown, 1e9).startswith("launch.max_cost=1000000000: what the job can cost is unknown: nobody knows; give it")


def test_without_a_region_the_cost_is_unknown_unless_the_price_is_given():
    assert str(worst_cost(planned().request, None, {})).startswith("unknown: no region is set; give it, launch.prices.ml.g6.2xlarge=")
    assert worst_cost(planned("launch.max_runtime=2h").request, None, {"ml.g6.2xlarge": 1.0}).usd == 2.0


def test_a_request_that_says_too_little_is_unknown():
    assert worst_cost({}, US, {}).usd is None
    assert worst_cost({"ResourceConfig": {"InstanceType": "ml.g6.2xlarge"}}, US, {}).usd is None


def test_the_table_is_dated_and_its_prices_grow_with_the_machine():
    prices = table()
    assert re.fullmatch(r"20\d\d-[01]\d-[0-3]\d", prices["date"])
    assert prices["currency"] == "USD"
    assert "check" in prices["source"]
    for region in prices["regions"].values():
        assert all(re.fullmatch(r"ml\.[a-z0-9-]+\.\d*x?large", name) and 0.01 < price < 1000 for name, price in region.items())
        for family in ("g5", "g6", "g6e"):
            assert region[f"ml.{family}.xlarge"] < region[f"ml.{family}.2xlarge"] < region[f"ml.{family}.12xlarge"]
            assert region[f"ml.{family}.48xlarge"] == pytest.approx(2 * region[f"ml.{family}.24xlarge"], rel=0.001)


def test_the_table_has_only_machines_that_sagemaker_trains_on():
    from botocore.loaders import create_loader

    known = create_loader().load_service_model("sagemaker", "service-2")["shapes"]["TrainingInstanceType"]["enum"]
    assert {name for region in table()["regions"].values() for name in region} <= set(known)


def test_amounts_and_times_as_people_write_them():
    assert money(1519.104) == "1,519.11 USD"
    assert money(0.3) == "0.30 USD"
    assert money(0.1 * 3) == "0.30 USD"
    assert money(0) == "0.00 USD"
    assert [duration(n) for n in (0, 59, 60, 5400, 86400, 3661)] == ["0s", "59s", "1min", "1h 30min", "24h", "1h 1min 1s"]
