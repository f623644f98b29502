"""Building and finding the library, with a source that builds in no time and compilers that do not work."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from gpt.model import native_library

TINY = 'extern "C" int decode_step() { return 7; }\n'


def has_compiler() -> bool:
    try:
        return bool(native_library._command(os.environ.get("CXX", "")))
    except native_library.UnavailableError:
        return False


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    """A small source, an empty cache, and nothing asked before."""
    (tmp_path / "tiny.cpp").write_text(TINY)
    monkeypatch.setattr(native_library, "CACHE", str(tmp_path / "cache"))
    native_library._load.cache_clear()
    yield
    native_library._load.cache_clear()


def source() -> Path:
    return Path(native_library.CACHE).with_name("tiny.cpp")


def load_library() -> tuple[ctypes.CDLL | None, str]:
    return native_library.load_library(source())


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").iterdir())


def compiler(tmp_path: Path, script: str) -> str:
    path = tmp_path / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def again() -> tuple[object, str]:
    native_library._load.cache_clear()
    return load_library()


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
class TestBuilding:
    def test_it_is_built_once(self, tmp_path, monkeypatch):
        library, why = load_library()
        assert library is not None
        assert not why
        assert library.decode_step() == 7
        (made,) = files(tmp_path)
        before = made.stat()
        run, commands = native_library._run, []
        monkeypatch.setattr(native_library, "_run", lambda command: commands.append(command) or run(command))
        assert load_library()[0] is library, "and asked for once"
        assert not commands
        assert again()[0] is not None
        assert [command[-1] for command in commands] == [os.devnull], "only its macros are asked for"
        assert files(tmp_path) == [made]
        assert made.stat().st_mtime_ns == before.st_mtime_ns

    def test_another_source_or_another_compiler_is_another_library(self, tmp_path, monkeypatch):
        load_library()
        source().write_text(TINY.replace("7", "8"))
        again()
        assert len(files(tmp_path)) == 2
        monkeypatch.setenv("CXX", compiler(tmp_path, 'exec "${REAL:-g++}" -DANOTHER "$@"'))
        monkeypatch.setenv("REAL", native_library._command("")[0])
        assert load_library()[0] is not None
        assert len(files(tmp_path)) == 3

    @pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: b"", lambda content: content[:-1] + b"?"])
    def test_a_damaged_file_is_built_again(self, tmp_path, monkeypatch, damage):
        run, built = native_library._run, []
        monkeypatch.setattr(native_library, "_run", lambda command: built.append("-shared" in command) or run(command))
        native_library._find_or_build(source(), native_library._command(""), str(tmp_path / "cache"))
        (made,) = files(tmp_path)
        whole = made.read_bytes()
        made.unlink()  # it is loaded: not to be written to
        made.write_bytes(damage(whole))
        assert load_library()[0] is not None
        assert built == [False, True, False, True]
        assert whole in [path.read_bytes() for path in files(tmp_path)], "the same compiler makes the same bytes"

    def test_two_processes_at_once(self, tmp_path):
        program = (
            "import sys; from pathlib import Path; from gpt.model import native_library as n; "
            "n.CACHE = sys.argv[2]; library, why = n.load_library(Path(sys.argv[1])); print(library.decode_step(), why)"
        )
        command = [sys.executable, "-c", program, str(source()), str(tmp_path / "cache")]
        started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
        for process in started:
            out, err = process.communicate(timeout=120)
            assert (process.returncode, out, err) == (0, "7 \n", "")
        assert all(path.suffix == ".so" for path in files(tmp_path)), "nothing is left half done"

    def test_a_folder_that_cannot_be_written_to_is_a_warning(self, tmp_path):
        (tmp_path / "cache").write_text("a file")
        with pytest.warns(UserWarning, match=r"torch does its work, which is slower: .*cache"):
            assert load_library()[0] is None


MACROS = 'case "$*" in *" -E "*) echo "#define _OPENMP 1"; exit;; esac;'


class TestNoLibrary:
    def test_no_compiler_is_no_warning(self, tmp_path, monkeypatch):
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_library() == (None, "there is no C++ compiler (g++ or clang++ on the PATH, or CXX)")

    @pytest.mark.parametrize("script", ["exit 0", "echo \"error: unsupported option '-fopenmp'\" >&2; exit 1"])
    def test_no_openmp_is_no_warning(self, tmp_path, monkeypatch, script):
        monkeypatch.setenv("CXX", compiler(tmp_path, script))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_library() == (None, f"{tmp_path / 'c++'} has no OpenMP")

    @pytest.mark.parametrize(
        ("script", "cause"),
        [
            ("echo 'internal compiler error: Segmentation fault' >&2; exit 4", "ended with 4: internal compiler error: Segmentation fault"),
            ("exit 1", "ended with 1: it says nothing"),
            (f"{MACROS} echo 'ld: cannot find -lomp' >&2; exit 1", "ended with 1: ld: cannot find -lomp"),
            (f'{MACROS} for last; do :; done; echo text > "$last"', "cache: .*made.so"),
        ],
    )
    def test_a_broken_compiler_is_a_warning_with_its_cause_said_once(self, tmp_path, monkeypatch, script, cause):
        monkeypatch.setenv("CXX", compiler(tmp_path, script))
        with pytest.warns(UserWarning, match=f"torch does its work, which is slower: .*{cause}") as said:
            found = [load_library() for _ in range(2)]
        assert found == [(None, found[0][1])] * 2
        assert found[0][1] in str(said[0].message)
        assert len(said) == 1
        assert not (tmp_path / "cache").exists() or not files(tmp_path)

    def test_a_compiler_that_is_not_there(self, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler -O1")
        with pytest.warns(UserWarning, match=r"no-such-compiler: .*No such file"):
            assert load_library()[0] is None
