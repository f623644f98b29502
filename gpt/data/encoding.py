"""Rows to ids, in parallel processes and with bounded memory: the reader's batches go out, their ids come back in order.

Workers are plain processes that speak pickles over pipes: they import neither torch nor the program's main module, so that any script may
prepare data, and they end by themselves when the pipe does, however the parent ended."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from gpt.data.deduplication import SeenDocuments
from gpt.data.encoded import Encoded, Encoder
from gpt.data.redaction import Redactor
from gpt.data.shards import SPLITS
from gpt.data.sources import ReadReport, Row, RowStream
from gpt.data.survey import HoldOut, text_of, texts_of
from gpt.data.tokenizer import Tokenizer, load_tokenizer, without_surrogates
from gpt.errors import UserError

BATCH_BYTES = 1 << 20  # of text, that one worker takes at a time
POOL_FROM_BYTES = 32_000_000  # a smaller source is soon done without
POOL_AFTER_SECONDS = 3.0  # where the size is not known
_COPIES = 4  # of a text in flight: here, on its way, in the worker, and its ids
_WORKER_BYTES = 100_000_000  # an interpreter with the tokenizer's libraries
_CHECK_AGAIN = 10_000  # characters; the check of all of it takes the slow encoder half the memory of a worker
_START = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from gpt.data.encoding import work; work()"


class TextEncoder:
    """An `Encoder` of documents for pretraining: the end-of-text token and the ids of the text.

    Args:
        tokenizer_directory: with tokenizer.json.
        check: text on which the fast encoder must agree; where `tokenizer` has been checked, workers look at its beginning only.
        hold_out: where it cuts texts, the end of each becomes a document of its own, held out.
        tokenizer: the same, loaded; it does not go to the workers, which load theirs.
    """

    def __init__(self, tokenizer_directory: str, check: str, hold_out: HoldOut, tokenizer: Tokenizer | None = None) -> None:
        self.tokenizer_directory, self.check, self.hold_out = tokenizer_directory, check, hold_out
        self._tokenizer = tokenizer

    def __reduce__(self) -> tuple[Any, ...]:
        check = self.check if self._tokenizer is None else self.check[:_CHECK_AGAIN]
        return TextEncoder, (self.tokenizer_directory, check, self.hold_out)

    def __call__(self, rows: Sequence[Row]) -> list[Encoded]:
        """Each text's ids; a later piece of a large text continues it."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_directory, check=self.check)
        parts: list[tuple[Row, str, bool | None]] = []
        for row in rows:
            text = text_of(row)
            if self.hold_out.within:
                parts += [(row, part, held_out) for part, held_out in zip(self.hold_out.cut(text), (False, True), strict=True) if part]
            else:
                parts.append((row, text, None))
        separator = np.array([] if self._tokenizer.end_of_text is None else [self._tokenizer.end_of_text], dtype=np.uint32)
        encoded = []
        for (row, text, held_out), ids in zip(parts, self._tokenizer.encode_batch([text for _, text, _ in parts]), strict=True):
            continues = row.piece > 0 and held_out is None
            ids = ids if continues else np.concatenate((separator, ids))
            encoded.append(
                Encoded(
                    row.name, row.held_out_key, ids, None, len(without_surrogates(text).encode()), held_out=held_out, continues=continues
                )
            )
        return encoded


@dataclass
class Chunk:
    """What a batch adds to one split; the arguments of ShardWriter.append."""

    ids: np.ndarray
    starts: np.ndarray
    n_bytes: int
    labels: np.ndarray | None


@dataclass
class Work:
    """What a worker does with a batch: redact, encode, divide among the splits.

    Attributes:
        encoder: makes the ids.
        redact: kinds to replace before.
        hold_out: decides the split.
        dtype: of the ids.
        labelled: whether labels are kept; where the encoder gives none, a token's label is its id.
        skip: rows that the encoder refuses are left out, counted as skipped_rows.
    """

    encoder: Encoder
    redact: list[str]
    hold_out: HoldOut
    dtype: str
    labelled: bool
    skip: bool = False

    def __call__(self, rows: Sequence[Row]) -> tuple[dict[str, Chunk], Counter[str]]:
        """The batch's part of each split, and what was counted."""
        counts: Counter[str] = Counter()
        if self.redact:
            redactor = Redactor(self.redact)
            rows = [redactor.row(row, counts) for row in rows]
        sides: dict[str, list[Encoded]] = {split: [] for split in SPLITS}
        for document in self._encoded(rows, counts):
            counts.update(document.counts)
            if len(document.ids):
                held_out = self.hold_out(document.held_out_key) if document.held_out is None else document.held_out
                sides["held_out" if held_out else "train"].append(document)
        return {split: self._chunk(documents) for split, documents in sides.items()}, counts

    def _encoded(self, rows: Sequence[Row], counts: Counter[str]) -> list[Encoded]:
        try:
            return self.encoder(rows)
        except UserError:
            if not self.skip:
                raise
            if len(rows) == 1:
                counts["skipped_rows"] += 1
                return []
        return [document for row in rows for document in self._encoded([row], counts)]

    def _chunk(self, documents: list[Encoded]) -> Chunk:
        starts = np.cumsum([0, *(len(d.ids) for d in documents)], dtype=np.uint64)[:-1]
        begins = np.array([not d.continues for d in documents], dtype=bool)
        labels = None
        if self.labelled:
            labels = np.concatenate([np.empty(0, np.int32), *(_labels(d) for d in documents)])
        ids = np.concatenate([np.empty(0, self.dtype), *(d.ids.astype(self.dtype) for d in documents)])
        return Chunk(ids, starts[begins], sum(d.bytes for d in documents), labels)


def _labels(document: Encoded) -> np.ndarray:
    return document.ids.astype(np.int32) if document.labels is None else document.labels.astype(np.int32)


@dataclass
class Batch:
    """Rows that are encoded together, and what there was to tell behind the last of them."""

    number: int
    rows: list[Row] = field(default_factory=list)
    memory: int = 0
    """Bytes that the texts take."""
    characters: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Since the batch before: duplicates, near_empty."""
    state: dict[str, Any] = field(default_factory=dict)
    """Of the stream, the report and the seen documents; reading goes on from it."""


@dataclass
class Reader:
    """Batches of the rows that are kept.

    Attributes:
        stream: the rows.
        report: what the stream adds to.
        min_characters: of a document, without blanks at both ends.
        seen: leaves out duplicates.
        examples: rows are examples, not documents.
        skip: rows without a text are left out, counted, rather than refused.
        number: of the first batch.
    """

    stream: RowStream
    report: ReadReport
    min_characters: int
    seen: SeenDocuments | None
    examples: bool
    skip: bool = False
    number: int = 0

    def __iter__(self) -> Iterator[Batch]:
        """The last batch may be empty: it tells how the source ended."""
        batch = Batch(self.number)
        for row in self.stream:
            try:
                text = texts_of(row) if self.examples else text_of(row)
            except UserError as error:
                if not self.skip:
                    raise
                self.report.skipped(str(error))
                continue
            if row.piece == 0 and len(text.strip()) < self.min_characters:
                batch.left_out["near_empty"] += 1
            else:
                row = row if self.examples else replace(row, values={"text": text})
                if self.seen is not None and not self.seen.is_new(row, batch.number):
                    batch.left_out["duplicates"] += row.piece == 0
                else:
                    batch.rows.append(row)
                    batch.memory += sys.getsizeof(text)
                    batch.characters += len(text)
            if batch.memory >= BATCH_BYTES:
                yield self._stamped(batch)
                batch = Batch(batch.number + 1)
        yield self._stamped(batch)

    def _stamped(self, batch: Batch) -> Batch:
        batch.state = {
            "stream": self.stream.state_dict(), "report": asdict(self.report), "seen": self.seen and self.seen.state_dict(),
        }  # fmt: skip
        return batch


Encoding = tuple[dict[str, Chunk], Counter[str]]


def encode_batches(
    batches: Iterator[Batch], work: Work, workers: int, memory_mb: int, alone_seconds: float = 0.0
) -> Generator[tuple[Batch, Encoding]]:
    """Each batch with what became of it, in order.

    Args:
        batches: read as fast as there is room.
        work: what to do with each.
        workers: processes; 0: all is done here.
        memory_mb: which the processes, texts in flight and their copies stay below, if there is room for a few texts at all.
        alone_seconds: the workers start only then.

    Raises:
        UserError: a row that cannot be encoded; a worker that was killed.
    """
    started = time.monotonic()
    while not workers or time.monotonic() - started < alone_seconds:
        if (batch := next(batches, None)) is None:
            return
        yield batch, work(batch.rows)
    room = max(2 * BATCH_BYTES, (memory_mb * 1_000_000 - (workers + 1) * _WORKER_BYTES) // _COPIES)
    waiting: deque[tuple[Batch, Future[Encoding]]] = deque()
    in_flight = 0
    with WorkerPool(work, workers) as pool:
        while True:
            while waiting and (in_flight + BATCH_BYTES > room or len(waiting) > 3 * workers):
                batch, future = waiting.popleft()
                yield batch, future.result()
                in_flight -= batch.memory
            batch = next(batches, None)
            if batch is None:
                break
            future = pool.submit(batch.rows)
            batch.rows = []
            waiting.append((batch, future))
            in_flight += batch.memory
        while waiting:
            batch, future = waiting.popleft()
            yield batch, future.result()


def count_workers(wanted: int, size: int | None, memory_mb: int) -> tuple[int, float]:
    """Processes for a source of `size` bytes, and after how many seconds they start.

    As many as are wanted, else one a core that there is memory for; 0 for a small source.
    """
    if wanted:
        return wanted, 0.0
    if size is not None and size < POOL_FROM_BYTES:
        return 0, 0.0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fitting = min(cores, memory_mb * 1_000_000 // 2 // _WORKER_BYTES)  # half of it for the texts
    return (fitting if fitting > 1 else 0), (POOL_AFTER_SECONDS if size is None else 0.0)


class WorkerPool:
    """Worker processes, each fed by a thread of its own.

    Args:
        work: what each does with what is submitted; picklable.
        workers: how many.
    """

    def __init__(self, work: Callable[[Any], Any], workers: int) -> None:
        self._work = pickle.dumps(work)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="encoding")
        self._own = threading.local()
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
        self._threads.shutdown(wait=True)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except BrokenPipeError:  # what it still held was for a process that is no more
                        continue

    def submit(self, task: Any) -> Future[Any]:
        """Have `work` done with a task, both picklable, and its answer.

        Raises:
            UserError: with the answer: that of the work, or that the worker was killed.
            RuntimeError: with the answer: what else went wrong in the worker.
        """
        return self._threads.submit(self._ask, task)

    def _ask(self, task: Any) -> Any:
        process = getattr(self._own, "process", None)
        if process is None:
            process = self._own.process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(task, process.stdin, protocol=5)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (OSError, EOFError) as error:
            raise UserError(
                f"data.workers: a process that prepares data ended with exit code {process.wait()}; -9 is most often for lack of "
                "memory: set data.workers or data.memory_mb lower"
            ) from error
        if isinstance(answer, UserError):
            raise answer
        if isinstance(answer, str):
            raise RuntimeError(f"in a worker process:\n{answer}")
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        # What runs is this program's own code, also when it was found through sys.path alone; one core for each.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TOKENIZERS_PARALLELISM": "false"}
        if "" in sys.path:
            environment["PYTHONPATH"] = os.pathsep.join((os.getcwd(), environment["PYTHONPATH"]))
        process = subprocess.Popen([sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._processes.append(process)
        assert process.stdin is not None
        process.stdin.write(self._work)
        return process


def work() -> None:
    """The main loop of a worker process: the work once, then tasks in, answers out, until the pipe ends."""
    source = sys.stdin.buffer
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between
    try:
        do = pickle.load(source)
        while True:
            task = pickle.load(source)
            try:
                answer: object = do(task)
            except UserError as error:
                answer = error
            except Exception:
                answer = traceback.format_exc()
            pickle.dump(answer, sink, protocol=5)
            sink.flush()
    except (EOFError, BrokenPipeError, KeyboardInterrupt, pickle.UnpicklingError):  # the parent is done, or gone in the middle of a task
        os._exit(0)
