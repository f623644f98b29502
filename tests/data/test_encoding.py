import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.data import encoding as module
from gpt.data.encoded import IGNORE_LABEL, Encoded
from gpt.data.encoding import Batch, Reader, TextEncoder, Work, count_workers, encode_batches
from gpt.data.progress import PreparationProgress
from gpt.data.sources import ReadReport, Row, RowStream
from gpt.data.survey import HoldOut
from gpt.data.tokenizer_training import byte_tokenizer
from gpt.errors import UserError

BY_NAME, WITHIN = HoldOut(0.3, False, 0.3), HoldOut(0.3, True, 0.0)


class Scripted:
    """An encoder that does what the rows say, in any process."""

    def __call__(self, rows: Sequence[Row]) -> list[Encoded]:
        encoded = []
        for row in rows:
            match row.values["text"]:
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "mistake":
                    raise UserError(f"{row.place}: a mistake")
                case "bug":
                    raise ZeroDivisionError("ours")
                case "modules":
                    heavy = sorted({"torch", "transformers", "datasets"} & set(sys.modules))
                    encoded.append(Encoded(row.name, row.name, np.array([1], np.uint32), None, 1, {f"has_{name}": 1 for name in heavy}))
                case "print":
                    print("what a library says")
                case "process":
                    encoded.append(Encoded(row.name, row.name, np.array([1], np.uint32), None, 1, {str(os.getpid()): 1}))
                case text:
                    time.sleep(float(text))
                    encoded.append(Encoded(row.name, row.name, np.array([int(row.name)], np.uint32), None, 1))
        return encoded


def scripted() -> Work:
    return Work(Scripted(), [], HoldOut(0.5, False, -1.0), "uint16", False)


@pytest.fixture(autouse=True)
def workers_find_this_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def batches(texts: Sequence[str]) -> Iterator[Batch]:
    for number, text in enumerate(texts):
        yield Batch(number, [Row(str(number), f"row {number}", {"text": text})], memory=1000)


def stream(rows: Sequence[Row]) -> RowStream:
    given_out = [0]

    def count() -> Iterator[Row]:
        for row in rows:
            given_out[0] += 1
            yield row

    return RowStream(count(), lambda: {"rows": given_out[0]})


def reader(rows: Sequence[Row], **settings) -> Reader:
    return Reader(stream(rows), ReadReport(), **({"min_characters": 0, "seen": None, "examples": False} | settings))


class TestPool:
    def test_results_come_in_order_however_long_each_takes(self):
        texts = ["0.2", "0", "0.05", "0", "0.1", "0", "0", "0"]
        found = [(batch.number, chunks["train"].ids.tolist()) for batch, (chunks, _) in encode_batches(batches(texts), scripted(), 3, 64)]
        assert found == [(n, [n]) for n in range(8)]

    def test_workers_load_none_of_the_heavy_libraries(self):
        _, (chunks, counts) = next(encode_batches(batches(["modules"]), scripted(), 1, 64))
        assert chunks["train"].ids.tolist() == [1]
        assert not counts

    def test_the_text_encoder_needs_no_heavy_library_either(self, tmp_path):
        byte_tokenizer().save(tmp_path / "tokenizer.json")
        code = (
            "import sys; from gpt.data.encoding import *; "
            f"e = TextEncoder({str(tmp_path)!r}, 'abc', HoldOut(0.1, False, 0.1)); e([Row('n', 'p', {{'text': 'abc'}})]); "
            "sys.exit(str({'torch', 'transformers', 'datasets'} & set(sys.modules) or ''))"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr.strip() == ""

    def test_what_is_printed_in_a_worker_does_not_come_between(self, capfd):
        found = list(encode_batches(batches(["print", "0"]), scripted(), 1, 64))
        assert len(found) == 2
        assert "what a library says" in capfd.readouterr().err

    @pytest.mark.parametrize(
        ("text", "error", "match"),
        [
            ("mistake", UserError, "^row 2: a mistake$"),
            ("bug", RuntimeError, "ZeroDivisionError: ours"),
            ("die", UserError, r"^data\.workers: a process .* exit code -9.*lower$"),
        ],
    )
    def test_what_goes_wrong_in_a_worker_is_told_here_and_ends_all(self, text, error, match):
        before = threading.active_count()
        with pytest.raises(error, match=match):
            list(encode_batches(batches(["0", "0", text, "0", "0"]), scripted(), 2, 64))
        assert threading.active_count() == before

    def test_a_consumer_that_stops_ends_the_workers(self):
        results = encode_batches(batches(["process"] * 3 + ["30"] * 9), scripted(), 2, 64)
        _, (_, counts) = next(results)
        (pid,) = map(int, counts)
        started = time.monotonic()
        results.close()
        assert time.monotonic() - started < 10
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    def test_workers_end_with_a_parent_that_is_killed(self):
        code = """
import sys, time; sys.path[:0] = sys.argv[1:]
from test_encoding import *
found = encode_batches(batches(["process"] * 4), scripted(), 2, 64)
print(*next(found)[1][1], flush=True); time.sleep(60)
"""
        parent = subprocess.Popen([sys.executable, "-c", code, *sys.path], stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        worker = Path("/proc") / parent.stdout.readline().strip()
        assert worker.exists()
        parent.kill()
        parent.communicate()
        until = time.monotonic() + 20
        while worker.exists() and (worker / "stat").read_text().split()[2] != "Z":  # nobody may be there to collect it
            assert time.monotonic() < until
            time.sleep(0.05)

    @given(
        memories=st.lists(st.integers(1, 2_000_000), max_size=40), workers=st.integers(1, 3), memory_mb=st.integers(5, 500)
    )  # fmt: skip
    def test_texts_in_flight_stay_below_the_cap(self, memories, workers, memory_mb):
        """What has been read and not come back, with its copies, is never more than the cap and one batch."""
        in_flight = most = 0

        def read() -> Iterator[Batch]:
            nonlocal in_flight, most
            for number, memory in enumerate(memories):
                in_flight += memory
                most = max(most, in_flight)
                yield Batch(number, memory=memory)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "WorkerPool", _NoPool)
            for batch, _ in encode_batches(read(), scripted(), workers, memory_mb):
                in_flight -= batch.memory
        assert in_flight == 0
        of_texts = memory_mb * 1_000_000 - (workers + 1) * module._WORKER_BYTES  # the rest is the processes themselves
        cap = max(2 * module.BATCH_BYTES, of_texts // 4)
        assert most <= max(cap - module.BATCH_BYTES, 0) + max(memories, default=0) + module.BATCH_BYTES

    def test_the_pool_starts_only_when_it_takes_longer(self):
        own = str(os.getpid())
        slow = ["process", "0.3", "process"]
        counts = [set(counts) for _, (_, counts) in encode_batches(batches(slow), scripted(), 1, 64, alone_seconds=0.2)]
        assert counts[0] == {own}
        assert len(counts[2]) == 1
        assert counts[2] != {own}

    def test_how_many_workers(self, monkeypatch):
        monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
        assert count_workers(3, 1, 64) == (3, 0.0)
        assert count_workers(0, 31_000_000, 1024) == (0, 0.0)
        assert count_workers(0, 10**9, 1024) == (5, 0.0)
        assert count_workers(0, 10**9, 8192) == (16, 0.0)
        assert count_workers(0, 10**9, 64) == (0, 0.0)  # a second process would take more than the cap
        assert count_workers(0, None, 1024) == (5, module.POOL_AFTER_SECONDS)


class _NoPool:
    """Answers at once; what is in flight is only what waits to be taken."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, rows: list[Row]) -> SimpleNamespace:
        return SimpleNamespace(result=lambda: ({}, Counter()))


class TestReader:
    @given(st.lists(st.text(alphabet="ab \n", max_size=30)), st.integers(1, 200), st.integers(0, 5))
    def test_batches_hold_every_row_that_is_kept_once(self, texts, size, least):
        rows = [Row(str(n), "", {"text": text, "label": 1}) for n, text in enumerate(texts)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "BATCH_BYTES", size)
            found = list(reader(rows, min_characters=least))
        kept = [row for row in rows if len(row.values["text"].strip()) >= least]
        assert [row.name for batch in found for row in batch.rows] == [row.name for row in kept]
        assert all(row.values.keys() == {"text"} for batch in found for row in batch.rows)
        assert [batch.number for batch in found] == list(range(len(found)))
        assert sum(batch.left_out["near_empty"] for batch in found) == len(rows) - len(kept)
        assert sum(batch.characters for batch in found) == sum(len(row.values["text"]) for row in kept)
        assert found[-1].state["stream"] == {"rows": len(rows)}

    def test_the_state_of_a_batch_is_behind_its_last_row(self, monkeypatch):
        monkeypatch.setattr(module, "BATCH_BYTES", 1)
        found = list(reader([Row(str(n), "", {"text": "x"}) for n in range(3)]))
        assert [batch.state["stream"]["rows"] for batch in found] == [1, 2, 3, 3]

    def test_later_pieces_of_a_text_are_never_near_empty(self):
        rows = [Row("a", "", {"text": "a long beginning"}), Row("a", "", {"text": "x"}, piece=1), Row("b", "", {"text": "x"})]
        (batch,) = reader(rows, min_characters=5)
        assert [(row.name, row.piece) for row in batch.rows] == [("a", 0), ("a", 1)]

    def test_examples_keep_their_fields(self):
        rows = [Row("a", "", {"prompt": "p", "completion": "c"}), Row("b", "", {"messages": [{"role": "user", "content": " "}]})]
        (batch,) = reader(rows, examples=True, min_characters=1)
        assert [row.values for row in batch.rows] == [rows[0].values]


class TestWork:
    def encoder(self, tmp_path: Path, hold_out: HoldOut) -> TextEncoder:
        byte_tokenizer().save(tmp_path / "tokenizer.json")
        return TextEncoder(str(tmp_path), "abc", hold_out)

    @given(texts=st.lists(st.text(min_size=1, max_size=30), max_size=8), hold_out=st.sampled_from([BY_NAME, WITHIN]))
    def test_every_text_is_on_one_side_or_cut_in_two(self, tmp_path_factory, texts, hold_out):
        tokenizer = byte_tokenizer()
        work = Work(self.encoder(tmp_path_factory.mktemp("t"), hold_out), [], hold_out, "uint16", False)
        chunks, counts = work([Row(f"{n}", "", {"text": text}) for n, text in enumerate(texts)])
        found: dict[str, list[str]] = {}
        for split, chunk in chunks.items():
            assert chunk.ids.dtype == np.uint16
            assert chunk.labels is None
            parts = np.split(chunk.ids, chunk.starts.astype(int)[1:]) if len(chunk.starts) else []
            assert all(part[0] == tokenizer.end_of_text for part in parts)
            found[split] = [tokenizer.decode(part[1:]) for part in parts]
            assert chunk.n_bytes == sum(len(text.encode()) for text in found[split])
        assert not counts
        if hold_out is BY_NAME:
            assert found["held_out"] == [text for n, text in enumerate(texts) if BY_NAME(str(n))]
            assert found["train"] == [text for n, text in enumerate(texts) if not BY_NAME(str(n))]
        else:
            assert "".join(found["train"]) + "".join(found["held_out"]) != "" or not texts
            assert sorted("".join(found["train"] + found["held_out"])) == sorted("".join(texts))

    def test_pieces_continue_a_document_across_batches(self, tmp_path):
        hold_out = HoldOut(0.1, False, 0.0)
        work = Work(self.encoder(tmp_path, hold_out), [], hold_out, "uint16", False)
        chunks, _ = work([Row("a", "", {"text": "cd"}, piece=1), Row("b", "", {"text": "e"})])
        end = byte_tokenizer().end_of_text
        assert chunks["train"].starts.tolist() == [2]
        assert chunks["train"].ids.tolist() == [*byte_tokenizer().encode("cd"), end, *byte_tokenizer().encode("e")]

    def test_lone_surrogates_count_as_what_they_become(self, tmp_path):
        hold_out = HoldOut(0.1, False, 0.0)
        chunks, _ = Work(self.encoder(tmp_path, hold_out), [], hold_out, "uint16", False)([Row("a", "", {"text": "x\ud800"})])
        assert byte_tokenizer().decode(chunks["train"].ids[1:]) == "x\ufffd"
        assert chunks["train"].n_bytes == 4

    def test_labels_counts_and_rows_that_are_dropped(self):
        def encoder(rows: Sequence[Row]) -> list[Encoded]:
            return [
                Encoded("a", "same", np.array([1, 2], np.uint32), np.array([IGNORE_LABEL, 2], np.int32), 1, {"truncated": 1}),
                Encoded("b", "b", np.array([], np.uint32), None, 0, {"dropped": 1}),
                Encoded("c", "same", np.array([70_000], np.uint32), None, 1, {"truncated": 1}),
            ]

        hold_out = HoldOut(0.5, False, 1.0)
        chunks, counts = Work(encoder, [], hold_out, "uint32", True)([])
        held_out = chunks["held_out"]
        assert held_out.labels is not None
        assert held_out.labels.tolist() == [IGNORE_LABEL, 2, 70_000]
        assert (held_out.ids.tolist(), held_out.starts.tolist(), held_out.n_bytes) == ([1, 2, 70_000], [0, 2], 2)
        assert len(chunks["train"].ids) == 0
        assert counts == {"truncated": 2, "dropped": 1}

    def test_redaction_comes_before_the_ids(self, tmp_path):
        hold_out = HoldOut(0.1, False, 0.0)
        work = Work(self.encoder(tmp_path, hold_out), ["email"], hold_out, "uint16", False)
        chunks, counts = work([Row("a", "", {"text": "to me@example.com"})])
        assert byte_tokenizer().decode(chunks["train"].ids[1:]) == "to [EMAIL]"
        assert (chunks["train"].n_bytes, counts) == (10, {"redacted_email": 1})


class TestHoldOut:
    @given(st.text(min_size=1), st.floats(0.01, 0.99))
    def test_a_text_is_cut_at_a_line_if_there_is_one_near(self, text, share):
        head, end = HoldOut(share, True, 0.0).cut(text)
        assert head + end == text
        border = int(len(text) * (1 - share))
        assert len(head) >= border
        if len(head) > border:
            assert head.endswith("\n")

    def test_about_the_share_is_held_out_and_more_of_it_holds_the_same(self):
        names = [f"file{n}.txt" for n in range(2000)]
        small, large = ({n for n in names if HoldOut(s, False, s)(n)} for s in (0.05, 0.2))
        assert small < large
        assert 60 < len(small) < 140
        assert 330 < len(large) < 470


class TestProgress:
    def test_lines_now_and_then_but_none_for_a_moment(self, monkeypatch):
        said: list[str] = []
        now = [100.0]
        monkeypatch.setattr("gpt.data.progress.time.monotonic", lambda: now[0])
        with PreparationProgress(10_000_000, said.append) as progress:
            for _ in range(21):
                now[0] += 1
                progress.update(1_234, int((now[0] - 100) * 1e6), 5_000_000)
        assert len(said) == 2
        assert said[0].startswith("1,234 documents  10.0 MB  0.9 MB/s  5.0M tokens")

    def test_a_bar_on_a_terminal_is_gone_in_the_end(self, monkeypatch, capsys):
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
        monkeypatch.setattr("gpt.data.progress.SILENT_SECONDS", 0.0)
        said: list[str] = []
        with PreparationProgress(10_000_000, said.append) as progress:
            progress.update(1, 5_000_000, 1)
            time.sleep(0.3)
            progress.update(2, 20_000_000, 1)  # compressed: more text than bytes
        errors = capsys.readouterr().err
        assert not said
        assert "documents" in errors
        assert errors.rstrip().endswith("\x1b[2K")
