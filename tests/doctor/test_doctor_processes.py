"""torch.compile and the meeting of two processes, and the conditions in which they really fail."""

from __future__ import annotations

import os
import sys
import time

import pytest
from doctor_standins import executable, in_child, package

from gpt.commands import DoctorConfig
from gpt.doctor import processes

CPU = DoctorConfig(device="cpu")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.slow
def test_torch_compile_works_here(own_cache):
    result = processes.compiler(CPU)
    if "there is no" in result.found or "C++ compiler" in result.fix or "-dev" in result.fix:
        pytest.skip("there is no working C++ compiler")
    assert (result.state, result.found.startswith("works on cpu (")) == ("ok", True), result


def test_no_compiler(tmp_path, own_cache, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    executable(tmp_path, "apt-get", "exit 0")
    result = processes.compiler(CPU)
    assert (result.state, result.fix) == ("warning", "sudo apt-get install g++")
    assert result.found.startswith("fails, so runs are slower: InvalidCxxCompiler: No working C++ compiler")
    (tmp_path / "apt-get").unlink()
    assert processes._compiler_fix() == "install a C++ compiler (g++)"
    monkeypatch.setenv("CXX", "nowhere-c++")
    assert processes._compiler_fix().startswith("there is no CXX=nowhere-c++: unset CXX")


@pytest.mark.slow  # the reason is another one than above, the way the same
def test_a_broken_compiler(tmp_path, own_cache, monkeypatch):
    broken = executable(tmp_path, "c++", "echo 'x.cpp:1:10: fatal error: omp.h: No such file or directory' >&2; exit 1")
    monkeypatch.setenv("CXX", str(broken))
    result = processes.compiler(CPU)
    assert result.state == "warning"
    assert result.found == "fails, so runs are slower: omp.h: No such file or directory"
    assert "CXX names another one" in result.fix or "-dev" in result.fix


@pytest.mark.slow
def test_no_python_headers(tmp_path, own_cache):
    (tmp_path / "site").mkdir()
    (tmp_path / "include").mkdir()
    hidden = (
        f"import sysconfig\nfor scheme in sysconfig._INSTALL_SCHEMES.values():\n    scheme['include'] = {str(tmp_path / 'include')!r}\n"
    )
    (tmp_path / "site" / "sitecustomize.py").write_text(hidden)  # a Python whose headers are not installed
    bin = tmp_path / "bin"
    executable(bin, "apt-get", "exit 0")
    result = in_child(processes.compiler, CPU, path=tmp_path / "site", PATH=f"{bin}{os.pathsep}{os.environ['PATH']}")
    assert result.state == "warning"
    if "there is no" not in result.fix and "g++" not in result.fix:
        assert result.fix == f"sudo apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-dev"
        assert "Python.h" in result.found


@pytest.mark.slow
def test_a_compiler_that_hangs(tmp_path, own_cache, monkeypatch):
    monkeypatch.setenv("CXX", str(executable(tmp_path, "c++", "exec sleep 600")))
    monkeypatch.setattr(processes, "_COMPILE_SECONDS", 8)
    started = time.monotonic()
    result = processes.compiler(CPU)
    assert (result.state, result.found) == ("warning", "not done after 8 s")
    assert "compile=false" in result.fix
    assert time.monotonic() - started < 60


def test_two_processes_meet_whatever_a_launcher_left_in_the_environment(monkeypatch):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    result = processes.process_group(DoctorConfig())
    assert (result.state, result.found.startswith("two processes meet over gloo")) == ("ok", True), result


def test_an_interface_that_is_not_there(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    result = processes.process_group(DoctorConfig())
    assert result.state == "problem"
    assert "nosuch0" in result.found
    assert "enforce fail" not in result.found
    assert result.fix.startswith("unset GLOO_SOCKET_IFNAME (it is nosuch0)")


def test_processes_that_never_meet(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(package(tmp_path, "torch", "import time; time.sleep(600)"))
    monkeypatch.setattr(processes, "_MEET_SECONDS", 2)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    started = time.monotonic()
    result = processes.process_group(DoctorConfig())
    assert (result.state, result.found) == ("problem", "two processes do not meet over gloo: not done after 2 s")
    assert "/etc/hosts" in result.fix
    assert time.monotonic() - started < 30
