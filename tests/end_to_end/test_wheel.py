"""The wheel, outside the checkout: the configs and the report's template must be inside it."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_what_it_needs_and_no_more(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert f"gpt/configs/{path.relative_to(ROOT / 'configs').as_posix()}" in names
    assert {"gpt/training/report.html.jinja", "gpt/training/page.css", "gpt/runs/compare.html.jinja"} <= set(names)
    assert {"gpt/inference/decode_step.cpp", "gpt/model/attention.cpp", "gpt/model/rowwise.cpp", "gpt/py.typed"} <= set(names)
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert not [n for n in names if not n.startswith(("gpt/", "gpt_trainer-"))]


def test_the_installed_wheel_pretrains(wheel, tmp_path, corpus):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip())
    zipfile.ZipFile(wheel).extractall(site)
    # The packages it depends on come from here; as a plain entry of sys.path, this environment's own editable `gpt` does not.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    where = subprocess.check_output([python, "-c", "import gpt; print(gpt.__file__)"], text=True, cwd=tmp_path, env=environment)
    assert where.startswith(str(site))
    settings = f"debug=golden data=text data.paths=[{corpus}] data.cache_dir=cache run.id=w train.budget=3steps"
    done = subprocess.run(
        [python, "-m", "gpt", "pretrain", *settings.split()], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "w" / "report.html").is_file()
