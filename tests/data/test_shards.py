import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.config import DataConfig, TokenizerConfig
from gpt.data import shards
from gpt.data.prepare import prepare_corpus
from gpt.data.shards import Index, ShardWriter, TokenArray, building, open_split, read_index, write_index
from gpt.errors import UserError

# Prepares a corpus as a process of its own; says what it does on stdout and waits for a line on stdin at the step named WAIT.
PREPARE = """
import resource, sys
from gpt.config import DataConfig, TokenizerConfig
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
    print("fingerprint", made.fingerprint, len(made.train), flush=True)
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


def write(directory: Path, pieces: list[np.ndarray], dtype: str = "uint16", split: str = "train") -> Index:
    writer = ShardWriter(directory, split, dtype)
    for piece in pieces:
        writer.append([piece])
    index = Index(dtype=dtype, tokens={split: writer.sizes})
    write_index(directory, index)
    return index


class TestArray:
    @pytest.mark.parametrize(("dtype", "largest"), [("uint16", 65535), ("uint32", 200_000)])
    def test_what_is_written_is_read(self, tmp_path, small_shards, dtype, largest):
        ids = np.random.default_rng(0).integers(0, largest + 1, 40).astype(np.uint32)
        ids[3] = largest
        index = write(tmp_path, [ids[:5], ids[5:5], ids[5:30], ids[30:]], dtype)
        assert index.tokens == {"train": [7, 7, 7, 7, 7, 5]}
        assert len(list(tmp_path.glob("train-*.bin"))) == 6
        array = open_split(tmp_path, index, "train")
        assert len(array) == 40
        assert np.array_equal(array.windows(np.array([0]), 40)[0], ids)
        assert array.windows(np.array([0]), 40).dtype == np.int64

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
        array = open_split(tmp_path, write(tmp_path, [np.arange(10)]), "train")
        with pytest.raises(IndexError):
            array.windows(np.array([5]), 6)

    def test_a_split_without_tokens(self, tmp_path):
        assert len(open_split(tmp_path, write(tmp_path, [np.array([], dtype=np.uint32)]), "train")) == 0


class TestDamage:
    @pytest.mark.parametrize("damage", ["truncated", "emptied", "longer", "missing", "a folder"])
    def test_a_damaged_shard_is_named(self, tmp_path, small_shards, damage):
        index = write(tmp_path, [np.arange(20)])
        victim = tmp_path / "train-00001.bin"
        content = victim.read_bytes()
        victim.unlink()
        if damage == "a folder":
            victim.mkdir()
        elif damage != "missing":
            victim.write_bytes({"truncated": content[:-1], "emptied": b"", "longer": content + b"\0\0"}[damage])
        with pytest.raises(UserError, match=r"is damaged .*delete .* and it is made again") as error:
            open_split(tmp_path, index, "train")
        assert str(victim) in str(error.value)

    @pytest.mark.parametrize("index", [None, "", '{"version": 2, "dty', "[]", "7", '{"version": 0}', '{"version": 2, "future": 1}'])
    def test_a_folder_without_a_whole_index_is_made_again(self, tmp_path, index):
        directory = tmp_path / "key"
        directory.mkdir()
        (directory / "train-00000.bin").write_bytes(b"\1\0" * 10)
        if index is not None:
            (directory / "index.json").write_text(index)
        assert read_index(directory) is None
        with building(directory) as aside:
            assert aside is not None
            write(aside, [np.arange(3)])
        whole = read_index(directory)
        assert whole is not None
        assert len(open_split(directory, whole, "train")) == 3


class TestBuilding:
    @pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), UserError("x")])
    def test_an_exception_leaves_nothing_behind(self, tmp_path, error):
        def build() -> None:
            with building(tmp_path / "data" / "key") as aside:
                assert aside is not None
                write(aside, [np.arange(3)])
                raise error

        with pytest.raises(type(error)):
            build()
        assert left_behind(tmp_path / "data") == []

    def test_the_folder_appears_only_when_whole(self, tmp_path):
        directory = tmp_path / "key"
        with building(directory) as aside:
            assert aside is not None
            write(aside, [np.arange(3)])
            assert not directory.exists()
        assert left_behind(tmp_path) == ["key"]
        with building(directory) as again:
            assert again is None
        assert left_behind(tmp_path) == ["key"]

    def test_a_place_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        place = tmp_path / "file/data/key"
        with pytest.raises(UserError, match=r"^data\.cache_dir: cannot write .*file/data: Not a directory"), building(place):
            pytest.fail("there is no such place")

    def test_only_one_builds_at_a_time(self, tmp_path):
        """Threads stand for processes: each takes the lock by itself."""
        built: list[Path | None] = []

        def build() -> None:
            with building(tmp_path / "key") as aside:
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
        assert "reading" not in said_second
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
        assert "reading 40 files" in said
        assert not any(name.endswith(".building") for name in left_behind(tmp_path / "cache" / "data"))
        config.cache_dir = str(tmp_path / "other")
        assert rebuilt.fingerprint == prepare_corpus(config, tokenizer, 32, said.append).fingerprint

    @pytest.mark.parametrize("file_size", [500, 30_000])
    def test_a_full_disk_is_said_and_leaves_nothing(self, corpus, tmp_path, file_size):
        """A limit on the size of files stands for a full disk: it hits the tokenizer's file, or the shards."""
        process = start(corpus, tmp_path, file_size=file_size)
        said, errors = process.communicate()
        assert process.returncode == 1
        assert errors.startswith("gpt: data.cache_dir: cannot write")
        assert "File too large (set data.cache_dir to another folder)" in errors
        assert len(errors.splitlines()) == 1
        assert ("encoding" in said) == (file_size > 500)
        assert left_behind(tmp_path / "data") == []
