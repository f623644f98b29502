"""What a training job can cost at most, by a dated table of list prices in the package. What is not in the table is unknown, never guessed.

The bound is price x machines x (max_runtime + keep_alive):
- `MaxRuntimeInSeconds` holds for all attempts of a job together (StoppingCondition of the API reference), so retries add nothing.
- Managed spot is billed for the time that it runs, at no more than the on-demand price, and waiting for capacity is not billed; the
  bound is that of an on-demand job.
- A warm pool is billed like the job, for keep_alive at most, unless another job takes it over.
Not in it: storage (a volume's GB, on machines without disks of their own), S3, logs, transfer, and the minutes in which a job that was
stopped at max_runtime ends and uploads its model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gpt.typed import shown


@dataclass(frozen=True)
class Cost:
    """The most that a job can cost for its machines."""

    usd: float | None
    """None: unknown, because no price is."""
    per_hour: float | None
    """USD of one machine."""
    how: str
    """How it comes about, or why it is unknown and how to give the price."""

    def __str__(self) -> str:
        return f"unknown: {self.how}" if self.usd is None else f"at most {money(self.usd)}: {self.how}"


def worst_cost(request: dict[str, Any], region: str | None, prices: Mapping[str, float]) -> Cost:
    """The most that a job's machines can cost.

    Args:
        request: of CreateTrainingJob.
        region: where it runs; None: not known.
        prices: launch.prices, which count before the table: instance type -> USD per hour.
    """
    resources, stopping = request.get("ResourceConfig") or {}, request.get("StoppingCondition") or {}
    machine, count = str(resources.get("InstanceType")), resources.get("InstanceCount")
    runtime, kept = stopping.get("MaxRuntimeInSeconds"), resources.get("KeepAlivePeriodInSeconds") or 0
    price, whence = price_of(machine, region, prices)
    if price is None:
        return Cost(None, None, f"{whence}; give it, launch.prices.{machine}=<USD per hour>")
    if not isinstance(count, int) or not isinstance(runtime, int):
        return Cost(None, price, "the request does not say how many machines run, or for how long at most")
    how = f"{count} x {machine} at {price:g} USD/h ({whence}) for {duration(runtime)}"
    how += f" and {duration(kept)} of warm pool" if kept else ""
    how += "; spot costs less" if request.get("EnableManagedSpotTraining") else ""
    return Cost(price * count * (runtime + kept) / 3600, price, how)


def price_of(machine: str, region: str | None, prices: Mapping[str, float]) -> tuple[float | None, str]:
    """USD of a machine for an hour, and whence; or None, and why it is unknown."""
    if machine in prices:
        return prices[machine], "launch.prices"
    listed = table()["regions"]
    dated = f"of {table()['date']}"
    if region is None:
        return None, "no region is set"
    if region not in listed:
        return None, f"the price table {dated} has no region {region}"
    if machine not in listed[region]:
        return None, f"the price table {dated} has no {machine} in {region}"
    return listed[region][machine], f"AWS's list price in {region} {dated}, check it"


def money(usd: float) -> str:
    """`29.33 USD`, rounded up to the cent: a bound must not be above what is shown."""
    cents = math.ceil(round(usd * 100, 6))
    return f"{cents // 100:,}.{cents % 100:02d} USD"


def duration(seconds: int) -> str:
    """`24h`, `1h 30min`, `90s`: as one writes it in the config."""
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    parts = [f"{number}{unit}" for number, unit in ((hours, "h"), (minutes, "min"), (rest, "s")) if number]
    return " ".join(parts) or "0s"


def refusal(cost: Cost, most: float | None) -> str | None:
    """Why launch.max_cost forbids a job; None where it does not, or sets no limit."""
    if most is None:
        return None
    if cost.usd is None:
        return f"launch.max_cost={shown(most)}: what the job can cost is unknown: {cost.how}"
    if cost.usd > most:
        return (
            f"launch.max_cost={shown(most)}: the job can cost {money(cost.usd)}; lower launch.max_runtime or launch.instance_count, take a "
            "cheaper machine, or raise the limit"
        )
    return None


@cache
def table() -> dict[str, Any]:
    """The price table of the package: `date`, `currency`, `source`, and by region the types of machine with their price."""
    return json.loads(Path(__file__).with_name("prices.json").read_text(encoding="utf-8"))
