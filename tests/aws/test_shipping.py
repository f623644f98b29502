"""The wheel that a job takes along, and where files lie in S3."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

import gpt
from gpt.aws.shipping import build_wheel, uploads_below
from gpt.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_is_the_same_each_time_whenever_files_were_touched(tmp_path, monkeypatch):
    copy = tmp_path / "gpt"
    shutil.copytree(ROOT / "gpt", copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    before = build_wheel()
    (copy / "launch.pyc").write_bytes(b"x")
    (copy / ".hidden").write_bytes(b"x")
    for file in tmp_path.rglob("*"):
        os.utime(file, (1e9, 1e9))
    monkeypatch.setattr(gpt, "__file__", str(copy / "__init__.py"))
    assert build_wheel() == before
    (copy / "new.py").write_text("x = 1\n")
    assert build_wheel() != before


def test_the_wheel_has_sources_templates_and_configs():
    name, content = build_wheel()
    assert name == f"gpt_trainer-{gpt.__version__}-py3-none-any.whl"
    archive = zipfile.ZipFile(BytesIO(content))
    assert archive.testzip() is None
    inside = set(archive.namelist())
    wanted = {"gpt/py.typed", "gpt/aws/container.py", "gpt/training/report.html.jinja", "gpt/configs/launch/instance/h100.yaml"}
    assert wanted <= inside
    tracked = subprocess.run(["git", "ls-files", "-z", "gpt"], cwd=ROOT, capture_output=True, check=False).stdout.decode().split("\0")
    assert {file for file in tracked if file and (ROOT / file).is_file()} <= inside
    metadata = archive.read(f"gpt_trainer-{gpt.__version__}.dist-info/METADATA").decode()
    for need in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        assert f"Requires-Dist: {need}\n" in metadata
    assert "moto" not in metadata


def test_pip_installs_it_without_a_network_and_it_is_this_gpt(tmp_path):
    name, content = build_wheel()
    (tmp_path / name).write_bytes(content)
    target, environment = tmp_path / "target", {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHONPATH"))}
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(tmp_path / name)]
    done = subprocess.run(pip, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    code = (
        "import gpt, importlib.metadata as m; from gpt.compose import compose_run\n"
        "print(gpt.__file__, m.distribution('gpt-trainer').locate_file(''), len(m.files('gpt-trainer')))\n"
        "print(compose_run('pretrain', ['launch/instance=h100']).launch.instance_type)"
    )
    where = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(target)},
    )
    first, second = where.stdout.splitlines()
    file, location, count = first.split()
    assert Path(file) == target / "gpt" / "__init__.py"
    assert Path(location).samefile(target)
    assert int(count) > len(list((ROOT / "gpt").rglob("*.py")))
    assert second == "ml.p5.48xlarge"


def test_the_hash_of_a_folder_is_of_names_and_contents():
    def folder(files: dict[str, Path | bytes]) -> str:
        return uploads_below("s3://b/inputs", files, "x")[0]

    first = folder({"a": b"1", "b": b"2"})
    assert first == folder({"b": b"2", "a": b"1"})
    assert (
        len({first, folder({"a": b"2", "b": b"1"}), folder({"a": b"1", "c": b"2"}), folder({"a": b"1"}), folder({"a": b"1b", "": b"2"})})
        == 5
    )
    assert first.startswith("s3://b/inputs/")
    assert len(first) == len("s3://b/inputs//") + 16


def test_what_cannot_be_uploaded_is_named_with_its_key(tmp_path):
    with pytest.raises(UserError, match=r"^init: .*gone cannot be read: No such file or directory$"):
        uploads_below("s3://b", {"a": tmp_path / "gone"}, "init")
    with pytest.raises(UserError, match=r"^init: the name of 'a.udce9' is not UTF-8, and S3 takes no other; rename it$"):
        uploads_below("s3://b", {os.fsdecode(b"a\xe9"): b""}, "init")
