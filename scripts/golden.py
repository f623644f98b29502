"""The golden run: twenty steps on a fixed text.

`make golden` rewrites tests/golden/losses.json after a change that is meant to change them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from gpt.compose import compose_run
from gpt.training.metrics import read_metrics
from gpt.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "losses.json"
OPTIMIZERS = ("adamw", "muon")


def golden_losses(optimizer: str, folder: Path) -> list[float]:
    """Train on this project's licence, which does not change, and return the loss of each step."""
    overrides = ["debug=golden", f"optimizer={optimizer}", "data=text", f"data.paths=[{ROOT / 'LICENSE'}]"]
    overrides += [f"data.cache_dir={folder / 'cache'}", f"run.dir={folder / 'runs'}", f"run.id={optimizer}"]
    run = Trainer(compose_run("pretrain", overrides)).fit().run_directory
    return [m["loss"] for m in read_metrics(run / "metrics.jsonl") if "loss" in m]


def main() -> None:
    """Rewrite the golden file."""
    with tempfile.TemporaryDirectory() as folder:
        losses = {optimizer: golden_losses(optimizer, Path(folder)) for optimizer in OPTIMIZERS}
    GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
    print(f"wrote {GOLDEN.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
