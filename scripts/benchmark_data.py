"""Measurements of turning text into ids, by processor time on one thread, and of making batches: part of `make bench`."""

from __future__ import annotations

import os
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gpt.data.config import DataConfig, PartConfig, TokenizerConfig
from gpt.data.examples import ExampleSettings
from gpt.data.loader import build_batches
from gpt.data.prepare import prepare_corpus
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_training import make_tokenizer

RUNS = 3
TOKENIZERS = {
    "BPE, split gpt4": TokenizerConfig(),
    "BPE, split gpt2": TokenizerConfig(split="gpt2"),
    "BPE, split digits": TokenizerConfig(split="digits"),
    "BPE, split gpt4, 16,384 ids": TokenizerConfig(vocab_size=16384),
    "characters": TokenizerConfig(name="char"),
    "bytes": TokenizerConfig(name="byte"),
}


def encoding() -> None:
    """Our bulk encoding beside `tokenizers`, in turn; the ids must be the same."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(encoding="utf-8") for path in sorted(root.glob("*.py"))]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"\n### encoding {megabytes:.1f} MB of Python in {len(texts)} files, MB/s a core\n")
    print("| | bytes per token | ours | `encode_batch_fast` | `encode_batch` |\n| --- | ---: | ---: | ---: | ---: |")
    for name, config in TOKENIZERS.items():
        tokenizer = Tokenizer(make_tokenizer(config, texts).backend, check="".join(texts)[:200_000])
        if not tokenizer.is_fast:
            raise SystemExit(f"{name}: the bulk encoder was not taken")
        ids = tokenizer.encode_batch(texts)
        expected = tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
        if not all(np.array_equal(a, b.ids) for a, b in zip(ids, expected, strict=True)):
            raise SystemExit(f"{name}: the ids are not those of tokenizers")
        rates = [megabytes / seconds for seconds in _in_turn(_encoders(tokenizer, texts))]
        per_token = megabytes * 1e6 / sum(map(len, ids))
        print(f"| {name} | {per_token:.2f} | " + " | ".join(f"{rate:,.1f}" for rate in rates) + " |", flush=True)


def batches() -> None:
    """Time to make a batch of 16 rows of 256 tokens, of the standard library and of the docstrings in it."""
    length, sequences = 256, 16
    text, rows = DataConfig(), DataConfig(source="stdlib_docstrings")
    mixed = DataConfig(source="mixture", parts=[PartConfig(weight=3), PartConfig(source="stdlib_topics")])
    corpora = {
        "text": (text, None), "text, with documents": (DataConfig(document_mask=True), None),
        "packed examples": (rows, ExampleSettings(context_length=length)), "a mixture of two texts": (mixed, None),
    }  # fmt: skip
    print(f"\n### making a batch of {sequences} x {length} tokens\n\n| batch of | microseconds |\n| --- | ---: |")
    for name, (data, examples) in corpora.items():
        corpus = prepare_corpus(data, TokenizerConfig(), length, lambda text: None, examples)
        made = build_batches(corpus, data, length, sequences, seed=1)
        took = []
        for step in range(300):
            started = time.perf_counter()
            made.batch(step)
            took.append(time.perf_counter() - started)
        print(f"| {name} | {statistics.median(took[50:]) * 1e6:,.0f} |")


def _encoders(tokenizer: Tokenizer, texts: list[str]) -> list[Callable[[], object]]:
    return [
        lambda: tokenizer.encode_batch(texts),
        lambda: tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False),
        lambda: tokenizer.backend.encode_batch(texts, add_special_tokens=False),
    ]


def _in_turn(candidates: list[Callable[[], object]]) -> list[float]:
    """Median seconds of the processor for each, after a warm-up run of each."""
    times: list[list[float]] = [[] for _ in candidates]
    for number in range(RUNS + 1):
        for run, taken in zip(candidates, times, strict=True):
            started = time.process_time()
            run()
            if number:
                taken.append(time.process_time() - started)
    return [statistics.median(taken) for taken in times]


if __name__ == "__main__":
    encoding()
