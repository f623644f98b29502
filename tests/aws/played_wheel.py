"""A wheel of `gpt` in which `played_run.py` is the launcher, and a host's /opt/ml with it."""

import functools
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WHEEL = "gpt_trainer-0.0.1-py3-none-any.whl"
CONTAINER = Path(__file__).parents[2] / "gpt" / "aws" / "container.py"


@functools.cache
def played_wheel(needs: tuple[str, ...] = ()) -> bytes:
    """Of a package that needs some others."""
    content = io.BytesIO()
    lines = ["Metadata-Version: 2.4", "Name: gpt-trainer", "Version: 0.0.1", *(f"Requires-Dist: {need}" for need in needs)]
    with zipfile.ZipFile(content, "w") as wheel:
        wheel.writestr("gpt/__init__.py", "")
        wheel.writestr("gpt/launch.py", Path(__file__).with_name("played_run.py").read_text(encoding="utf-8"))
        wheel.writestr("gpt_trainer-0.0.1.dist-info/METADATA", "\n".join(lines) + "\n")
    return content.getvalue()


def lay_out(root: Path, act: str, host: str = "algo-1", hosts: Sequence[str] = ("algo-1",), needs: Sequence[str] = (), **more: Any) -> Path:
    """A host's /opt/ml in a folder, for a run that does `act`; returns the entrypoint."""
    code, config = root / "input" / "data" / "code", root / "input" / "config"
    for folder in (code, config, root / "input" / "data" / "train", root / "model", root / "output"):
        folder.mkdir(parents=True)
    run = {"run": {"id": "r", "dir": "/opt/ml/checkpoints"}, "train": {"sample_prompts": [act]}, "launch": {"name": "local"}, **more}
    files = {
        code / "config.json": run,
        config / "resourceconfig.json": {
            "current_host": host, "hosts": list(hosts), "network_interface_name": "eth7", "current_instance_type": "ml.p5.48xlarge",
            "current_group_name": "one",
        },
        config / "hyperparameters.json": {"optimizer.lr": "007", "text": "a 'b' \"c\" = ü"},
        config / "inputdataconfig.json": {"code": {}, "train": {"TrainingInputMode": "File"}},
    }  # fmt: skip
    for file, content in files.items():
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (code / WHEEL).write_bytes(played_wheel(tuple(needs)))
    (code / CONTAINER.name).write_bytes(CONTAINER.read_bytes())
    return code / CONTAINER.name
