"""`gpt finetune freeze=search`: a run for each of several plans of what trains, with the same data, seed and schedule, and a comparison.

A search is a sweep over plans: each try is a process of its own, and how it ended is read from its directory, so that the same command
goes on with a search that was stopped. Imports no torch.
"""

from __future__ import annotations

import copy
import os
import shlex
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

from gpt.compose import compose_run
from gpt.config import RunConfig, parse_span
from gpt.errors import UserError
from gpt.finetuning.search import Tried, advice, budget_of_tries, choose, default_plans, plan_text, read_plan
from gpt.sweep import Sweep, SweptRun, conclude, held, join_earlier, new_id, ranked, run_all, say
from gpt.typed import shown

_CACHE = "frozen"  # a folder of each try: what an earlier one has computed would make a later one look faster than it is


def search(arguments: Sequence[str], config: RunConfig, config_dir: Path | None = None) -> int:
    """Try plans and say which one to take.

    Args:
        arguments: of the command, with `freeze=search`.
        config: which they have been composed into.
        config_dir: a folder of the user's own options.

    Returns:
        0: every try finished; 1: some did not; 128 plus the signal that stopped the search.

    Raises:
        UserError: nothing was started: a plan is impossible, or it is not the search that has its id.
    """
    _refuse(config)
    plan = _compose(arguments, config, config_dir)
    with held(plan):
        join_earlier(plan)
        for run in plan.runs:
            if run.config is not None:
                run.config.freeze.cache_dir = str(run.path / _CACHE)
        stopped_by = run_all(plan)
        for run in plan.runs:
            if run.state == "finished":
                shutil.rmtree(run.path / _CACHE, ignore_errors=True)
        _report(plan, _fixed(arguments, config_dir), config)
        return conclude(plan, ["gpt", "finetune", *arguments], config_dir, stopped_by)


def _refuse(config: RunConfig) -> None:
    """Raises UserError for what does not go with a search."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError(
            "freeze=search starts the processes of its tries itself; start it once, with launch.nproc=... for several processes"
        )
    if config.launch.name == "sagemaker":
        raise UserError("launch=sagemaker: a search runs on this machine; leave it out here, and give it to the run that follows")
    if config.launch.nnodes > 1:
        raise UserError(f"launch.nnodes={config.launch.nnodes}: a search runs on one machine; leave it out, and give it to the run itself")
    if config.precompile:
        raise UserError("precompile=true: freeze=search compiles for each plan as it tries it; leave one of them out")
    if config.lora.rank:
        raise UserError(
            f"lora.rank={config.lora.rank}: with freeze=search adapters are a plan like others; write lora.rank=8 into freeze.search_plans"
        )
    if config.resume not in ("auto", "never"):
        raise UserError(
            f"resume={shown(config.resume)}: a search is continued by the same command with its run.id; leave resume out, or give never"
        )


def _fixed(arguments: Sequence[str], config_dir: Path | None) -> list[str]:
    """What is the same for all tries and for the run that follows."""
    fixed = [a for a in arguments if (key := a.partition("=")[0]) not in ("freeze", "run.id") and not key.startswith("freeze.search_")]
    return [*fixed, f"--config-dir={config_dir}"] if config_dir else fixed


def _compose(arguments: Sequence[str], config: RunConfig, config_dir: Path | None) -> Sweep:
    """Compose and check every try.

    Raises:
        UserError: the first plan that is impossible, with its text.
    """
    rate = config.optimizer.lr if config.optimizer.name == "adamw" else None
    texts = config.freeze.search_plans or default_plans(config.model.n_layer, rate)
    tries = [read_plan(text) for text in texts]
    if len(tries) < 2:
        raise UserError(f"freeze.search_plans={shown(texts)}: there is nothing to choose from; give two plans at least")
    if twice := [text for number, text in enumerate(texts) if tries[number] in tries[:number]]:
        raise UserError(f"freeze.search_plans: {shown(twice[0])} is there twice; leave one out")
    budget = budget_of_tries(config.freeze.search_budget, config.train.budget)
    named = {argument.partition("=")[0] for argument in arguments}
    # Cheap where it says nothing about a plan, unless the user wants it otherwise.
    cheap = {
        "train.sample_tokens": "1", "train.final_eval_tokens": str(config.train.eval_tokens),
        "checkpoint.every": "10min", "checkpoint.keep_last": "1",
    }  # fmt: skip
    settings = [*_fixed(arguments, None), *(f"{key}={value}" for key, value in cheap.items() if key not in named)]
    same = {a.partition("=")[0]: a.partition("=")[2] for a in _fixed(arguments, None)}
    for key in ("run.dir", "resume"):
        same.pop(key, None)
    same |= {"freeze": "search", "freeze.search_budget": config.freeze.search_budget}
    plan = Sweep("finetune", config.run.id or new_id("search"), Path(config.run.dir).expanduser(), same, kind="search")
    for number, (text, own) in enumerate(zip(texts, tries, strict=True), 1):
        chosen = [f"{key}={value}" for key, value in ({"freeze": "none"} | own).items()]
        try:
            one = compose_run("finetune", [*settings, *chosen, f"train.budget={budget}"], config_dir)
            one.freeze.search_plans, one.freeze.search_budget = [], type(one.freeze)().search_budget
            _check(one)
        except UserError as error:
            raise UserError(f"{error} (plan {number} of {len(tries)}: {text}; nothing was started)") from error
        one.run.id, one.run.dir = "", str(plan.folder)
        plan.runs.append(SweptRun(Path(), own, one))
    return plan


def _check(config: RunConfig) -> None:
    """Raises UserError for a plan that does not fit the model."""
    from gpt.training.trainer import Trainer

    Trainer(copy.deepcopy(config))


def read_tries(plan: Sweep) -> list[Tried]:
    """What came of every plan, the best loss first, those that did not finish last."""
    from gpt.runs.search_page import measure

    result = []
    for run, row in ranked(plan):
        rates, memory, share = measure(run.path)
        rate = statistics.median(rates) if rates else None
        figures = (share, row.best_val_loss, row.seconds, row.tokens) if row else (None, None, 0.0, 0)
        result.append(Tried(plan_text(run.settings), run.state, *figures, rate, memory, run.note))
    return result


def _report(plan: Sweep, fixed: Sequence[str], config: RunConfig) -> None:
    """Print the table, the advice and the command that follows from it; keep them, and make the page."""
    from gpt.runs.search_page import format_tries, write_search_page

    tries = read_tries(plan)
    timed = parse_span("train.budget", budget_of_tries(config.freeze.search_budget, config.train.budget)).unit == "seconds"
    text = format_tries(tries)
    says = command = ""
    if (found := choose(tries, timed)) is not None:
        says = advice(*found, timed)
        command = shlex.join(["gpt", "finetune", *fixed, *_settings(found[1].plan)])
        text += f"\n\n{says}\nThe whole run: {command}"
    say("")
    print(text, flush=True)
    begun = [run.path for run, _ in ranked(plan) if (run.path / "metrics.jsonl").is_file()]
    try:
        plan.file(".txt").write_text(text + "\n", encoding="utf-8")
        say(f"\ntable: {plan.file('.txt')}")
        if begun:
            page = write_search_page(begun, plan.file(".html"), f"{plan.id}: what to freeze", tries, says, command, timed)
            say(f"page:  {page}")
    except (OSError, UserError) as error:  # the runs are there, and `gpt runs` shows them
        say(f"warning: the table or the page could not be written ({error})")


def _settings(plan: str) -> list[str]:
    """A plan as arguments of a command."""
    return [f"{key}={value}" for key, value in read_plan(plan).items()]
