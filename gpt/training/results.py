"""What a finished run leaves: the weights as a Hugging Face directory, samples and a report."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gpt.config import RunConfig
from gpt.evaluation.classification import in_words
from gpt.evaluation.perplexity import HeldOutLoss, compressed_bits_per_byte
from gpt.evaluation.text import COMPRESSED_BYTES
from gpt.inference.generate import generate_text, whole_texts
from gpt.inference.sampling import Sampling
from gpt.model.lora import adapted, merged
from gpt.model.transformer import GPT
from gpt.runtime.memory import binary_size
from gpt.training.adapters import write_adapter
from gpt.training.checkpoint import MANIFEST, TrainingState
from gpt.training.classes import class_lines, class_samples, confusion_chart, say_samples
from gpt.training.data import TrainingData
from gpt.training.export import describe_corpus, model_card
from gpt.training.metrics import read_metrics
from gpt.training.report import ANSWER_FIGURES, Sample, Summary, counted_of, unit_of, write_report
from gpt.training.run_directory import RunDirectory

_SAMPLES = 3  # held-out prompts to continue where the config names none


def write_results(
    config: RunConfig,
    directory: RunDirectory,
    state: TrainingState,
    model: GPT,
    data: TrainingData,
    held_out: HeldOutLoss,
    spent: Mapping[str, float],
    capacity: int | None,
    say: Callable[[str], None],
) -> None:
    """Export the weights, continue some prompts, write the report, and say how it went.

    Args:
        config, directory, state, data: of the run.
        model: with the best weights, whole; adapters as they trained.
        held_out: how they do.
        spent: seconds of each part of the training, in this process.
        capacity: bytes of memory of its device, or None.
        say: takes the lines for people.
    """
    trained, model = model, merged(model)
    metrics = read_metrics(directory.metrics)
    scores, unit, counted = held_out.scores, unit_of(data.head), counted_of(data.head, config.loss_on)
    compressed = {} if data.on_examples else _compressed(config, data)
    rates = [line["tokens_per_second"] for line in metrics if "tokens_per_second" in line]
    last = next((line["val_loss"] for line in reversed(metrics) if "val_loss" in line), None)
    what = "held-out pairs" if data.pairs else "held-out examples" if data.on_examples else "held-out text"
    summary = Summary(
        title=config.run.id,
        model=f"{model.num_parameters() / 1e6:.2f}M parameters, {config.model.stock_architecture()} shape",
        steps=state.step, tokens=state.tokens, seconds=state.seconds,
        tokens_per_second=statistics.median(rates) if rates else 0.0,
        best_val_loss=state.best_val_loss, best_step=state.best_step,
        val_bpb=None if scores or held_out.pairs else held_out.bits_per_byte,
        gzip_bpb=compressed.get("gzip -9"), xz_bpb=compressed.get("xz -9e"),
        skipped_steps=state.skipped_steps, finished=True, held_out=what, unit=unit, counted=counted,
        scores=scores.figures() if scores else {}, reward_accuracy=held_out.more.get("reward_accuracy"),
    )  # fmt: skip
    corpus = describe_corpus(data.manifest)
    _export(config, directory, model, data, model_card(config, summary, corpus))
    adapter = _export_adapter(config, directory, trained, data, model_card(config, summary, corpus, adapter=True), say)
    samples = _samples(config, model, data) if scores is None else class_samples(model.eval(), data)
    report = write_report(directory.path, samples, summary, [confusion_chart(scores)] if scores else [])
    if scores is not None:
        say_samples(samples, say)
    for sample in samples if scores is None else ():
        if data.on_examples:
            say(f"\n--- prompt:\n{sample.prompt[-500:].rstrip()}\n--- answer:\n{sample.text}")
        else:
            say(f"\n--- {sample.prompt[-500:]!r} continues:\n{sample.prompt[-500:]}{sample.text}")
        if sample.expected:
            say(f"--- expected: {sample.expected}")
    measured = f" ({held_out.bytes:,} bytes): {held_out.bits_per_byte:.3f} bits per byte"
    if scores is not None:
        measured = f" ({scores.count:,} {unit}s): {in_words(scores)}"
    elif held_out.pairs:
        ahead, margin = held_out.more["reward_accuracy"], held_out.more["reward_margin"]
        measured = f" ({held_out.pairs:,}): the chosen one gained more in {ahead:.1%} (reward accuracy), reward margin {margin:.3f}"
    beside = "".join(f"{name}: {figure:.2f}, " for name, figure in compressed.items())
    say(
        f"\n{state.step} steps, {_amount(state.tokens, counted, data.on_examples)} in {state.seconds:.0f} s "
        f"({summary.tokens_per_second:,.0f} tokens/s{' read' if data.on_examples else ''})"
        f"\ntime: {_shares(spent)}"
        f"{_memory(metrics, capacity)}"
        f"{_answers(metrics, state.best_step)}"
        f"\nvalidation: best {_figure(state.best_val_loss)} at step {state.best_step}, last {_figure(last)}"
        f"{f'; {state.skipped_steps} steps left out' if state.skipped_steps else ''}"
        f"\n{what}{measured} ({beside}loss {held_out.loss:.3f} per {'pair' if held_out.pairs else unit})"
        f"{class_lines(scores) if scores else ''}"
        f"\nmodel:  {directory.model}{adapter}\nreport: {report}"
        f"\n{f'write:  gpt generate model={directory.path} {_use(data)}' if scores is None else _try_classifier(directory, data)}"
    )


def _amount(targets: int, unit: str, on_examples: bool) -> str:
    """How much was learned from; of an example that is often a small part, while tokens/s counts all that was read."""
    amount = f"{targets / 1e6:.2f}M" if unit == "token" and targets >= 100_000 else f"{targets:,}"
    return f"{amount} {unit}s{' learned' if on_examples and unit == 'token' else ''}"


def _try_classifier(directory: RunDirectory, data: TrainingData) -> str:
    """How to measure a classifier on other rows."""
    rows = '{"text": ..., "label": ...}' if data.head == "sequence" else '{"tokens": [...], "tags": [...]}'
    return f"measure: gpt evaluate model={directory.path} data=jsonl data.paths=[<rows of {rows}>]"


def _figure(loss: float | None) -> str:
    return "unknown" if loss is None else f"{loss:.3f}"


def _shares(spent: Mapping[str, float]) -> str:
    """What each part of the training took of it, the largest first; what took nothing is left out."""
    total = sum(spent.values())
    parts = sorted(spent.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts if seconds / total >= 0.005)


def _memory(metrics: Sequence[Mapping[str, Any]], capacity: int | None) -> str:
    """The most memory that the main process had of its device, as a line."""
    taken = [line["memory_bytes"] for line in metrics if line.get("memory_bytes")]
    if not taken:
        return ""
    return f"\nmemory: {binary_size(max(taken))} at most{f' of {binary_size(capacity)}' if capacity else ''}"


def _answers(metrics: Sequence[Mapping[str, Any]], step: int | None) -> str:
    """How the best weights answered held-out prompts, as a line."""
    line: Mapping[str, Any] = next((line for line in reversed(metrics) if line["step"] == step and "val_loss" in line), {})
    known = [f"{name.replace('_', ' ')} {line[f'val_{name}']:.1f}" for name in ANSWER_FIGURES if f"val_{name}" in line]
    return f"\nanswers: {', '.join(known)} of 100" if known else ""


def _use(data: TrainingData) -> str:
    """How the command that tries the model goes on."""
    return "interactive=true" if data.tokenizer.chat_template else 'prompt="..."' if data.on_examples else 'prompt="import "'


def _compressed(config: RunConfig, data: TrainingData) -> dict[str, float]:
    """What general compressors reach on the held-out text."""
    text = data.held_out_text(config.train.final_eval_tokens, COMPRESSED_BYTES)
    return compressed_bits_per_byte(text.encode()[:COMPRESSED_BYTES])


def _export(config: RunConfig, directory: RunDirectory, model: GPT, data: TrainingData, card: str) -> None:
    """Write `model/` aside and put it in its place."""
    aside = directory.path / ".model.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, tokenizer=data.tokenizer, card=card)
    (aside / MANIFEST).write_text(json.dumps(data.manifest, indent=1, ensure_ascii=False), encoding="utf-8")
    shutil.rmtree(directory.model, ignore_errors=True)
    aside.rename(directory.model)


def _export_adapter(
    config: RunConfig, directory: RunDirectory, model: GPT, data: TrainingData, card: str, say: Callable[[str], None]
) -> str:
    """Write `adapter/`, where the run has trained any; where it is, as a line."""
    if not adapted(model):
        return ""
    folder = directory.path / "adapter"
    try:
        write_adapter(config, folder, model, data.tokenizer, card)
    except ValueError as error:
        say(f"note: no {folder} is written: {error}")
        return ""
    return f"\nadapter: {folder} (PEFT's format)"


def _samples(config: RunConfig, model: GPT, data: TrainingData) -> list[Sample]:
    """The config's prompts continued, or those of held-out texts."""
    train = config.train
    model.eval()
    sampling = Sampling(temperature=0.9, top_k=50, top_p=0.95, seed=config.seed)
    expected = [""] * len(train.sample_prompts)
    prompts: Sequence[str | list[int]] = train.sample_prompts
    if not prompts:
        found = data.prompts(_SAMPLES)
        prompts, expected = [prompt.ids for prompt in found], [prompt.expected for prompt in found]
        if data.on_examples:  # there is a right answer: what the model finds likeliest is compared with it
            sampling = Sampling(temperature=0)
    if not prompts:
        return []
    with torch.compiler.set_stance("force_eager"):
        pieces = generate_text(model, data.tokenizer, prompts, train.sample_tokens, sampling, overflow="slide")
        texts = whole_texts(pieces, len(prompts))
    shown = [prompt if isinstance(prompt, str) else data.tokenizer.decode(prompt) for prompt in prompts]
    return [Sample(*sample) for sample in zip(shown, texts, expected, strict=True)]
