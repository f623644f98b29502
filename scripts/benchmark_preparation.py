"""Preparing a corpus 20 times as large as its memory cap: how fast, and how much memory parent and workers take together.

    python -m scripts.benchmark_preparation [workers]

The corpus is the standard library's text over and over, its lines shuffled; it and its tokens take about 8 GB of a temporary folder."""

from __future__ import annotations

import random
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

from gpt.data.config import DataConfig, TokenizerConfig
from gpt.data.prepare import prepare_corpus

MEMORY_MB = 256
CORPUS_BYTES = 20 * MEMORY_MB * 1_000_000
_FILE_BYTES = 4_000_000


def preparation(workers: int = 0, size: int = CORPUS_BYTES) -> dict[str, float]:
    """Prepare `size` bytes within MEMORY_MB and print what it took.

    Returns:
        megabytes a second, without reading the sample and training the tokenizer on it; peak memory in MB, of parent and workers together
        (the sum of their proportional shares, so that pages they have in common count once), while doing either.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "text"
        folder.mkdir()
        _write_corpus(folder, size)
        data = DataConfig(
            source="text", paths=[str(folder)], cache_dir=f"{place}/cache", memory_mb=MEMORY_MB, workers=workers, deduplicate="exact"
        )
        marks: dict[str, float] = {}

        def say(text: str) -> None:
            marks[text.partition(" ")[0]] = time.monotonic()
            print(text, flush=True)

        with _Memory() as memory:
            at_rest = memory.now()
            prepare_corpus(data, TokenizerConfig(name="bpe", vocab_size=8192), 256, say)
        seconds = marks["tokens"] - marks["encoding"]
        before = memory.peak(0, marks["encoding"])
        during = memory.peak(marks["encoding"], marks["tokens"])
    figures = {
        "MB/s": size / 1e6 / seconds, "peak MB, parent and workers, while encoding": during,
        "peak MB while the tokenizer is made": before, "MB of the parent before it begins": at_rest,
    }  # fmt: skip
    print(f"{size / 1e6:,.0f} MB of text, data.memory_mb={MEMORY_MB}, {workers} workers, {seconds:.0f} s of encoding")
    for name, value in figures.items():
        print(f"{value:10,.1f}  {name}")
    return figures


def _write_corpus(folder: Path, size: int) -> None:
    lines: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        lines += path.read_text(encoding="utf-8").splitlines(keepends=True)
    shuffle = random.Random(1337).shuffle
    written = number = 0
    while written < size:
        shuffle(lines)
        content = "".join(lines).encode()[: min(_FILE_BYTES, size - written)]
        (folder / f"{number:05d}.txt").write_bytes(content)
        written += len(content)
        number += 1


class _Memory:
    """Samples the memory of this process and all below it, from /proc."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def peak(self, start: float, end: float) -> float:
        """The most MB between two times."""
        return max((memory for when, memory in self._samples if start <= when <= end), default=0.0)

    def now(self) -> float:
        """MB of memory that this process and its children hold, shared pages divided among those that share them."""
        waiting, total = ["self"], 0
        while waiting:
            process = Path("/proc") / waiting.pop()
            try:
                total += sum(
                    int(line.split()[1]) for line in (process / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:")
                )
                for task in (process / "task").iterdir():
                    waiting += (task / "children").read_text().split()
            except (FileNotFoundError, ProcessLookupError):  # it has ended
                continue
        return total * 1024 / 1e6

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self._samples.append((time.monotonic(), self.now()))


if __name__ == "__main__":
    preparation(*map(int, sys.argv[1:2]))
