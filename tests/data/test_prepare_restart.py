"""A build that was killed, interrupted or cut short goes on where it stopped."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from gpt.data import prepare as module
from gpt.data import shards

KILLED = """
import json, os, signal, sys
from gpt.data import encoding, prepare, shards
from gpt.data.config import DataConfig, TokenizerConfig

data, tokenizer, die_after, where = json.loads(sys.argv[1])
prepare.COMMIT_SECONDS, encoding.BATCH_BYTES, count = 0.0, 9000, 0

def dying(function, name):
    def call(*arguments):
        global count
        count += name == where
        if name == where and count > die_after:
            if name == "append":  # half of what should be written
                arguments = (arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
                function(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call

shards.ShardWriter.append = dying(shards.ShardWriter.append, "append")
shards.ShardWriter.sync = dying(shards.ShardWriter.sync, "sync")
prepare.write_json = dying(prepare.write_json, "write_json")
prepare.write_index = dying(prepare.write_index, "write_index")
made = prepare.prepare_corpus(DataConfig(**data), TokenizerConfig(**tokenizer), 32, lambda text: print(text, flush=True))
print("fingerprint", made.fingerprint)
"""


class TestKill:
    @pytest.mark.parametrize(
        ("where", "die_after", "workers"),
        [
            ("append", 1, 0), ("append", 7, 0), ("sync", 9, 0), ("write_json", 0, 0), ("write_index", 0, 0), ("write_json", 5, 2),
        ],
    )  # fmt: skip
    def test_what_was_committed_is_kept_and_the_result_is_the_same(self, workshop, tmp_path, where, die_after, workers):
        for number in range(4):
            (workshop.text / f"copy{number}.txt").write_text("the same again\n" * 300)
        workshop.data.deduplicate, workshop.data.workers, workshop.data.redact = "exact", workers, ["email"]
        workshop.data.cache_dir = str(tmp_path / "whole")
        whole = workshop.prepare()
        workshop.data.cache_dir = str(workshop.cache)
        settings = {name: value for name, value in asdict(workshop.data).items() if name != "fields"}
        arguments = json.dumps([settings, asdict(workshop.tokenizer), die_after, where])
        victim = subprocess.run([sys.executable, "-c", KILLED, arguments], capture_output=True, text=True, check=False)
        assert victim.returncode == -signal.SIGKILL, victim.stderr
        again = workshop.prepare()
        went_on = [line for line in workshop.said if line.startswith("going on behind")]
        assert len(went_on) == ((where, die_after) not in (("append", 1), ("write_json", 0)))
        assert again.fingerprint == whole.fingerprint
        assert again.manifest == whole.manifest
        (one,), (other,) = ({p for p in Path(c, "data").iterdir() if p.is_dir()} for c in (tmp_path / "whole", workshop.cache))
        assert one.name == other.name
        names = {p.name for p in one.iterdir()}
        assert names == {p.name for p in other.iterdir()}
        for name in names - {"verified.json"}:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name

    def test_killed_when_all_but_the_name_was_done(self, workshop):
        whole = workshop.prepare().fingerprint
        (folder,) = workshop.folders()
        half = folder.with_name(f".{folder.name}.building")
        folder.rename(half)
        (half / "progress.json").write_text("{}")
        assert workshop.prepare().fingerprint == whole
        assert not workshop.built
        assert workshop.folders() == {folder}
        assert not (folder / "progress.json").exists()

    def test_a_half_that_is_damaged_itself_is_said_and_begun_anew(self, workshop, monkeypatch):
        whole = workshop.prepare().fingerprint
        (folder,) = workshop.folders()
        half = folder.with_name(f".{folder.name}.building")
        shutil.rmtree(folder)
        for progress in (
            "{",
            "{}",
            '{"splits": {"train": {"sizes": [9], "documents": 1, "bytes": 9, "files": {"train-00000.bin": {"bytes": 18}}}}}',
        ):
            half.mkdir()
            (half / "progress.json").write_text(progress)
            assert workshop.prepare().fingerprint == whole
            assert any("starting from the beginning" in line for line in workshop.said)
            shutil.rmtree(folder)

    def test_an_interrupt_keeps_what_is_done(self, workshop, monkeypatch):
        whole = workshop.prepare().fingerprint
        shutil.rmtree(workshop.cache / "data")
        monkeypatch.setattr(module, "COMMIT_SECONDS", 0.0)
        monkeypatch.setattr("gpt.data.encoding.BATCH_BYTES", 9000)
        append, calls = shards.ShardWriter.append, iter(range(100))

        def interrupted(*arguments):
            if next(calls) == 9:
                raise KeyboardInterrupt
            append(*arguments)

        monkeypatch.setattr(shards.ShardWriter, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            workshop.prepare()
        monkeypatch.setattr(shards.ShardWriter, "append", append)
        assert workshop.prepare().fingerprint == whole
        assert any(line.startswith("going on behind") for line in workshop.said)
