"""Tasks of lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness), answered by a model of ours.

The harness makes the questions and the metrics; the adapter gives it log-likelihoods and continuations, the same that its own
`HFLM` gets from the exported model.
"""

from __future__ import annotations

import difflib
import json
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt.commands import EvaluateConfig
from gpt.data.hub import hub_answers, quiet_hub
from gpt.errors import UserError
from gpt.evaluation.perplexity import token_nll
from gpt.evaluation.progress import note, progress_bar
from gpt.inference.generate import generate_text, whole_texts
from gpt.inference.loading import Loaded
from gpt.inference.sampling import Sampling
from gpt.model.transformer import GPT

_MAX_GEN_TOKS = 256  # HFLM's, where a task does not say
_SEED = 1234  # the harness's own, for whatever is drawn
_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}


def find_tasks(names: Sequence[str], folder: str | None) -> Any:
    """The harness's index of tasks, where all of `names` (or patterns such as mmlu_*) are in it.

    Args:
        names: of tasks, groups or tags.
        folder: of more tasks, as YAML files.

    Raises:
        UserError: no such task, no such folder, or the harness is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"tasks={names[0]} needs lm-evaluation-harness: pip install 'gpt-trainer[eval]' ({error})") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of each default that it takes
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise UserError(f"tasks_dir={folder}: there is no such folder")
    manager = TaskManager(include_path=None if folder is None else str(Path(folder).expanduser()))
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, 3, 0.6)
            raise UserError(
                f"tasks={name}: no such task"
                + (f". Did you mean {', '.join(near)}?" if near else f" among {len(manager.all_tasks):,}; tasks_dir adds your own")
            )
    return manager


def run_tasks(manager: Any, loaded: Loaded, length: int, config: EvaluateConfig) -> dict[str, Any]:
    """Run the config's tasks, print the harness's table of metrics, and return them.

    Args:
        manager: from `find_tasks`.
        loaded: the model.
        length: tokens of context to use.
        config: which tasks and how much of them.

    Raises:
        UserError: a task that the harness cannot set up, for want of its data or otherwise.
    """
    from lm_eval.evaluator import evaluate

    evaluate_: Any = evaluate  # its decorator hides its parameters
    model = adapter(loaded, length, config.batch)
    random.seed(0)  # the seeds of the harness's own command
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    offline = not hub_answers()
    try:
        with quiet_hub(offline):
            tasks = manager.load(manager.match_tasks(config.tasks))
        for task in tasks["tasks"].values():
            own = task.get_config("num_fewshot")  # a task that says 0 has no examples to show
            task.set_config("num_fewshot", own or 0 if config.num_fewshot is None or own == 0 else config.num_fewshot)
            task.set_fewshot_seed(_SEED)
        found = evaluate_(lm=model, task_dict=tasks, limit=config.limit, log_samples=False)
    except UserError:
        raise
    except Exception as error:  # whatever a task's own code raises
        if model.asked:
            raise
        what = " ".join(str(error).split())[:300]
        if offline and isinstance(error, ConnectionError):
            raise UserError(
                f"tasks={','.join(config.tasks)}: {what}, and it was not downloaded before; is there a network, or is HF_HUB_OFFLINE set?"
            ) from error
        raise UserError(f"tasks={','.join(config.tasks)}: the harness cannot set them up: {type(error).__name__}: {what}") from error
    _print_table(found)
    kept = {key: found[key] for key in ("results", "groups", "n-shot", "n-samples") if key in found}
    return kept | {"task_versions": found["versions"]}


def _print_table(found: dict[str, Any]) -> None:
    """One line per task and metric; of a group its tasks' and its own."""
    rows: list[tuple[str, ...]] = [("task", "questions", "shots", "metric", "value", "± error")]
    for name, figures in found["results"].items():
        questions = found.get("n-samples", {}).get(name, {}).get("effective", "")
        for key, value in figures.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            arrow = {True: " ↑", False: " ↓"}.get(found.get("higher_is_better", {}).get(name, {}).get(metric), "")
            error = figures.get(f"{metric}_stderr,{filtered}")
            shown = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in (value, "" if error in (None, "N/A") else error)]
            label = metric + arrow + (f" ({filtered})" if filtered != "none" else "")
            rows.append((name, str(questions), str(found["n-shot"].get(name, "")), label, *shown))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def loglikelihoods(
    model: GPT,
    pairs: Sequence[tuple[list[int], list[int]]],
    length: int,
    batch: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[tuple[float, bool]]:
    """How likely continuations are.

    Pairs that the model reads the same of are read once: answers of one token to one question. The longest come first, and the
    shorter of a batch are padded on the right, which a causal model does not see. Logits are made only of what is scored.

    Args:
        model: in eval mode.
        pairs: ids of a context, at least one, and of its continuation. Where they are longer than the model reads, the context
            is cut at its beginning.
        length: most tokens to read, plus one that is only predicted.
        batch: texts per pass.
        advance: told how many pairs each pass has scored.

    Returns:
        Per pair, nats (at most 0) and whether greedy decoding would write this continuation.

    Raises:
        UserError: a continuation of more than `length` tokens.
    """
    if (longest := max((len(continuation) for _, continuation in pairs), default=0)) > length:
        raise UserError(f"tasks: there is an answer of {longest} tokens; the model reads at most {length}")
    of: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, (context, continuation) in enumerate(pairs):
        if continuation:
            of[tuple((context + continuation)[-(length + 1) : -1])].append(number)
    texts, found = sorted(of, key=len, reverse=True), [(0.0, True)] * len(pairs)
    device = model.head.weight.device
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        tokens = torch.tensor([[*text, *[0] * (len(part[0]) - len(text))] for text in part], device=device)
        numbers = [number for text in part for number in of[text]]
        scored = [pairs[number][1] for number in numbers]
        sizes = [len(continuation) for continuation in scored]
        ends = [(row, len(text)) for row, text in enumerate(part) for _ in of[text]]
        places = [row * len(part[0]) + end - size + i for (row, end), size in zip(ends, sizes, strict=True) for i in range(size)]
        with torch.no_grad():
            hidden = model.hidden_states(tokens).flatten(0, 1)[torch.tensor(places, dtype=torch.int64, device=device)]
            nats, likeliest = token_nll(model, hidden, torch.tensor([*chain(*scored)], dtype=torch.int64, device=device))
        for number, cost, greedy in zip(numbers, nats.cpu().double().split(sizes), likeliest.cpu().split(sizes), strict=True):
            found[number] = (-cost.sum().item(), bool(greedy.all()))
        advance(len(numbers))
    return found


def adapter(loaded: Loaded, length: int, batch: int) -> Any:
    """The model as the harness wants it: an `lm_eval.api.model.TemplateLM`. Its `asked` says whether it has been used.

    Raises:
        UserError: the tokenizer has no token that can stand before a text.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokenizer, model = loaded.tokenizer, loaded.model
    named = {name: tokenizer.backend.token_to_id(token) for name, token in tokenizer.special_tokens.items()}
    first = next((i for i in (named.get("bos_token"), tokenizer.end_of_text, named.get("eos_token")) if i is not None), None)
    if first is None:
        raise UserError("tasks: the model's tokenizer has no token that can stand before a text")

    said: set[str] = set()

    def say_once(text: str) -> None:
        if text not in said:
            note(text)
        said.add(text)

    class Adapter(TemplateLM):
        asked = False

        @property
        def eot_token_id(self) -> int:
            return first

        @property
        def max_length(self) -> int:
            return length

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return tokenizer.encode(string) if add_special_tokens is False else tokenizer.encode_prompt(string)

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            ids, answer = super()._encode_pair(context, continuation)
            # An answer that merges with the question's last token would be of no tokens, and certain.
            return ids, answer or self.tok_encode(continuation, add_special_tokens=False)

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            self.asked = True
            with progress_bar("scoring answers", len(requests)) as advance:
                pairs = [(context or [first], continuation) for _, context, continuation in requests]
                return loglikelihoods(model, pairs, length, batch, advance)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            pairs, numbers = [], []
            for number, request in enumerate(requests):
                windows = get_rolling_token_windows(self.tok_encode(*request.args), first, length, 1)
                pairs += [(None, *make_disjoint_window(window)) for window in windows]
                numbers += [number] * (len(pairs) - len(numbers))
            totals = [0.0] * len(requests)
            for number, (total, _) in zip(numbers, self._loglikelihood_tokens(pairs), strict=True):
                totals[number] += total
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            self.asked = True
            groups: dict[str, list[int]] = defaultdict(list)
            times: dict[str, int] = defaultdict(int)
            for number, request in enumerate(requests):
                again = json.dumps(request.args, default=str)
                groups[json.dumps([request.args[1], times[again]], default=str)].append(number)
                times[again] += 1
            texts = [""] * len(requests)
            with progress_bar("writing answers", len(requests)) as advance:
                for key, group in groups.items():
                    settings = normalize_gen_kwargs(requests[group[0]].args[1], _MAX_GEN_TOKS)
                    prompts = {number: self.tok_encode(requests[number].args[0]) for number in group}
                    group.sort(key=lambda number: -len(prompts[number]))
                    for start in range(0, len(group), batch):
                        part = group[start : start + batch]
                        for number, text in zip(part, self._write([prompts[n] for n in part], settings, json.loads(key)[1]), strict=True):
                            texts[number] = text
                        advance(len(part))
            return texts

        def _write(self, prompts: list[list[int]], settings: Any, repeat: int) -> list[str]:
            """One batch of continuations; `repeat` of the same question draws other random numbers."""
            most = min(settings["max_gen_toks"], length // 2)
            if most < settings["max_gen_toks"]:
                say_once(f"answers are written up to {most} tokens, not {settings['max_gen_toks']}: the context is {length}")
            if unknown := sorted(name for name in settings.keys() - _GENERATION if settings[name] not in (None, False, 1)):
                say_once(f"the task's {', '.join(f'{name}={settings[name]}' for name in unknown)} is not used")
            sampling = Sampling(
                temperature=float(settings.get("temperature", 1.0)) if settings["do_sample"] else 0.0,
                top_k=settings.get("top_k") or 0, top_p=settings.get("top_p") or 1.0, min_p=settings.get("min_p") or 0.0,
                repetition_penalty=settings.get("repetition_penalty") or 1.0, seed=_SEED + repeat,
            )  # fmt: skip
            cut = [(prompt or [first])[-(length - most) :] for prompt in prompts]
            pieces = generate_text(model, tokenizer, cut, most, sampling, settings["until"], loaded.end_ids)
            return whole_texts(pieces, len(cut))

    return Adapter()
