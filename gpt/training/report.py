"""The page of a run: `report.html` in the run directory, one file that opens anywhere, without a network.

It shows the key figures, the curves of `metrics.jsonl` as inline SVG, samples, the config and the environment. `LiveReport` keeps
it fresh while the run goes on: `python -m gpt.training.report <run directory>` draws it from the files alone.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gpt.training.charts import (
    ACCENT,
    SECOND,
    SERIES,
    Curve,
    Point,
    count,
    draw_areas,
    draw_bars,
    draw_curves,
    duration,
    is_finite,
    noisy,
    short,
    svg,
    time_unit,
)
from gpt.training.freezing_figure import freezing_section, stage_steps
from gpt.training.metrics import read_metrics
from gpt.training.page import write_page
from gpt.training.progress import say as say_aloud
from gpt.training.run_record import RunRow, count_parameters, describe_run, flat

NAME = "report.html"
RELOAD_SECONDS = 30
Unit = Literal["token", "example", "word"]
SCORES = {"accuracy": "Accuracy", "macro_f1": "Macro-F1", "span_f1": "Span F1"}  # of a classifier
ANSWER_FIGURES = ("exact_match", "token_f1", "rouge_1", "rouge_2", "rouge_l", "chrf", "bleu")
PARTS = ("data", "forward", "backward", "optimizer", "other")  # of a step
FIRST_SECONDS = 20.0  # until the first live page: a run that is over by then needs none
_MOST_SHARE = 50  # a live page is drawn again after so many times what drawing it took: 2% of one core at most


@dataclass(frozen=True)
class Sample:
    """A prompt and the continuation that the model wrote."""

    prompt: str
    text: str
    expected: str = ""
    """How the held-out text goes on there, where the prompt is its beginning."""


@dataclass(frozen=True)
class Summary:
    """The key figures of a run; None stands for what was not measured."""

    title: str  # the run id
    model: str  # for people, such as "nano, 2.2M parameters, Qwen3 shape"
    steps: int
    tokens: int  # trained on
    seconds: float  # of training
    tokens_per_second: float
    best_val_loss: float | None  # nats per `unit`
    best_step: int | None
    val_bpb: float | None  # bits per byte over all of the held-out text
    gzip_bpb: float | None  # of the same text under gzip -9
    xz_bpb: float | None  # of the same text under xz -9e
    skipped_steps: int  # without an update
    finished: bool  # False: interrupted
    held_out: str = "held-out text"  # what the bits per byte are of
    unit: Unit = "token"  # what has one target
    scores: dict[str, float] = field(default_factory=dict)  # of a classifier on what was held out: accuracy, macro_f1, span_f1
    reward_accuracy: float | None = None  # on held-out pairs of preference, instead of bits per byte
    counted: Unit = "token"  # what has one target in training: `tokens` is of these


@dataclass(frozen=True)
class Chart:
    """A chart of the page."""

    title: str
    svg: str
    note: str = ""


def write_report(run_directory: Path, samples: list[Sample], summary: Summary, charts: Sequence[Chart] = ()) -> Path:
    """Write the page of a run that has ended, from its files: `metrics.jsonl`, `config.yaml` and `environment.json`, each of which may
    be missing.

    An earlier page is replaced in one move, so a reader never sees half of one.

    Args:
        run_directory: of the run.
        samples, summary: what no file of it holds.
        charts: as well, which come first.

    Returns:
        The path of the page.
    """
    status = f"{'Finished' if summary.finished else 'Interrupted'} after {count(summary.steps, 'step')}"
    return _write(run_directory, samples, summary, _by_step(read_metrics(run_directory / "metrics.jsonl")), status, charts=charts)


def write_live_report(run_directory: Path, stopped: bool = False) -> Path:
    """Write the page of a run from its files alone: one that goes on, that reloads itself, or one that was interrupted.

    The page of a run that has finished is left as it is: its samples are in no other file.

    Args:
        run_directory: whole or not.
        stopped: the run ends here, although its directory is still locked.
    """
    run, path = describe_run(run_directory), run_directory / NAME
    if run.state == "finished" and path.is_file():
        return path
    lines, keys = _by_step(read_metrics(run_directory / "metrics.jsonl")), flat(run.config)
    rates = [line["tokens_per_second"] for line in lines if is_finite(line.get("tokens_per_second"))]
    skipped = [line["skipped_steps"] for line in lines if is_finite(line.get("skipped_steps"))]
    summary = Summary(
        title=run.id, model=_model(run), steps=run.step, tokens=run.tokens, seconds=run.seconds,
        tokens_per_second=statistics.median(rates) if rates else 0.0, best_val_loss=run.best_val_loss, best_step=run.best_step,
        val_bpb=run.val_bpb, gzip_bpb=None, xz_bpb=None, skipped_steps=int(skipped[-1]) if skipped else 0, finished=run.state == "finished",
        held_out="the validation text", unit=unit_of(keys.get("model.head")),
        counted=counted_of(keys.get("model.head"), keys.get("loss_on")), scores=_latest_scores(lines),
    )  # fmt: skip
    if run.state == "running" and not stopped:
        return _write(run_directory, [], summary, lines, _progress(run, lines), live=True)
    return _write(run_directory, [], summary, lines, f"{'Finished' if summary.finished else 'Interrupted'} after {count(run.step, 'step')}")


class LiveReport:
    """Keeps a run's page fresh while it goes on. Each page is drawn by a process of its own, of the lowest priority, on one core.

    Args:
        run_directory: of the run.
        every_seconds: least time from one page to the next. Pages that take long are drawn less often.
        say: told about the first page that fails; later failures are silent, and none of them stops the run.
    """

    def __init__(self, run_directory: Path, every_seconds: float = 60, say: Callable[[str], None] = say_aloud) -> None:
        self._directory, self._every, self._say = run_directory, every_seconds, say
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._due = time.monotonic() + min(every_seconds, FIRST_SECONDS)
        self._closed = self._complained = False

    def refresh(self, now: bool = False) -> None:
        """Start to draw the page, if it is time and no earlier one is still being drawn. Returns at once.

        Args:
            now: do not wait until it is time.
        """
        if self._closed or (self._thread is not None and self._thread.is_alive()) or not (now or time.monotonic() >= self._due):
            return
        self._due = time.monotonic() + self._every
        self._thread = threading.Thread(target=self._draw, name="report", daemon=True)  # to start a process takes milliseconds
        self._thread.start()

    def close(self, stopped: bool = False) -> None:
        """End a page that is being drawn: after this none is written that would replace the final one.

        Args:
            stopped: the run has ended before its last step and has no final page: a last one is drawn that says so, for which this
                waits up to five seconds.
        """
        self._closed = True
        if self._thread is not None:
            while self._thread.is_alive():  # it may be about to start its process
                if self._process is not None:
                    self._process.kill()
                self._thread.join(0.05)
        if stopped:
            self._thread = threading.Thread(target=self._draw, args=(True,), name="report", daemon=True)
            self._thread.start()
            self._thread.join(5)

    def _draw(self, stopped: bool = False) -> None:
        """Draw one page and see when the next one is due."""
        package = Path(__file__).parents[2]  # this program's own code is what runs, wherever it was found
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = os.environ | one_thread | {"PYTHONPATH": os.pathsep.join((str(package), *(p for p in sys.path if p)))}
        command = [sys.executable, "-P", "-m", "gpt.training.report", str(self._directory), *(["stopped"] if stopped else [])]
        try:
            # A process group of its own: Ctrl-C is for the trainer. Not a session, in which Linux would not see the priority.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                process_group=0,
            )
            if self._closed and not stopped:
                self._process.kill()
            out, errors = self._process.communicate()
            if self._process.returncode == 0:
                self._due = max(self._due, time.monotonic() + _MOST_SHARE * float(out.split()[-1]))
            problem = errors.strip().rpartition("\n")[2] or f"exit code {self._process.returncode}" if self._process.returncode else ""
        except (OSError, ValueError, LookupError) as error:
            problem = str(error)
        if problem and not self._complained and (stopped or not self._closed):
            self._complained = True
            self._say(f"warning: {self._directory / NAME} could not be drawn ({problem}); training goes on")


def main(arguments: list[str]) -> None:
    """Draw the page of the run directory in `arguments`, at the lowest priority, and print the seconds of a core that this took."""
    if not arguments or not Path(arguments[0]).is_dir():
        sys.exit("usage: python -m gpt.training.report <run directory>")
    stopped = arguments[1:] == ["stopped"]
    if not stopped:  # then somebody waits
        os.nice(19)
    write_live_report(Path(arguments[0]), stopped)
    print(f"{time.process_time():.2f}")


def unit_of(head: str | None) -> Unit:
    """What has one target, for a model with this head."""
    return "example" if head == "sequence" else "word" if head == "tokens" else "token"


def counted_of(head: str | None, loss_on: str | None) -> Unit:
    """What has one target in training: of a text with a class it may be each token."""
    return "token" if head == "sequence" and loss_on == "all" else unit_of(head)


def _latest_scores(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Those of the last validation."""
    found = [{name: line[f"val_{name}"] for name in SCORES if is_finite(line.get(f"val_{name}"))} for line in lines if "val_loss" in line]
    return found[-1] if found else {}


def _write(
    directory: Path,
    samples: list[Sample],
    summary: Summary,
    lines: list[dict[str, Any]],
    status: str,
    live: bool = False,
    charts: Sequence[Chart] = (),
) -> Path:
    write_page(
        directory / NAME,
        Path(__file__).with_name("report.html.jinja"),
        summary=summary,
        status=status,
        state="running" if live else "finished" if summary.finished else "interrupted",
        reload_seconds=RELOAD_SECONDS if live else None,
        drawn=f"{datetime.datetime.now():%H:%M:%S, %d %B %Y}" if live else "",
        skipped=f"{count(summary.skipped_steps, 'step')} skipped" if summary.skipped_steps else "",
        cards=_cards(summary),
        charts=[*charts, *_charts(lines, summary)],
        trains=freezing_section(directory),
        samples=samples,
        config=_read_text(directory / "config.yaml").rstrip(),
        environment=_read_environment(directory / "environment.json"),
    )
    return directory / NAME


def _model(run: RunRow) -> str:
    """The model in words, as far as config and weights tell."""
    from gpt.errors import UserError
    from gpt.model.config import GPTConfig
    from gpt.typed import from_dict

    parameters = count_parameters(run.path)
    words = [f"{parameters / 1e6:.2f}M parameters"] if parameters else []
    try:
        words.append(f"{from_dict(GPTConfig, run.config.get('model'), 'model.').stock_architecture()} shape")
    except UserError:  # a config of another version
        return ", ".join(words)
    return ", ".join(words)


def _progress(run: RunRow, lines: list[dict[str, Any]]) -> str:
    """`Running, step 1,200 of 4,700, 25%, 3 min left`."""
    if not run.step:
        return "Running, no step logged yet"
    share = run.seconds / run.total_seconds if run.total_seconds else run.step / run.total if run.total else None
    if share is None:
        return f"Running, step {run.step:,}"
    of = f" of {run.total:,}" if run.total else ""
    if share >= 1:
        return f"Running, step {run.step:,}{of}, all trained; measuring and saving the result"
    if run.total_seconds:
        left = run.total_seconds - run.seconds
    else:  # as fast as in the second half so far, validations and all
        timed = [(line["step"], line["seconds"]) for line in lines if is_finite(line.get("seconds"))] or [(0, 0.0)]
        step, seconds = timed[len(timed) // 2]
        step, seconds = (step, seconds) if step < run.step else (0, 0.0)
        left = ((run.total or 0) - run.step) * (run.seconds - seconds) / (run.step - step)
    rest = f"{left:.0f} s" if left < 99.5 else f"{left / 60:.0f} min" if left < 5970 else f"{left / 3600:.1f} h"
    return f"Running, step {run.step:,}{of}, {int(100 * share)}%, {rest} left"


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _by_step(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines by step; of a step that was trained again after a resume, the last line counts."""
    lines = {(line["step"], "val_loss" in line): line for line in metrics if is_finite(line.get("step"))}
    return [lines[key] for key in sorted(lines)]


def _read_environment(path: Path) -> list[tuple[str, str]]:
    """Rows of name and value; nested names are joined by a dot."""

    def rows(value: object, name: str) -> list[tuple[str, str]]:
        if isinstance(value, dict):
            return [row for key, inner in value.items() for row in rows(inner, f"{name}.{key}" if name else str(key))]
        return [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]

    try:
        return rows(json.loads(_read_text(path)), "")
    except ValueError:
        return []


def _cards(summary: Summary) -> list[tuple[str, str, str]]:
    """(name, value, note) of the key figures; a dash stands for what is not known."""

    def figure(value: float | None, form: str) -> str:
        return format(value, form) if is_finite(value) else "–"

    bits_note, best_note = f"of {summary.held_out}" if is_finite(summary.val_bpb) else "not measured", "not measured"
    if is_finite(summary.val_bpb) and summary.xz_bpb:
        bits_note = f"{abs(1 - summary.val_bpb / summary.xz_bpb):.0%} {'below' if summary.val_bpb < summary.xz_bpb else 'above'} xz -9e"
    if summary.best_step is not None:
        best_note = f"at step {summary.best_step:,}"
    milliseconds = 1000 * summary.seconds / max(1, summary.steps)
    first = [("Bits per byte", figure(summary.val_bpb, ".3f"), bits_note)]
    if summary.reward_accuracy is not None:
        first = [("Reward accuracy", figure(summary.reward_accuracy, ".1%"), f"of {summary.held_out}")]
    elif summary.unit != "token":
        first = [(SCORES[name], figure(value, ".3f"), f"of held-out {summary.unit}s") for name, value in summary.scores.items()]
    result = [
        *first,
        ("Best validation loss", figure(summary.best_val_loss, ".3f"), best_note),
        (f"{summary.counted.capitalize()}s", short(summary.tokens), count(summary.steps, "step")),
        ("Training time", duration(summary.seconds), f"{milliseconds:,.{0 if milliseconds >= 10 else 2}f} ms a step"),
        ("Tokens per second", figure(summary.tokens_per_second, ",.0f"), "over the run"),
    ]
    if found := re.search(r"(\d[\d,]*\.?\d*) ?([KMBT]?) parameters", summary.model, re.IGNORECASE):
        size = float(found[1].replace(",", "")) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[found[2].upper()]
        result.append(
            ("Parameters", found[1] + found[2], f"{summary.tokens / size:,.1f} tokens each" if size and summary.unit == "token" else "")
        )
    return result


def _charts(lines: list[dict[str, Any]], summary: Summary) -> list[Chart]:
    """Every chart that there is something to draw for."""
    longest = max((line["seconds"] for line in lines if is_finite(line.get("seconds"))), default=0)
    unit, unit_seconds = time_unit(longest)
    scales = {"step": 1, "seconds": unit_seconds, "memory_bytes": 2**30}
    result: list[Chart] = []

    def points(x: str, y: str) -> list[Point]:
        kept = (line for line in lines if is_finite(line.get(x)) and is_finite(line.get(y)))
        return [(line[x] / scales[x], line[y] / scales.get(y, 1)) for line in kept]

    def add(
        title: str,
        curves: list[Curve],
        x: str,
        y: str,
        log: bool = False,
        legend: bool = False,
        note: str = "",
        marks: Sequence[float] = (),
    ) -> None:
        if curves:
            result.append(Chart(title, svg(title, lambda axes: draw_curves(axes, curves, x, y, log, legend, marks=marks)), note))

    def add_loss(title: str, key: str, x: str, marks: Sequence[float] = ()) -> None:
        training, checks = points(key, "loss"), points(key, "val_loss")
        y, learned, held_out = f"loss, nats per {summary.counted}", "training", "validation"
        if points(key, "val_reward_margin"):
            y = "loss per pair"
        elif checks and summary.counted != summary.unit:
            y, learned, held_out = "loss, nats", f"training, per {summary.counted}", f"validation, per {summary.unit}"
        validation = [Curve(checks, held_out, SECOND, width=1.4, dots=40)] if checks else []
        notes = [f"Dashed: after step {', '.join(f'{step:,}' for step in marks)} more parameters train."] if marks else []
        if points(key, "lm_loss"):
            notes.append("Training: with lm_weight times that of the next tokens; validation: the classes alone.")
        add(title, noisy(training, learned) + validation, x, y, True, bool(checks), " ".join(notes), marks)

    scores = [(title, points("step", f"val_{name}")) for name, title in SCORES.items()]
    curves = [Curve(found, title, colour, dots=40) for (title, found), colour in zip(scores, SERIES, strict=False) if found]
    add("Held-out accuracy and F1", curves, "step", "share", legend=True)
    add_loss("Loss by step", "step", "step", stage_steps(lines))
    for title, key in (("Reward accuracy", "val_reward_accuracy"), ("Reward margin", "val_reward_margin")):
        found = points("step", key)
        add(f"{title} on held-out pairs", [Curve(found, "", SECOND, dots=40)] if found else [], "step", title.lower())
    named = {"this model": summary.val_bpb, "xz -9e": summary.xz_bpb, "gzip -9": summary.gzip_bpb}
    known = {name: size for name, size in named.items() if is_finite(size)}
    if "this model" in known and len(known) > 1:
        title = "Held-out text, compressed"
        result.append(Chart(title, svg(title, lambda axes: draw_bars(axes, known, "bits per byte, lower is better"), left=0.19)))
    add_loss("Loss by time", "seconds", f"training time, {unit}")
    answers = {name: points("step", f"val_{name}") for name in ANSWER_FIGURES}
    known_answers = [name for name, found in answers.items() if found]
    add(
        "Answers to held-out prompts",
        [Curve(answers[name], name.replace("_", " "), colour, dots=40) for name, colour in zip(known_answers, SERIES, strict=False)],
        "step",
        "0 to 100, higher is better",
        legend=True,
    )
    rates = points("step", "lr")
    add("Learning rate", [Curve(rates, "")] if rates else [], "step", "learning rate")
    add("Throughput", noisy(points("step", "tokens_per_second"), ""), "step", "tokens per second", note=_mfu(lines))
    if split := _step_times(lines):
        result.append(split)
    gradients, updates = points("step", "grad_norm"), points("step", "update_norm")
    norms = noisy(gradients, "gradient", ACCENT) + noisy(updates, "update", SECOND)
    both = bool(gradients and updates)
    title = "Gradient and update norm" if both else "Gradient norm" if gradients else "Update norm"
    add(title, norms, "step", "norm" if both else title.lower(), log=True, legend=both)
    memory = points("step", "memory_bytes")
    add(
        "Memory",
        [Curve(memory, "")] if memory else [],
        "step",
        "GiB",
        note=f"Highest: {max(y for _, y in memory):.2f} GiB" if memory else "",
    )
    return result


def _mfu(lines: list[dict[str, Any]]) -> str:
    """What of the chip's peak rate the model's arithmetic uses; of a CPU's the rate of a large product, measured at the start."""
    shares = [line["mfu"] for line in lines if is_finite(line.get("mfu"))]
    return f"MFU {statistics.median(shares):.1%}, median" if shares else ""


def _step_times(lines: list[dict[str, Any]]) -> Chart | None:
    """Where a step's time goes, with the shares of the parts, and beside them that of evaluation and checkpoints."""
    timed = [line for line in lines if any(is_finite(line.get(f"time_{part}")) for part in PARTS)]
    if not timed:
        return None
    columns = {part: [line.get(f"time_{part}") for line in timed] for part in PARTS}
    heights = {part: [1000 * max(0.0, value) if is_finite(value) else 0.0 for value in column] for part, column in columns.items()}
    totals = {part: sum(values) for part, values in heights.items()}
    whole = sum(totals.values())
    shares = ", ".join(f"{part} {total / whole:.1%}" for part, total in totals.items()) if whole else ""
    besides = []
    for part in ("evaluation", "checkpointing"):
        known = [line[f"share_{part}"] for line in lines if is_finite(line.get(f"share_{part}"))]
        besides += [f"{part} {known[-1]:.1%}"] if known else []
    note = f"Of the steps: {shares}." + (f" Of the whole run: {', '.join(besides)}." if besides else "")
    title, steps = "Where a step's time goes", [line["step"] for line in timed]
    return Chart(title, svg(title, lambda axes: draw_areas(axes, steps, heights, "step", "milliseconds a step"), top=0.89), note)


if __name__ == "__main__":
    main(sys.argv[1:])
