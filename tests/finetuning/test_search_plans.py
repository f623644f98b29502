"""Which plans a search tries, and what their figures say."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.errors import UserError
from gpt.finetuning.search import Tried, advice, budget_of_tries, choose, default_plans, pareto, plan_text, read_plan, short_plan


def tried(plan: str, loss: float | None, seconds: float, tokens: int = 1000, memory: int | None = 100, state: str = "finished") -> Tried:
    return Tried(plan, state, 1.0, loss, seconds, tokens, 10.0, memory)


@pytest.mark.parametrize(
    ("n_layer", "counts", "above"),
    [(1, [], False), (2, [1], False), (4, [1, 2, 3], False), (12, [3, 6, 9], True), (48, [12, 24, 36], True)],
)
def test_the_default_plans_follow_the_number_of_blocks(n_layer: int, counts: list[int], above: bool) -> None:
    plans = default_plans(n_layer)
    assert [int(plan.rpartition("=")[2]) for plan in plans if plan.startswith("first_n ")] == counts
    assert ("last_n_only" in plans) == above
    assert {"none", "embeddings", "norms_and_biases", "head_only", "lora.rank=8"} <= set(plans)
    assert all(read_plan(plan) for plan in plans)
    faster = {plan.partition(" optimizer.lr=")[0]: plan.partition(" optimizer.lr=")[2] for plan in default_plans(n_layer, 2e-4)}
    assert list(faster) == plans
    assert [plan for plan, lr in faster.items() if lr] == ["norms_and_biases", "head_only", "lora.rank=8"]
    assert {lr for lr in faster.values() if lr} == {"0.002"}


@pytest.mark.parametrize(
    ("text", "settings", "short"),
    [
        ("none", {"freeze": "none"}, "none"),
        ("first_n freeze.first_n_blocks=2", {"freeze": "first_n", "freeze.first_n_blocks": "2"}, "first_n 2"),
        ("lora.rank=8", {"lora.rank": "8"}, "lora.rank=8"),
        ("freeze.embeddings=true", {"freeze": "custom", "freeze.embeddings": "true"}, "custom embeddings=true"),
        ("freeze=head_only optimizer.lr=0.1", {"freeze": "head_only", "optimizer.lr": "0.1"}, "head_only lr=0.1"),
        (
            "custom 'freeze.patterns=[embeddings, blocks.0]'", {"freeze": "custom", "freeze.patterns": "[embeddings, blocks.0]"},
            "custom patterns=[embeddings, blocks.0]",
        ),
    ],
)  # fmt: skip
def test_a_plan_is_a_text_of_settings(text: str, settings: dict[str, str], short: str) -> None:
    assert read_plan(text) == settings
    assert read_plan(plan_text(settings)) == settings
    assert short_plan(plan_text(settings)) == short


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("first_n 2", "2 must be key=value"),
        ("none seed=3", "seed is the same for all plans"),
        ("none train.budget=3steps", "train.budget is the same for all plans"),
        ("search", "is no plan but a search"),
        ("freeze.search_budget=1", "is no plan but a search"),
        ("custom 'x", "cannot be read"),
    ],
)
def test_what_is_no_plan_is_said(text: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        read_plan(text)


@pytest.mark.parametrize(
    ("share", "whole", "budget"),
    [
        ("0.25", "100steps", "25steps"), ("0.25", "2epochs", "0.5epochs"), ("0.1", "1001tokens", "101tokens"), ("1", "3min", "180s"),
        ("0.5", "1Mtokens", "500000tokens"), ("60s", "2epochs", "60s"), ("200steps", "2epochs", "200steps"), ("0.001", "9steps", "1steps"),
    ],
)  # fmt: skip
def test_a_budget_is_a_share_or_a_length(share: str, whole: str, budget: str) -> None:
    assert budget_of_tries(share, whole) == budget


@pytest.mark.parametrize(
    ("share", "said"), [("0", "above 0"), ("30", "such as 30steps"), ("-1", "above 0"), ("nan", "above 0"), ("x", "200")]
)
def test_a_budget_that_is_neither_is_refused(share: str, said: str) -> None:
    with pytest.raises(UserError, match=r"freeze\.search_budget") as error:
        budget_of_tries(share, "100steps")
    assert said in str(error.value) or "500steps" in str(error.value)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_the_front_is_what_no_other_point_beats(points: list[tuple[float, float]]) -> None:
    front = pareto(points)

    def beaten(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)

    assert {points[n] for n in front} == {point for point in points if not beaten(point)}
    assert [points[n] for n in front] == sorted({points[n] for n in front}), "from left to right, equal points once"


def test_the_fastest_within_a_hundredth_of_the_best_is_taken() -> None:
    tries = [
        tried("none", 2.0, 100, memory=200), tried("near", 2.0199, 60), tried("nearer", 2.01, 70), tried("far", 2.021, 10),
        tried("stopped", 1.0, 1, state="interrupted"), tried("nothing", None, 1),
    ]  # fmt: skip
    found = choose(tries, timed=False)
    assert found is not None
    assert [one.plan for one in found] == ["none", "near"]
    assert advice(*found, timed=False) == (
        "Take near: its loss, 2.020, is within 1% of the best, 2.000 (none), in 60% of its time and 50% of its memory."
    )
    alone = choose([tries[0], tries[3]], timed=False)
    assert alone is not None
    assert advice(*alone, timed=False).startswith("Take none: it has the best loss, 2.000, and no plan")
    assert choose(tries[4:], timed=False) is None


def test_where_all_take_the_same_time_the_one_that_sees_more_text_is_faster() -> None:
    tries = [tried("none", 2.0, 60, tokens=1000), tried("half", 2.0, 60.5, tokens=4000)]
    found = choose(tries, timed=True)
    assert found is not None
    assert found[1].plan == "half"
    assert tries[0].cost(timed=True) == pytest.approx(60_000)
