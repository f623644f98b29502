import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt.errors import UserError
from gpt.finetuning.row_store import RowStore, make_room, room_needed, store_name

KEY = {"weights": "abc", "depth": 2}


def open_store(folder: Path, key=KEY, rows: int = 10, dtype=torch.bfloat16) -> RowStore:
    return RowStore(folder, key, rows, (4, 6), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.int32])
def test_rows_come_back_as_they_were_in_any_order_also_in_another_process(tmp_path, dtype):
    store = open_store(tmp_path / "s", dtype=dtype)
    rows = (torch.randn(3, 4, 6) * 100).to(dtype)
    assert not store.holds(np.array([7, 0, 3]))
    store.write(np.array([7, 0, 3]), rows)
    assert store.holds(np.array([3, 7]))
    assert not store.holds(np.array([3, 7, 1]))
    assert store.filled() == 3
    again = open_store(tmp_path / "s", dtype=dtype)
    for opened in (store, again):
        assert opened.holds(np.array([0, 3, 7, 7]))
        assert torch.equal(opened.read(np.array([0, 3, 7, 7])), rows[[1, 2, 0, 0]])


def test_padding_is_not_kept_and_is_always_there(tmp_path):
    store = open_store(tmp_path / "s")
    store.write(np.array([2, -1]), torch.ones(2, 4, 6, dtype=torch.bfloat16))
    assert store.filled() == 1
    assert store.holds(np.array([2, -1]))
    assert not store.holds(np.array([9, -1]))
    assert store.read(np.array([-1, 2])).sum((1, 2)).tolist() == [0, 24]


def test_a_row_that_was_cut_short_or_damaged_is_missing(tmp_path):
    open_store(tmp_path / "s").write(np.arange(3), torch.randn(3, 4, 6).bfloat16())
    with (tmp_path / "s" / "rows.bin").open("r+b") as file:
        file.seek(48 + 5)
        file.write(b"x")
    store = open_store(tmp_path / "s")
    assert store.holds(np.array([0, 2]))
    assert not store.holds(np.array([1]))
    store.write(np.array([1]), torch.zeros(1, 4, 6).bfloat16())
    assert store.holds(np.arange(3))


def test_a_file_that_somebody_cuts_short_is_an_error_and_no_crash(tmp_path):
    store = open_store(tmp_path / "s")
    store.write(np.arange(3), torch.randn(3, 4, 6).bfloat16())
    os.truncate(tmp_path / "s" / "rows.bin", 48 + 5)
    assert store.holds(np.arange(3))
    with pytest.raises(OSError, match="cut short"):
        store.read(np.arange(3))


def test_a_row_of_zeros_is_there(tmp_path):
    store = open_store(tmp_path / "s")
    store.write(np.array([4]), torch.zeros(1, 4, 6).bfloat16())
    assert open_store(tmp_path / "s").holds(np.array([4]))


@pytest.mark.parametrize("change", [{"key": {"weights": "other", "depth": 2}}, {"rows": 11}, {"dtype": torch.float32}])
def test_rows_of_another_key_are_refused_in_a_sentence(tmp_path, change):
    open_store(tmp_path / "s")
    with pytest.raises(UserError, match=r"was made from other weights, data or settings than this run's; remove it"):
        open_store(tmp_path / "s", **change)
    (tmp_path / "s" / "meta.json").write_text("{broken")
    with pytest.raises(UserError, match="remove it"):
        open_store(tmp_path / "s")


def test_names_follow_the_key():
    assert store_name(KEY) == store_name({"depth": 2, "weights": "abc"})
    assert store_name(KEY) != store_name({**KEY, "depth": 3})
    assert room_needed(10, (4, 6), torch.bfloat16) == 10 * (48 + 4)


def test_a_full_disk_is_an_error_and_no_crash(tmp_path):
    """A file-size limit is to a process what a full disk is."""
    program = f"""
import resource, signal, sys
import numpy as np, torch
from pathlib import Path
from gpt.finetuning.row_store import RowStore
store = RowStore(Path({str(tmp_path / "s")!r}), {{}}, 1000, (4, 6), torch.float32)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
store.write(np.array([1]), torch.ones(1, 4, 6))
try:
    store.write(np.array([900]), torch.ones(1, 4, 6))
except OSError as error:
    print(error.errno, store.holds(np.array([1])), store.holds(np.array([900])))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment, check=True)
    assert done.stdout.split() == [str(errno.EFBIG), "True", "False"]


def fill(parent: Path, name: str, age: int) -> None:
    store = RowStore(parent / name / "train", {}, 64, (64, 64), torch.float32)
    store.write(np.arange(64), torch.ones(64, 64, 64))
    os.utime(parent / name / "train" / "meta.json", (1000 - age, 1000 - age))


def test_room_is_made_of_what_was_not_used_for_longest(tmp_path):
    for name, age in (("old", 30), ("older", 40), ("new", 10)):
        fill(tmp_path, name, age)
    assert make_room(tmp_path, "next", 1 << 20, 100 << 20) is None
    assert len(list(tmp_path.iterdir())) == 3
    assert make_room(tmp_path, "next", 1 << 20, int(3.5 * 2**20)) is None  # each has 1 MiB: of the others two may stay
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}
    assert make_room(tmp_path, "new", 1 << 20, int(1.5 * 2**20)) is None, "what is there already counts"
    assert {path.name for path in tmp_path.iterdir()} == {"new"}


def test_what_does_not_fit_is_said(tmp_path, monkeypatch):
    assert make_room(tmp_path, "next", 2 * 10**9, 10**9) == "it would take 2.0 GB, more than the 1 GB that it may"
    usage = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    told = make_room(tmp_path, "next", 2 * 10**9, 10**10)
    assert told is not None
    assert "it would take 2.0 GB" in told
    assert "has 0.0 GB left" in told


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_has_been_read_does_not_add_up_in_memory(tmp_path):
    store = RowStore(tmp_path / "store", {}, 320, (1 << 20,), torch.uint8)
    for number in range(320):
        store.write(np.array([number]), torch.full((1, 1 << 20), number % 251, dtype=torch.uint8))
    other = RowStore(tmp_path / "store", {}, 320, (1 << 20,), torch.uint8)
    resident = []  # KiB of mapped files
    for first in range(0, 320, 4):
        numbers = np.arange(first, first + 4)
        assert other.holds(numbers)
        assert other.read(numbers)[:, 0].tolist() == [number % 251 for number in numbers.tolist()]
        mapped = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
        resident.append(int(mapped.split()[1]))
    assert max(resident) - resident[0] < 16 << 10, f"{(max(resident) - resident[0]) >> 10} MiB of 320 are kept"
