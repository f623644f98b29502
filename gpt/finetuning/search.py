"""Choosing what to freeze: which plans a search tries, and what their figures say. Imports no torch."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpt.config import parse_span
from gpt.errors import UserError
from gpt.typed import shown

CLOSE = 0.01
"""A loss that is higher than the best by no more than this share is as good: some times what seeds alone differ by in a short run."""
MORE = 10
"""The rate of plans that train few parameters, as a multiple of the others': at the same one they would only look worse than they are."""
_OF_A_PLAN = ("freeze", "unfreeze", "layerwise_lr_decay", "lora", "optimizer")
"""What a plan may set: how much trains and how fast. Data, seed and length are the same for all."""
_COUNTS = ("freeze.first_n_blocks", "freeze.only_last_n_blocks")


@dataclass(frozen=True)
class Tried:
    """What came of a plan."""

    plan: str
    state: str
    share: float | None
    """Of the parameters, which trains at the beginning."""
    loss: float | None
    """Best validation loss, nats per token."""
    seconds: float
    """Of training."""
    tokens: int
    tokens_per_second: float | None
    """Median over the try."""
    memory: int | None
    """Bytes, at most."""
    note: str = ""

    def cost(self, timed: bool) -> float:
        """What it takes of time: its seconds, or, where all tries take the same time, seconds for a million tokens."""
        return 1e6 * self.seconds / self.tokens if timed and self.tokens else self.seconds


def default_plans(n_layer: int, lr: float | None = None) -> list[str]:
    """What is tried unless plans are named: a quarter, a half and three quarters of the blocks frozen, and what is common elsewhere.

    Args:
        n_layer: blocks of the model.
        lr: of AdamW; None: another optimizer, whose rates are left alone. What trains few parameters has `MORE` times that.
    """
    counts = sorted({round(n_layer * share) for share in (0.25, 0.5, 0.75)} & set(range(1, n_layer)))
    above = ["last_n_only"] if n_layer > 1 and n_layer - 1 not in counts else []  # else it is the last of those before it
    blocks = [f"first_n freeze.first_n_blocks={count}" for count in counts]
    faster = f" optimizer.lr={MORE * lr:g}" if lr is not None else ""
    return ["none", "embeddings", *blocks, *above, *(f"{few}{faster}" for few in ("norms_and_biases", "head_only", "lora.rank=8"))]


def read_plan(text: str) -> dict[str, str]:
    """`first_n freeze.first_n_blocks=2` -> its settings as key and value; the option of the group `freeze` comes first.

    Raises:
        UserError: it is none, or sets what must be the same for all plans.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"freeze.search_plans: {shown(text)} cannot be read ({error})") from error
    option = words.pop(0) if words and "=" not in words[0] else ""
    settings = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"freeze.search_plans: {shown(text)}: {word} must be key=value; each plan is a text of its own in the list")
        if key.partition(".")[0] not in _OF_A_PLAN:
            raise UserError(
                f"freeze.search_plans: {shown(text)}: {key} is the same for all plans; a plan sets keys of {', '.join(_OF_A_PLAN)}"
            )
        settings[key] = value
    option = settings.pop("freeze", option) or ("custom" if any(key.startswith("freeze.") for key in settings) else "")
    if option == "search" or any(key.startswith("freeze.search_") for key in settings):
        raise UserError(f"freeze.search_plans: {shown(text)} is no plan but a search; name what is tried")
    if not option and not settings:
        raise UserError("freeze.search_plans: a plan is empty; freeze=none is written none")
    return {"freeze": option, **settings} if option else settings


def plan_text(settings: Mapping[str, str]) -> str:
    """A plan as `read_plan` reads it."""
    words = [settings["freeze"]] if "freeze" in settings else []
    return shlex.join([*words, *(f"{key}={value}" for key, value in settings.items() if key != "freeze")])


def short_plan(plan: str) -> str:
    """What a plan is called in a chart: `first_n 2`, `lora.rank=8`."""
    words = []
    for key, equals, value in (word.partition("=") for word in shlex.split(plan)):
        words.append(value if key in _COUNTS else f"{key.removeprefix('freeze.').removeprefix('optimizer.')}{equals}{value}")
    return " ".join(words)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other one beats in both cost and loss, the cheapest first; of equal ones the first."""
    front: list[int] = []
    for number in sorted(range(len(points)), key=lambda number: points[number]):
        if not front or points[number][1] < points[front[-1]][1]:
            front.append(number)
    return front


def choose(tries: Sequence[Tried], timed: bool) -> tuple[Tried, Tried] | None:
    """The plan with the best loss, and the fastest of those that come as close to it as `CLOSE`; None: no try has finished."""
    whole = [(one, one.loss) for one in tries if one.state == "finished" and one.loss is not None]
    if not whole:
        return None
    best, loss = min(whole, key=lambda pair: pair[1])
    return best, min((one for one, own in whole if own <= loss * (1 + CLOSE)), key=lambda one: one.cost(timed))


def advice(best: Tried, fastest: Tried, timed: bool) -> str:
    """What to take, in a sentence or two."""
    if fastest is best:
        return f"Take {best.plan}: it has the best loss, {best.loss:.3f}, and no plan within {CLOSE:.0%} of that is faster."
    memory = f" and {fastest.memory / best.memory:.0%} of its memory" if fastest.memory and best.memory else ""
    return (
        f"Take {fastest.plan}: its loss, {fastest.loss:.3f}, is within {CLOSE:.0%} of the best, {best.loss:.3f} ({best.plan}), "
        f"in {fastest.cost(timed) / best.cost(timed):.0%} of its time{memory}."
    )


def budget_of_tries(search_budget: str, budget: str) -> str:
    """`train.budget` of each try.

    Args:
        search_budget: `freeze.search_budget`, a share or a length.
        budget: `train.budget` of the run that the plan is chosen for.

    Raises:
        UserError: it is neither.
    """
    try:
        share = float(search_budget)
    except ValueError:
        parse_span("freeze.search_budget", search_budget)
        return search_budget
    if not 0 < share <= 1:
        raise UserError(
            f"freeze.search_budget={shown(search_budget)} must be a share of train.budget, above 0 and at most 1, or a length with its "
            f"unit, such as {shown(f'{search_budget.strip()}steps' if share > 1 else '200steps')}"
        )
    whole = parse_span("train.budget", budget)
    amount = math.ceil(whole.amount * share) if whole.unit in ("steps", "tokens") else round(whole.amount * share, 4)
    return f"{amount:.10g}{'s' if whole.unit == 'seconds' else whole.unit}"
