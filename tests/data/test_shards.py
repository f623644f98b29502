import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.data import shards
from gpt.data.config import DataConfig, TokenizerConfig
from gpt.data.prepare import prepare_corpus
from gpt.data.shards import Index, ShardWriter, TokenArray, building, check_files, open_split, read_index, write_index
from gpt.errors import UserError

# Prepares a corpus as a process of its own; says what it does on stdout and waits for a line on stdin at the step named WAIT.
PREPARE = """
import resource, sys
from gpt.data.config import DataConfig, TokenizerConfig
from gpt.data.prepare import prepare_corpus
from gpt.errors import UserError

corpus, cache, wait_at, file_size = sys.argv[1:]
if int(file_size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_size), int(file_size)))

def say(text):
    print(text, flush=True)
    if wait_at and text.startswith(wait_at):
        sys.stdin.readline()

print("started", flush=True)
try:
    made = prepare_corpus(DataConfig(source="text", paths=[corpus], cache_dir=cache), TokenizerConfig(vocab_size=300), 32, say)
    print("fingerprint", made.fingerprint, len(made.parts[0].train.tokens), flush=True)
except UserError as error:
    sys.exit(f"gpt: {error}")
"""


def start(corpus: Path, cache: Path, wait_at: str = "", file_size: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE, str(corpus), str(cache), wait_at, str(file_size)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until_says(process: subprocess.Popen[str], beginning: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return
    pytest.fail(f"it ended without saying {beginning!r}: {process.communicate()[1]}")


def left_behind(directory: Path) -> list[str]:
    """What is beside the locks, which stay."""
    return sorted(p.name for p in directory.iterdir() if not p.name.endswith(".lock"))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 7)
    return 7


def write(directory: Path, pieces: list[np.ndarray], dtype: str = "uint16", split: str = "train", labelled: bool = False) -> Index:
    """Shards of documents, one a piece; labels are the ids in reverse."""
    writer = ShardWriter(directory, split, dtype, labelled)
    for piece in pieces:
        writer.append(piece, np.zeros(1, np.uint64), 2 * len(piece), piece[::-1].astype(np.int32) if labelled else None)
    writer.finish()
    index = Index(
        dtype=dtype, tokens={split: writer.sizes}, bytes={split: writer.bytes}, documents={split: writer.documents},
        files=writer.files, labelled=labelled,
    )  # fmt: skip
    write_index(directory, index)
    return index


def has_index(directory: Path) -> bool:
    return read_index(directory) is not None


class TestArray:
    @pytest.mark.parametrize(("dtype", "largest"), [("uint16", 65535), ("uint32", 200_000)])
    def test_what_is_written_is_read(self, tmp_path, small_shards, dtype, largest):
        ids = np.random.default_rng(0).integers(0, largest + 1, 40).astype(np.uint32)
        ids[3] = largest
        index = write(tmp_path, [ids[:5], ids[5:5], ids[5:30], ids[30:]], dtype)
        assert index.tokens == {"train": [7, 7, 7, 7, 7, 5]}
        assert (index.documents, index.bytes) == ({"train": 4}, {"train": 80})
        check_files(tmp_path, index)
        split = open_split(tmp_path, index, "train")
        assert len(split.tokens) == 40
        assert split.labels is None
        assert np.array_equal(split.tokens.windows(np.array([0]), 40)[0], ids)
        assert split.tokens.windows(np.array([0]), 40).dtype == np.int64
        assert split.documents.tolist() == [0, 5, 5, 30, 40]
        assert split.documents.dtype == np.uint64

    def test_labels_lie_beside_the_ids(self, tmp_path, small_shards):
        pieces = [np.arange(9), np.arange(20, 30)]
        split = open_split(tmp_path, write(tmp_path, pieces, labelled=True), "train")
        assert split.labels is not None
        assert split.labels.windows(np.array([0]), 19)[0].tolist() == [*range(8, -1, -1), *range(29, 19, -1)]
        assert {s.dtype for s in split.labels.shards} == {np.dtype(np.int32)}
        assert len(split.labels.shards) == len(split.tokens.shards) == 3

    def test_a_document_can_come_in_pieces(self, tmp_path, small_shards):
        writer = ShardWriter(tmp_path, "train", "uint16")
        nothing = np.zeros(0, np.uint64)
        writer.append(np.arange(5), np.array([0, 3], np.uint64), 5)
        writer.append(np.arange(9), nothing, 9)
        writer.append(np.arange(4), np.array([2], np.uint64), 4)
        writer.finish()
        index = Index(tokens={"train": writer.sizes}, files=writer.files)
        assert open_split(tmp_path, index, "train").documents.tolist() == [0, 3, 16, 18]
        assert (writer.documents, writer.bytes) == (3, 18)

    @given(st.data())
    def test_windows_are_slices_whatever_the_shards(self, data):
        sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
        whole = np.arange(sum(sizes), dtype=np.uint16)[::-1].copy()
        array = TokenArray(np.split(whole, np.cumsum(sizes)[:-1]))
        assert len(array) == len(whole)
        length = data.draw(st.integers(1, len(whole)))
        starts = data.draw(st.lists(st.integers(0, len(whole) - length), max_size=5))
        rows = array.windows(np.array(starts, dtype=np.int64), length)
        assert rows.shape == (len(starts), length)
        for row, first in zip(rows, starts, strict=True):
            assert np.array_equal(row, whole[first : first + length])

    def test_past_the_end_is_an_error(self, tmp_path, small_shards):
        array = open_split(tmp_path, write(tmp_path, [np.arange(10)]), "train").tokens
        with pytest.raises(IndexError):
            array.windows(np.array([5]), 6)

    def test_a_split_without_tokens(self, tmp_path):
        writer = ShardWriter(tmp_path, "train", "uint16")
        writer.finish()
        split = open_split(tmp_path, Index(tokens={"train": []}, files=writer.files), "train")
        assert (len(split.tokens), split.documents.tolist()) == (0, [0])


class TestGoingOn:
    @settings(max_examples=40)
    @given(cut=st.integers(0, 6), garbage=st.binary(max_size=40), missing=st.booleans(), labelled=st.booleans())
    def test_a_writer_goes_on_from_its_state_whatever_came_behind(self, tmp_path_factory, cut, garbage, missing, labelled):
        """What a killed process wrote behind its last commit may be all there, in part, or anything."""
        folder, other = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("whole")
        pieces = [np.arange(10 * i, 10 * i + size) for i, size in enumerate((3, 9, 1, 7, 20, 2))]
        size, shards.SHARD_TOKENS = shards.SHARD_TOKENS, 7
        try:

            def add(writer: ShardWriter, some: list[np.ndarray]) -> None:
                for piece in some:
                    writer.append(piece, np.zeros(1, np.uint64), len(piece), piece.astype(np.int32) if labelled else None)

            add(whole := ShardWriter(other, "train", "uint16", labelled), pieces)
            whole.finish()
            add(killed := ShardWriter(folder, "train", "uint16", labelled), pieces[:cut])
            killed.sync()
            state = json.loads(json.dumps(killed.state_dict()))
            add(killed, pieces[cut:])
            for path in folder.iterdir():
                committed = state["files"].get(path.name, {"bytes": 0})["bytes"]
                if missing:
                    os.truncate(path, committed)
                with path.open("ab") as file:
                    file.write(garbage)
            add(after := ShardWriter(folder, "train", "uint16", labelled, state), pieces[cut:])
            after.finish()
        finally:
            shards.SHARD_TOKENS = size
        assert after.files == whole.files
        assert after.state_dict() == whole.state_dict()
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}

    @pytest.mark.parametrize("damage", ["shorter", "missing"])
    def test_files_that_lost_what_was_committed(self, tmp_path, damage):
        writer = ShardWriter(tmp_path, "train", "uint16")
        writer.append(np.arange(9), np.zeros(1, np.uint64), 9)
        victim = tmp_path / "train-00000.bin"
        if damage == "missing":
            victim.unlink()
        else:
            os.truncate(victim, 17)
        with pytest.raises(ValueError, match="shorter than it was"):
            ShardWriter(tmp_path, "train", "uint16", state=writer.state_dict())


class TestDamage:
    @pytest.mark.parametrize("name", ["train-00001.bin", "train-00000.labels.bin", "train-documents.bin"])
    @pytest.mark.parametrize("damage", ["truncated", "emptied", "longer", "missing", "a folder", "a bit"])
    def test_a_damaged_file_is_named(self, tmp_path, small_shards, damage, name):
        index = write(tmp_path, [np.arange(20)], labelled=True)
        check_files(tmp_path, index)
        victim = tmp_path / name
        content = victim.read_bytes()
        victim.unlink()
        if damage == "a folder":
            victim.mkdir()
        elif damage != "missing":
            flipped = content[:5] + bytes([content[5] ^ 4]) + content[6:]
            victim.write_bytes({"truncated": content[:-1], "emptied": b"", "longer": content + b"\0\0", "a bit": flipped}[damage])
        with pytest.raises(UserError, match=r"is damaged .*delete .* and it is made again") as error:
            check_files(tmp_path, index)
        assert str(victim) in str(error.value)

    def test_a_bit_that_turned_unseen_is_found_when_checksums_are_asked_for(self, tmp_path):
        """As disks do it: size and time of the file stay as they were."""
        index = write(tmp_path, [np.arange(20)])
        check_files(tmp_path, index)
        victim = tmp_path / "train-00000.bin"
        stat, content = victim.stat(), victim.read_bytes()
        victim.write_bytes(b"\7" + content[1:])
        os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        check_files(tmp_path, index)
        with pytest.raises(UserError, match=r"train-00000\.bin is damaged \(its checksum"):
            check_files(tmp_path, index, checksums=True)

    @pytest.mark.parametrize("memory", ["", "[]", '{"train-00000.bin": 7}', '{"train-00000.bin'])
    def test_a_damaged_memory_of_what_was_checked_is_made_again(self, tmp_path, memory):
        index = write(tmp_path, [np.arange(20)])
        check_files(tmp_path, index)
        right = (tmp_path / "verified.json").read_text()
        (tmp_path / "verified.json").write_text(memory)
        check_files(tmp_path, index)
        assert (tmp_path / "verified.json").read_text() == right

    @pytest.mark.parametrize("index", [None, "", '{"version": 3, "dty', "[]", "7", '{"version": 2}', '{"version": 3, "future": 1}'])
    def test_a_folder_without_a_whole_index_is_made_again(self, tmp_path, index):
        directory = tmp_path / "key"
        directory.mkdir()
        (directory / "train-00000.bin").write_bytes(b"\1\0" * 10)
        if index is not None:
            (directory / "index.json").write_text(index)
        assert read_index(directory) is None
        with building(directory, has_index) as aside:
            assert aside is not None
            write(aside, [np.arange(3)])
        whole = read_index(directory)
        assert whole is not None
        assert len(open_split(directory, whole, "train").tokens) == 3


class TestBuilding:
    @pytest.mark.parametrize("error", [RuntimeError("x"), UserError("x")])
    def test_an_error_leaves_nothing_behind(self, tmp_path, error):
        def build() -> None:
            with building(tmp_path / "data" / "key", has_index) as aside:
                assert aside is not None
                write(aside, [np.arange(3)])
                raise error

        with pytest.raises(type(error)):
            build()
        assert left_behind(tmp_path / "data") == []

    def test_an_interrupt_leaves_what_is_done(self, tmp_path):
        def interrupted() -> None:
            with building(tmp_path / "key", has_index) as aside:
                assert aside is not None
                (aside / "half").touch()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert left_behind(tmp_path) == [".key.building"]
        with building(tmp_path / "key", has_index) as aside:
            assert aside is not None
            assert (aside / "half").exists()
        assert left_behind(tmp_path) == ["key"]

    def test_the_folder_appears_only_when_whole(self, tmp_path):
        directory = tmp_path / "key"
        with building(directory, has_index) as aside:
            assert aside is not None
            write(aside, [np.arange(3)])
            assert not directory.exists()
        assert left_behind(tmp_path) == ["key"]
        with building(directory, has_index) as again:
            assert again is None
        assert left_behind(tmp_path) == ["key"]

    def test_a_place_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        place = tmp_path / "file/data/key"
        with (
            pytest.raises(UserError, match=r"^data\.cache_dir: cannot write .*file/data: Not a directory"),
            building(place, has_index),
        ):
            pytest.fail("there is no such place")

    def test_only_one_builds_at_a_time(self, tmp_path):
        """Threads stand for processes: each takes the lock by itself."""
        built: list[Path | None] = []

        def build() -> None:
            with building(tmp_path / "key", has_index) as aside:
                if aside is not None:
                    write(aside, [np.arange(3)])
                    time.sleep(0.05)
                built.append(aside)

        threads = [threading.Thread(target=build) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(built) == 4
        assert sum(aside is not None for aside in built) == 1


class TestProcesses:
    def test_two_at_once_build_one_corpus(self, corpus, tmp_path):
        first = start(corpus, tmp_path, wait_at="encoding")
        wait_until_says(first, "encoding")
        second = start(corpus, tmp_path)
        wait_until_says(second, "started")
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(0.7)  # for the first
        said_first, said_second = first.communicate("go on\n")[0], second.communicate()[0]
        assert (first.returncode, second.returncode) == (0, 0)
        assert said_first.splitlines()[-1].startswith("fingerprint")
        assert said_first.splitlines()[-1] == said_second.splitlines()[-1]
        assert "encoding" not in said_second
        assert len(left_behind(tmp_path / "data")) == 1

    def test_a_killed_builder_is_followed_by_the_next(self, corpus, tmp_path):
        victim = start(corpus, tmp_path / "cache", wait_at="encoding")
        wait_until_says(victim, "encoding")
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        (half,) = left_behind(tmp_path / "cache" / "data")
        assert half.endswith(".building")
        config = DataConfig(source="text", paths=[str(corpus)], cache_dir=str(tmp_path / "cache"))
        tokenizer = TokenizerConfig(vocab_size=300)
        said: list[str] = []
        rebuilt = prepare_corpus(config, tokenizer, 32, said.append)
        assert not any(line.startswith("making the tokenizer") for line in said)  # it was there already
        assert any(line.startswith("encoding") for line in said)
        assert not any(name.endswith(".building") for name in left_behind(tmp_path / "cache" / "data"))
        config.cache_dir = str(tmp_path / "other")
        assert rebuilt.fingerprint == prepare_corpus(config, tokenizer, 32, said.append).fingerprint

    @pytest.mark.parametrize("file_size", [500, 130_000])
    def test_a_full_disk_is_said_and_leaves_nothing(self, corpus, tmp_path, file_size):
        """A limit on the size of files stands for a full disk: it hits the tokenizer's file, or the shards."""
        process = start(corpus, tmp_path, file_size=file_size)
        said, errors = process.communicate()
        assert process.returncode == 1
        assert errors.startswith("gpt: data.cache_dir: cannot write")
        assert "File too large (set data.cache_dir to another folder)" in errors
        assert len(errors.splitlines()) == 1
        assert ("encoding" in said) == (file_size > 500)
        assert left_behind(tmp_path / ("data" if file_size > 500 else "tokenizers")) == []
