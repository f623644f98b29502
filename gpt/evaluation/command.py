"""`gpt evaluate`: how well a model predicts a text, or how it does at tasks."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpt import __version__
from gpt.commands import EvaluateConfig
from gpt.data.config import TEXT_SOURCES
from gpt.data.sources import ReadReport
from gpt.errors import UserError
from gpt.evaluation.answers import Writing, check_tests, measure_answers, write_answers
from gpt.evaluation.classification import FIGURES, as_json, matrix_lines, table_lines
from gpt.evaluation.examples import EncodedExamples, read_examples
from gpt.evaluation.execution import check_execution
from gpt.evaluation.harness import find_tasks, run_tasks
from gpt.evaluation.perplexity import HeldOutLoss, compressed_bits_per_byte, score_classes, score_examples, strided_loss
from gpt.evaluation.progress import note, progress_bar
from gpt.evaluation.questions import Questions, read_questions
from gpt.evaluation.scores import check_libraries
from gpt.evaluation.text import COMPRESSED_BYTES, encode_texts, read_texts
from gpt.inference.loading import Loaded, load_model, read_shape
from gpt.model.transformer import GPT
from gpt.runtime.device import Device, find_decoding_device, find_device
from gpt.typed import shown

Score = Callable[[Callable[[int], None]], HeldOutLoss]

_ANSWERS = 4  # for each window of a batch: a step of theirs computes one token of each
_LONG = 8192  # a window that takes more memory than many a machine has


def evaluate(config: EvaluateConfig) -> int:
    """Run `gpt evaluate`: the figures on stdout, and in the file `output`. Returns the exit code.

    Raises:
        UserError: no model, no text, no such task, or settings that do not go with them.
    """
    output = None if config.output is None else Path(config.output).expanduser()
    if output is not None and (output.is_dir() or not os.access(output.parent, os.W_OK)):
        raise UserError(f"output={config.output}: {'is a folder' if output.is_dir() else f'cannot write to the folder {output.parent}'}")
    tasks = find_tasks(config.tasks, config.tasks_dir) if config.tasks else None
    classifies = config.model != "" and read_shape(config.model, config.allow_pickle, "model")[0].head != "language_model"
    if classifies:
        _refuse_text(config)
    texts = [] if config.tasks or config.on_examples or classifies else _read(config)
    device = (find_decoding_device if config.tasks else find_device)(config.device_config, config.precision)
    loaded = load_model(config.model, device.type, device.dtype, config.allow_pickle)
    limit = loaded.model.config.context_length
    length = config.context_length or limit
    if length > limit:
        raise UserError(f"context_length={length}: the model reads at most {limit} tokens")
    report: dict[str, Any] = {"model": _describe(config, loaded, device), "context_length": length}
    if tasks is not None:
        _quantize(config, loaded.model)
        report |= run_tasks(tasks, loaded, length, config)
    elif classifies:
        report |= _on_classes(config, loaded, device, length)
    elif config.on_examples:
        report |= _on_examples(config, loaded, device, length)
    else:
        report |= _on_text(config, loaded, device, length, texts)
    if output is not None:
        text = json.dumps(report | {"versions": _versions(bool(tasks))}, indent=2, default=str)
        try:
            output.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"output={config.output}: cannot be written: {error.strerror}") from error
        _row("written to", str(output))
    return 0


def _read(config: EvaluateConfig) -> list[str]:
    report = ReadReport()
    texts = read_texts(config, report)
    report.split_within_files &= config.part == "held_out"
    for line in report.warnings():
        note(line)
    return texts


def _describe(config: EvaluateConfig, loaded: Loaded, device: Device) -> dict[str, Any]:
    """Print which model it is, and return that for the file."""
    shape, parameters, dtype = loaded.model.config.stock_architecture(), loaded.model.num_parameters(), str(device.dtype)[6:]
    _row("model", f"{config.model}: {parameters / 1e6:,.2f}M parameters, {shape} shape, {dtype}, {device.description}")
    return {
        "path": config.model, "shape": shape, "parameters": parameters, "context_length": loaded.model.config.context_length,
        "dtype": dtype, "device": device.description, "quantize": config.quantize,
    }  # fmt: skip


def _versions(with_tasks: bool) -> dict[str, str]:
    from importlib.metadata import version

    found = {"gpt": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return found | ({"lm_eval": version("lm_eval")} if with_tasks else {})


def _quantize(config: EvaluateConfig, model: GPT) -> None:
    if config.quantize == "int8":
        from gpt.inference.quantize import quantize_int8

        _row("quantize", config.quantize)
        quantize_int8(model)


def _on_text(config: EvaluateConfig, loaded: Loaded, device: Device, length: int, texts: list[str]) -> dict[str, Any]:
    """Score a text and print the figures; they are returned for the file."""
    stride = config.stride or max(1, length // 2)
    if stride > length:
        raise UserError(f"stride={stride} must be at most the {length} tokens of a window, or some would never be scored")
    encoded = encode_texts(texts, loaded.tokenizer, loaded.model.config.vocab_size, config.max_tokens)
    tokens = len(encoded.tokens) - 1
    if min(length, tokens) > _LONG and not config.context_length:
        note(f"windows of {length:,} tokens, all that the model can read; context_length=2048 takes less memory and time")
    held_out = config.part == "held_out"
    data = {"source": config.data.source, "paths": config.data.paths, "part": "held_out" if held_out else "all"}
    report = {"data": data, "documents": encoded.documents, "tokens": tokens, "bytes": encoded.bytes, "stride": stride}
    _row("text", f"{_source(config)}: {encoded.bytes:,} bytes, {tokens:,} tokens to score, documents: {encoded.documents:,}")
    _row("windows", f"{length:,} tokens, a new one every {stride:,}")
    as_it_is = replace(device, dtype=torch.float32)  # the weights are in the precision asked for: nothing to cast
    lengths = loaded.tokenizer.byte_lengths()

    def score(scored: Callable[[int], None]) -> HeldOutLoss:
        return strided_loss(loaded.model, encoded.tokens, length, stride, config.batch, lengths, as_it_is, scored)

    measured = _measure(config, score, tokens, encoded.bytes)
    compressed = compressed_bits_per_byte(encoded.text)
    of = "" if len(encoded.text) == encoded.bytes else f" of its first {COMPRESSED_BYTES >> 20} MiB"
    _row("the same text", f"{', '.join(f'{name}: {bits:.4f}' for name, bits in compressed.items())} bits per byte{of}")
    return report | measured | {"compressed_bits_per_byte": compressed} | _quantized(config, loaded, measured, score, tokens, encoded.bytes)


def _refuse_text(config: EvaluateConfig) -> None:
    """Raises UserError for what only a language model can be measured on."""
    if config.metrics:
        raise UserError(f"metrics={shown(config.metrics)}: model={config.model} is a classifier, which writes no answers; leave it out")
    classifier = f"model={config.model} is a classifier, which continues no text; give it rows with classes, e.g. data=jsonl"
    if config.tasks or config.examples is False:
        asked = f"tasks={shown(config.tasks)}" if config.tasks else "examples=false"
        raise UserError(f"{asked}: {classifier} data.paths=[rows.jsonl]")
    if config.data.source in TEXT_SOURCES:
        raise UserError(f"data={config.data.source} is text: {classifier} data.paths=[rows.jsonl]")


def _on_classes(config: EvaluateConfig, loaded: Loaded, device: Device, length: int) -> dict[str, Any]:
    """Score a classifier on examples and print the figures; they are returned for the file."""
    examples, report = _read_examples(config, loaded, length)

    def score(scored: Callable[[int], None]) -> HeldOutLoss:
        as_it_is, batches = replace(device, dtype=torch.float32), examples.batches(config.batch)
        return score_classes(loaded.model, batches, as_it_is, scored)

    measured = _measure_classes(config, score, examples.tokens)
    if config.quantize != "none":
        print()
        _quantize(config, loaded.model)
        measured[config.quantize] = _measure_classes(config, score, examples.tokens)
    return report | measured


def _measure_classes(config: EvaluateConfig, score: Score, count: int) -> dict[str, Any]:
    started = time.perf_counter()
    with progress_bar("scoring", count) as advance:
        result = score(advance)
    seconds, scores = time.perf_counter() - started, result.scores
    assert scores is not None
    _refuse_damaged(config, result)
    _row("loss", f"{result.loss:.4f} nats per {scores.what}")
    for name, value in scores.figures().items():
        _row(FIGURES[name], f"{value:.4f}")
    _row("time", f"{seconds:.1f} s, {scores.count / seconds:,.0f} {scores.what}s/s")
    print("", *matrix_lines(scores), "", *table_lines(scores), sep="\n")
    return {"loss": result.loss, **as_json(scores), "seconds": seconds}


def _read_examples(config: EvaluateConfig, loaded: Loaded, length: int) -> tuple[EncodedExamples, dict[str, Any]]:
    """The examples, and what there is to say of them, which is printed, for the file."""
    length = min(length, _LONG) if not config.context_length else length
    examples, read = read_examples(config, loaded.tokenizer, length, loaded.model.config)
    for line in read.warnings():
        note(line)
    held_out = config.part == "held_out"
    report = {
        "data": {"source": config.data.source, "paths": config.data.paths, "part": "held_out" if held_out else "all"},
        "format": examples.format, "examples": examples.examples, "tokens": examples.tokens, "bytes": examples.bytes,
        "counts": dict(examples.counts),
    }  # fmt: skip
    if loaded.model.config.head != "language_model":
        del report["bytes"]  # a class is no text
    what = {"language_model": "tokens", "sequence": "texts", "tokens": "words"}[loaded.model.config.head]
    _row("examples", f"{_source(config)}: {examples.examples:,} of {examples.format}, {examples.tokens:,} {what} to score")
    if examples.counts:
        _row("", ", ".join(f"{name.replace('_', ' ')}: {count:,}" for name, count in sorted(examples.counts.items())))
    return examples, report


def _on_examples(config: EvaluateConfig, loaded: Loaded, device: Device, length: int) -> dict[str, Any]:
    """Score what is to be learned of examples and print the figures; they are returned for the file."""
    questions = _read_questions(config, loaded) if config.metrics else None
    examples, report = _read_examples(config, loaded, length)
    as_it_is, lengths = replace(device, dtype=torch.float32), loaded.tokenizer.byte_lengths()

    def score(scored: Callable[[int], None]) -> HeldOutLoss:
        return score_examples(loaded.model, examples.batches(config.batch), lengths, as_it_is, scored)

    measured = _measure(config, score, examples.tokens, examples.bytes)
    length = min(length, _LONG) if not config.context_length else length
    answered = _on_answers(config, loaded, length, questions) if questions else {}
    quantized = _quantized(config, loaded, measured, score, examples.tokens, examples.bytes)
    if quantized and questions:
        quantized[config.quantize] |= _on_answers(config, loaded, length, questions)
    return report | measured | answered | quantized


def _read_questions(config: EvaluateConfig, loaded: Loaded) -> Questions:
    """The prompts to answer, with all that could be wrong about the metrics seen before anything is computed."""
    if "pass" in config.metrics:
        check_execution()
    check_libraries(config.metrics)
    questions = read_questions(config.data, loaded.tokenizer, config.part == "held_out", config.limit)
    if "pass" in config.metrics:
        check_tests(questions.questions)
    return questions


def _on_answers(config: EvaluateConfig, loaded: Loaded, length: int, asked: Questions) -> dict[str, Any]:
    """Have the model answer, compare, and print the figures; they are returned for the file."""
    questions = asked.questions
    writing = Writing(length, config.answer_tokens, _ANSWERS * config.batch, config.temperature, config.seed, tuple(config.stop))
    started = time.perf_counter()
    with progress_bar("writing answers", len(questions)) as advance:
        answers = write_answers(loaded.model, loaded.tokenizer, questions, loaded.end_ids | asked.end_ids, writing, advance)
    assert answers is not None
    seconds = time.perf_counter() - started
    with progress_bar("running answers", len(questions)) as advance:
        measured = measure_answers(config.metrics, questions, answers, config.execution_seconds, advance)
    how = "the likeliest tokens" if not config.temperature else f"temperature {config.temperature:g}, seed {config.seed}"
    _row("answers", f"{len(questions):,} of at most {answers.max_tokens} tokens, {how}; {seconds:.1f} s")
    if asked.left_out:
        _row("", ", ".join(f"{name.replace('_', ' ')}: {count:,}" for name, count in sorted(asked.left_out.items())))
    for name, value in measured.scores.figures.items():
        error = measured.scores.errors.get(name)
        _row(name.replace("_", " "), f"{value:.2f}" + (f" ± {error:.2f}" if error is not None else "") + " of 100")
    if answers.cut:
        note(f"{answers.cut} prompts were cut at their beginning: a prompt and its answer have {length} tokens")
    for text in measured.scores.notes:
        note(text)
    report = measured.report()
    report["answers"] |= {"left_out": dict(asked.left_out), "temperature": config.temperature, "seed": config.seed, "seconds": seconds}
    return report


def _quantized(
    config: EvaluateConfig, loaded: Loaded, measured: dict[str, float], score: Score, tokens: int, n_bytes: int
) -> dict[str, Any]:
    """Score once more with the weights quantised, if that is asked for, and print the difference."""
    if config.quantize == "none":
        return {}
    print()
    _quantize(config, loaded.model)
    quantized = _measure(config, score, tokens, n_bytes)
    before, after = measured["loss"], quantized["loss"]
    _row("difference", f"loss {before:.4f} -> {after:.4f}, {after - before:+.4f} ({100 * (after - before) / before:+.2f} %)")
    return {config.quantize: quantized | {"loss_difference": after - before}}


def _source(config: EvaluateConfig) -> str:
    """What is read, in words."""
    paths = config.data.paths
    what = paths[0] if paths else config.data.name or f"data={config.data.source}"
    return what + f" and {len(paths) - 1} more" * (len(paths) > 1) + ", held out" * (config.part == "held_out")


def _measure(config: EvaluateConfig, score: Score, tokens: int, n_bytes: int) -> dict[str, float]:
    """Score and print the figures."""
    started = time.perf_counter()
    with progress_bar("scoring", tokens) as advance:
        result = score(advance)
    result, seconds = replace(result, bytes=n_bytes), time.perf_counter() - started
    _refuse_damaged(config, result)
    _row("loss", f"{result.loss:.4f} nats per token")
    _row("perplexity", f"{result.perplexity:.3f} per token")
    _row("bits per byte", f"{result.bits_per_byte:.4f}")
    _row("time", f"{seconds:.1f} s, {result.tokens / seconds:,.0f} tokens/s")
    return {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "seconds": seconds,
        "tokens_per_second": result.tokens / seconds,
    }


def _refuse_damaged(config: EvaluateConfig, result: HeldOutLoss) -> None:
    if not math.isfinite(result.loss):
        raise UserError(
            f"model={config.model}: its loss is {result.loss}; its weights are damaged, or too large for precision={config.precision}"
        )


def _row(name: str, text: str) -> None:
    print(f"{name:<15}{text}", flush=True)
