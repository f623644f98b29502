"""Our C++, each file built for this machine by its own compiler once, and loaded."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp")
CACHE = "~/.cache/gpt/native"
_SECONDS = 300  # that the compiler may take


class UnavailableError(Exception):
    """There is no library, and why, in words."""


class BuildError(UnavailableError):
    """There is a compiler, and it should have worked."""


def load_library(source: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library of a C++ file; or None and why there is none, in words. A build that fails is a warning too. Asked once a process."""
    return _load(source, os.environ.get("CXX", ""), CACHE)


@functools.cache
def _load(source: Path, compiler: str, cache: str) -> tuple[ctypes.CDLL | None, str]:
    try:
        return _find_or_build(source, _command(compiler), cache), ""
    except BuildError as failure:
        warnings.warn(f"{source.name} cannot be built, so torch does its work, which is slower: {failure}", stacklevel=3)
        return None, str(failure)
    except UnavailableError as reason:
        return None, str(reason)


def _command(compiler: str) -> list[str]:
    """The compiler with what it is always told."""
    found = shlex.split(compiler) or [path for path in map(shutil.which, ("g++", "clang++")) if path][:1]
    if not found:
        raise UnavailableError("there is no C++ compiler (g++ or clang++ on the PATH, or CXX)")
    return [*found, *_FLAGS]


def _find_or_build(source: Path, command: list[str], cache: str) -> ctypes.CDLL:
    """The library of this source, compiler and machine, out of the cache if it is there and whole.

    A file's name ends with the hash of its content, so that one which is cut short or damaged is not loaded but built again.
    """
    try:
        # The compiler's own macros name its version and every instruction set that it will use here.
        macros = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
    except BuildError as failure:
        if "fopenmp" in str(failure):  # Apple's clang++ refuses it
            raise UnavailableError(f"{command[0]} has no OpenMP") from failure
        raise
    if "_OPENMP" not in macros:
        raise UnavailableError(f"{command[0]} has no OpenMP")
    try:
        folder = Path(cache).expanduser()
        headers = [path.read_bytes() for path in sorted(source.parent.glob("*.h"))]
        key = _hash(b"".join(["\0".join([*command, macros]).encode(), source.read_bytes(), *headers]))
        for path in folder.glob(f"{key}-*.so"):
            if path.name == f"{key}-{_hash(path.read_bytes())}.so":
                return ctypes.CDLL(str(path))
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside) / "made.so"
            _run([*command, "-shared", "-fPIC", str(source), "-o", str(made)])
            library = ctypes.CDLL(str(made))  # only what loads is kept
            made.replace(folder / f"{key}-{_hash(made.read_bytes())}.so")
            return library
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise BuildError(f"{cache}: {error}") from error


def _run(command: list[str]) -> str:
    """What a command prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["it says nothing"]
        raise BuildError(f"{command[0]} ended with {done.returncode}: {said[0]}")
    return done.stdout


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
