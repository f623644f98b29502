"""Programs that a model could have written: what passes, what does not, and what they can reach."""

import os
import socket
import subprocess
import threading
import time

import pytest

from gpt.errors import UserError
from gpt.evaluation import execution
from gpt.evaluation.execution import isolation, run_programs


def waits_for_end(words: str) -> bool:
    """Whether no process of these words is left, or soon will be."""
    for _ in range(50):
        listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        if words not in listed:
            return True
        time.sleep(0.1)
    return False


def outcome(program: str, seconds: float = 10.0):
    return run_programs([program], seconds)[0]


def test_what_passes_and_what_does_not():
    done = []
    programs = ["assert 1 + 1 == 2", "assert 1 + 1 == 3, 'no'", "def f(:", "raise SystemExit(0)", "import os; os._exit(0)", "x = '\ud800'"]
    outcomes = run_programs(programs, 10.0, done.append)
    assert [found.passed for found in outcomes] == [True, False, False, False, False, True]
    assert outcomes[1].problem == "AssertionError: no"
    assert outcomes[2].problem.startswith("SyntaxError")
    assert outcomes[3].problem == "ended with exit code 0"
    assert done == [1] * len(programs)


def test_what_it_prints_and_reads_is_nobody_s():
    assert outcome("import sys\nassert sys.stdin.read() == ''\nprint('x' * 100)\nassert __name__ == '__main__'").passed


def test_a_program_that_does_not_end_is_killed_with_what_it_started():
    started = time.monotonic()
    found = outcome(
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(31.7)'])\nwhile True: pass", 1.0
    )
    assert (found.passed, found.problem) == (False, "took longer than 1 s")
    assert time.monotonic() - started < 8
    assert waits_for_end("time.sleep(31.7)")
    assert outcome("import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(32.7)'])").passed
    assert waits_for_end("time.sleep(32.7)")


def test_it_cannot_take_all_memory_or_disk():
    assert "MemoryError" in outcome(f"x = bytearray({2 * execution.MEMORY_BYTES})").problem
    assert not outcome(f"with open('x', 'wb') as f: f.write(bytes({2 * execution._FILE_BYTES}))").passed
    assert not outcome("import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))\nopen('x', 'wb').write(bytes(1 << 26))").passed


def test_it_has_an_empty_folder_and_none_of_our_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.chdir(tmp_path)
    program = "import os\nassert os.listdir() == []\nassert 'AWS_SECRET_ACCESS_KEY' not in os.environ\nopen('left', 'w').write(os.getcwd())"
    assert outcome(program).passed
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not isolation(), reason="this system allows no network namespaces")
def test_it_has_no_network():
    program = "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2).close()"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threading.Thread(target=lambda: server.accept(), daemon=True).start()
        assert not outcome(program.format(port=port)).passed
        socket.create_connection(("127.0.0.1", port), 2).close()  # from here it works, and ends the thread


def test_without_namespaces_programs_still_run(monkeypatch):
    monkeypatch.setattr(execution, "isolation", lambda: ())
    assert outcome("assert True").passed
    assert not outcome("while True: pass", 0.5).passed
    monkeypatch.undo()
    monkeypatch.setattr(execution, "_ISOLATED", (("false",), ("there-is-no-such-command",)))
    assert isolation.__wrapped__() == ()


def test_only_where_processes_can_be_limited(monkeypatch):
    monkeypatch.setattr(execution.os, "name", "nt")
    with pytest.raises(UserError, match="Linux and macOS"):
        execution.check_execution()
