"""`gpt doctor` as one types it: the table, the JSON, the exit code, a torch that does not import."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from doctor_standins import package
from rich.console import Console

from gpt.cli import main
from gpt.commands import DoctorConfig
from gpt.compose import compose_use
from gpt.doctor import command
from gpt.doctor.result import Check, Result
from gpt.doctor.runner import Row
from gpt.errors import UserError

LONG = "a long finding of many words, " * 8 + "/a/path/" + "without-a-space/" * 8
ROWS = [
    Row("torch.compile", Result("ok", "works on cpu (6 s)"), 6.2),
    Row("Neuron cores", Result("warning", LONG, "kill 4711 [not markup] " + "--an-option " * 9), 0.1),
    Row("run directory", Result("problem", "runs: 0.1 GiB free", "run.dir=<folder>"), 1.6),
]


def good(config: DoctorConfig) -> Result:
    return Result("ok", f"{config.device} is good")


def so_so(config: DoctorConfig) -> Result:
    return Result("warning", "so so", "do this")


def bad(config: DoctorConfig) -> Result:
    raise RuntimeError("it broke")


def table(capsys: pytest.CaptureFixture[str], width: int, rows: list[Row] = ROWS, **settings: object) -> str:
    command.print_table(rows, Console(width=width, highlight=False, **settings))  # pyright: ignore[reportArgumentType]
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_loses_nothing(width, capsys):
    text = table(capsys, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert [line for line in lines if line != line.rstrip()] == []
    assert "\x1b" not in text
    for row in ROWS:
        assert re.search(rf"^{re.escape(row.name)} +{row.result.state} +{re.escape(row.result.found[:12])}", text, re.MULTILINE)
        for said in (row.result.found, f"fix: {row.result.fix}" if row.result.fix else ""):
            assert re.sub(r"\s", "", said) in re.sub(r"\s", "", text)
    assert lines[-1] == "1 problem, 1 warning; took 8 s (torch.compile 6 and run directory 2)"


def test_the_table_has_colours_on_a_terminal_and_none_where_they_are_not_wanted(capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1;31mproblem" in table(capsys, 80, force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1;31m" not in table(capsys, 80, force_terminal=True)


def test_the_last_line_when_all_is_well(capsys):
    assert table(capsys, 80, ROWS[:1]).splitlines()[-1] == "all well; took 6 s (torch.compile 6)"
    assert table(capsys, 80, [ROWS[1]] * 2).splitlines()[-1] == "2 warnings; took 0 s"


@pytest.mark.parametrize(
    ("checks", "code"), [((good,), 0), ((good, so_so), 0), ((good, so_so, bad), 1)], ids=["good", "warning", "problem"]
)
def test_the_exit_code_and_the_json(checks, code, capsys):
    named = [Check(check.__name__, check) for check in checks]
    assert command.report(named, DoctorConfig(json=True, device="mps")) == code
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert err == ""
    assert (said["problems"], said["warnings"]) == (code, int(so_so in checks))
    assert [check["name"] for check in said["checks"]] == [check.__name__ for check in checks]
    assert all(check.keys() == {"name", "state", "found", "fix", "seconds"} for check in said["checks"])
    assert said["checks"][0] | {"seconds": 0} == {"name": "good", "state": "ok", "found": "mps is good", "fix": "", "seconds": 0}
    assert command.report(named, DoctorConfig()) == code
    assert "mps" not in capsys.readouterr().out


def test_what_is_being_checked_is_shown_on_a_terminal_only():
    script = (
        "import sys; from gpt.commands import DoctorConfig; from gpt.doctor import command, machine; from gpt.doctor.result import Check\n"
        "sys.exit(command.report([Check('Python', machine.python)], DoctorConfig(json=True)))"
    )
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=theirs, env=env)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # so Linux says that nobody writes any more
        pass
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"checking Python (1 of 1)" in shown
    assert json.loads(out)["problems"] == 0


def test_every_check_has_a_name_and_can_be_reached():
    checks = [*command.CHECKS, *command.AWS_CHECKS]
    assert len({check.name for check in checks}) == len(checks)
    for check in checks:
        assert getattr(sys.modules[check.run.__module__], check.run.__name__) is check.run
        assert check.needs in ("", *(before.name for before in checks[: checks.index(check)]))


def test_aws_is_asked_only_when_one_says_so(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(command, "report", lambda checks, config: asked.extend(check.name for check in checks) or 0)
    command.doctor(DoctorConfig())
    assert not any("AWS" in name for name in asked)
    command.doctor(DoctorConfig(aws=True))
    assert {"AWS credentials", "AWS region", "AWS role"} <= {*asked}


def test_a_torch_that_does_not_import_stops_nothing_else(tmp_path: Path):
    package(tmp_path, "torch", "raise ImportError('libtorch_cpu.so: undefined symbol')")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, "-m", "gpt", "doctor", "--json"], capture_output=True, text=True, timeout=120, env=env, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (1, "")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["torch"]["found"] == "torch does not import: libtorch_cpu.so: undefined symbol"
    assert checks["torch"]["fix"] == "pip install --force-reinstall 'torch>=2.11'"
    skipped = {name for name, check in checks.items() if check["found"] == "not checked, for want of torch"}
    assert skipped == {check.name for check in command.CHECKS if check.needs == "torch"}
    assert {checks[name]["state"] for name in ("Python", "Neuron cores", "open files")} <= {"ok", "warning"}
    assert not any("Traceback" in check["found"] or "the check failed" in check["found"] for check in checks.values())


def test_the_page_on_it_names_every_check():
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| \*\*(.+?)\*\*", page, re.MULTILINE)
    assert explained == [check.name for check in (*command.CHECKS, *command.AWS_CHECKS)]


# The command line


def test_settings_and_the_flag():
    assert compose_use("doctor", []) == DoctorConfig()
    with pytest.raises(UserError, match="run_dir: which folder"):
        compose_use("doctor", ["run_dir="])
    with pytest.raises(UserError, match="add aws=true"):
        compose_use("doctor", ["role=Training"])


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("doctor --jsn", "--jsn: no such flag. Did you mean --json?"),
        ("pretrain --json", "--json: no such flag"),
        ("doctor device=tpu", "device=tpu"),
        ("doctor -m", "has no sweeps"),
        ("doctr", "Did you mean doctor?"),
    ],
)
def test_a_slip(typed, said, capsys):
    assert main(typed.split()) == 2
    assert said in capsys.readouterr().err


def test_the_flag_is_the_setting(capsys):
    assert main(["doctor", "--json", "--cfg"]) == 0
    assert "json: true" in capsys.readouterr().out


def test_help_says_what_the_exit_code_means(capsys):
    assert main(["doctor", "--help"]) == 0
    text = capsys.readouterr().out
    assert "usage: gpt doctor [--json] [key=value ...]" in text
    assert "exit code: 0: no problem, though there may be warnings; 1: at least one problem" in text


def test_a_terminal_without_such_characters_still_gets_a_table():
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    rows = ROWS[2:]
    console = Console(width=80, file=written)
    with console.capture() as drawn:
        console.print(command.as_table(rows))
    drawn.get().encode("ascii")
