"""What a check may do to the process that it runs in: raise, hang, crash, print, leave processes behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt.commands import DoctorConfig
from gpt.doctor.result import Check, Result
from gpt.doctor.runner import run_checks


def fine(config: DoctorConfig) -> Result:
    return Result("ok", f"device={config.device}, process {os.getpid()}")


def raises(config: DoctorConfig) -> Result:
    raise ZeroDivisionError("three\nlines\nof it")


def leaves(config: DoctorConfig) -> Result:
    sys.exit(3)


def hangs(config: DoctorConfig) -> Result:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(config.run_dir).write_text(str(child.pid))
    time.sleep(600)
    raise AssertionError("it should have been ended")


def crashes(config: DoctorConfig) -> Result:
    print("half a word", flush=True)
    os.write(2, b"libbroken.so: cannot go on\n")
    os.kill(os.getpid(), signal.SIGILL)
    time.sleep(600)
    raise AssertionError("it should have ended")


def quits(config: DoctorConfig) -> Result:
    os._exit(7)


def is_bad(config: DoctorConfig) -> Result:
    return Result("problem", "bad", "make it good")


def result_of(*checks: Check, **settings: str) -> list[Result]:
    return [row.result for row in run_checks(checks, DoctorConfig(**settings))]


def is_running(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    if state.exists():
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_checks_run_in_one_other_process_and_know_the_config():
    first, second = result_of(Check("a", fine), Check("b", fine), device="cpu")
    assert first == second
    assert first.found.startswith("device=cpu")
    assert not first.found.endswith(f" {os.getpid()}")


def test_one_that_lets_go_has_its_process_ended():
    first, second = result_of(Check("a", fine, lets_go=True), Check("b", fine))
    assert first != second


@pytest.mark.parametrize(("check", "said"), [(raises, "ZeroDivisionError: three lines of it"), (leaves, "SystemExit: 3")])
def test_one_that_raises_is_a_problem_and_the_next_goes_on(check, said, capfd):
    bad, good = result_of(Check("bad", check), Check("good", fine))
    assert (bad.state, bad.found) == ("problem", f"the check failed: {said}")
    assert good.state == "ok"
    assert capfd.readouterr() == ("", "")


def test_the_traceback_is_shown_to_who_asks(monkeypatch, capfd):
    monkeypatch.setenv("GPT_DEBUG", "1")
    result_of(Check("bad", raises))
    assert "in raises" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (crashes, "was ended by SIGILL, an instruction that this processor lacks: libbroken.so: cannot go on"),
        (quits, "ended with exit code 7"),
    ],
)
def test_one_that_ends_its_process_is_a_problem_and_the_next_goes_on(check, said, capfd):
    bad, good = result_of(Check("bad", check, if_stuck="another build"), Check("good", fine))
    assert bad == Result("problem", f"the check's process {said}", "another build")
    assert good.state == "ok"
    assert capfd.readouterr() == ("", "")


def test_one_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    started = time.monotonic()
    bad, good = result_of(Check("bad", hangs, seconds=3, if_stuck="restart"), Check("good", fine), run_dir=str(tmp_path / "pid"))
    assert bad == Result("problem", "no answer within 3 s", "restart")
    assert good.state == "ok"
    assert time.monotonic() - started < 60
    child = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 10
    while is_running(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(child)


def test_what_needs_another_is_not_tried_without_it():
    heard: list[str] = []
    checks = [Check("torch", is_bad), Check("rate", raises, needs="torch"), Check("other", fine, needs="rate")]
    rows = run_checks(checks, DoctorConfig(), lambda check: heard.append(check.name))
    assert [row.result.state for row in rows] == ["problem", "warning", "ok"]
    assert rows[1].result == Result("warning", "not checked, for want of torch", "mend torch first")
    assert heard == ["torch", "other"]


def test_a_result_says_how_to_mend_it_or_is_ok():
    with pytest.raises(AssertionError):
        Result("warning", "slow")
    with pytest.raises(AssertionError):
        Result("ok", "fast", "nothing")
