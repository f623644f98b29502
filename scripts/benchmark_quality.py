"""Time to quality on a CPU: how long `gpt pretrain experiment=char_fast` trains to predict as well as a plain loop does at its end.

The plain loop is nanoGPT's model and training in its documented CPU mode (fp32, not compiled): GPT-2's shape with 4 layers, 128 wide, and
AdamW. Both train on the same megabyte of text, each in a process of its own, in turn, and one function scores both.

python scripts/benchmark_quality.py
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt import GPT
from gpt.compose import compose_run
from gpt.data.embedded import standard_library_files
from gpt.data.prepare import prepare_corpus
from gpt.data.shards import Split
from gpt.training.metrics import read_metrics

T = 64  # context length of both
CHARACTERS = 1_000_000
STEPS, BATCH, WARMUP = 2000, 12, 100
LR, FINAL_LR = 1e-3, 1e-4
SEEDS = (1337, 1338, 1339)


def standard_library_text() -> str:
    """The first million characters of the standard library's sources, in the order of their names; ASCII, so that there are about 97."""
    text, size = [], 0
    for file in standard_library_files():
        text.append(Path(file.path).read_text(encoding="utf-8", errors="ignore").encode("ascii", "ignore").decode())
        size += len(text[-1])
        if size >= CHARACTERS:
            break
    return "".join(text)[:CHARACTERS]


@torch.no_grad()
def held_out_loss(logits: Callable[[Tensor], Tensor], ids: np.ndarray) -> float:
    """Nats per character on all of a text, in windows of T that follow each other.

    Args:
        logits: (B, T) ids -> (B, T, V).
        ids: (N,) of the text.
    """
    tokens = torch.from_numpy(ids.astype(np.int64))
    windows = (len(tokens) - 1) // T
    inputs, targets = tokens[: windows * T].view(windows, T), tokens[1 : windows * T + 1].view(windows, T)
    nll = 0.0
    for x, y in zip(inputs.split(256), targets.split(256), strict=True):
        nll += F.cross_entropy(logits(x).float().flatten(0, 1), y.flatten(), reduction="sum").item()
    return nll / targets.numel()


class PlainBlock(nn.Module):
    """nanoGPT's block with bias=False and no dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, E) -> (B, T, E)."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.attention_out(y)
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class PlainGPT(nn.Module):
    """nanoGPT's model: GPT-2 with tied embeddings."""

    def __init__(self, vocab_size: int, layers: int = 4, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(T, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if "out" in name or "down" in name else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, V) logits."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


def train_plainly(train: np.ndarray, vocab_size: int, seed: int, steps: int = STEPS) -> tuple[PlainGPT, float]:
    """nanoGPT's loop, with the settings that its README gives for a CPU.

    Returns:
        The model, and the seconds of the loop alone.
    """
    torch.manual_seed(seed)
    text = torch.from_numpy(train.astype(np.int64))
    model = PlainGPT(vocab_size)
    decayed, plain = ([p for p in model.parameters() if (p.dim() == 2) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.99))
    started = time.perf_counter()
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))
        for group in optimizer.param_groups:
            group["lr"] = LR * (step + 1) / (WARMUP + 1) if step < WARMUP else FINAL_LR + cosine * (LR - FINAL_LR)
        starts = torch.randint(len(text) - T, (BATCH,)).tolist()
        x = torch.stack([text[start : start + T] for start in starts])
        y = torch.stack([text[start + 1 : start + T + 1] for start in starts])
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model, time.perf_counter() - started


def plain_run(folder: str, seed: int) -> None:
    """Train the plain loop on the ids of a folder, and print its loss and seconds as JSON."""
    ids = {split: np.load(Path(folder) / f"{split}.npy") for split in ("train", "held_out")}
    # Numbered without gaps, as nanoGPT numbers the characters of a text: our ids have places for all bytes, which would cost it time.
    dense = np.unique(np.concatenate(list(ids.values())), return_inverse=True)[1]
    train, held_out = np.split(dense, [len(ids["train"])])
    model, seconds = train_plainly(train, int(dense.max()) + 1, seed)
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"loss": held_out_loss(model, held_out), "seconds": seconds, "parameters": parameters}))


def _settings(folder: Path, seed: int) -> list[str]:
    places = [f"data.paths=[{folder / 'text.txt'}]", f"data.cache_dir={folder / 'cache'}", f"run.dir={folder / 'runs'}"]
    return ["experiment=char_fast", "device=cpu", *places, f"seed={seed}", f"run.id=seed-{seed}"]


def _ids(split: Split) -> np.ndarray:
    return np.concatenate([np.asarray(shard) for shard in split.tokens.shards])


def _run(command: list[str]) -> tuple[str, float]:
    """What a process printed, and the seconds from its start to its end."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return done.stdout, time.perf_counter() - started


def time_to_quality() -> None:
    """In turn, for each seed: the plain loop and `experiment=char_fast`. The target is the lowest loss of the plain loop's seeds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text(standard_library_text(), encoding="utf-8")
        config = compose_run("pretrain", _settings(folder, 0))
        part = prepare_corpus(config.data, config.tokenizer, T, lambda text: None).parts[0]
        for split, ids in (("train", _ids(part.train)), ("held_out", _ids(part.held_out))):
            np.save(folder / f"{split}.npy", ids)
        print(f"\n### time to quality, {torch.get_num_threads()} threads; loss in nats per character of held-out text, in windows of {T}\n")
        print("| seed | plain loop: loss | its loop, s | its process, s | ours: loss | its loop, s | its process, s | times faster |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        plain, ours = [], []
        for seed in SEEDS:
            printed, whole = _run([str(Path(__file__).resolve()), str(folder), str(seed)])
            plain.append({**json.loads(printed), "whole": whole})
            _, whole = _run(["-m", "gpt", "pretrain", *_settings(folder, seed)])
            ours.append({**_result(folder / "runs" / f"seed-{seed}", _ids(part.held_out)), "whole": whole})
            pair = plain[-1], ours[-1]
            cells = [f"{run[key]:.{digits}f}" for run in pair for key, digits in (("loss", 4), ("seconds", 1), ("whole", 1))]
            print(f"| {seed} | {' | '.join(cells)} | {pair[0]['seconds'] / pair[1]['seconds']:.1f} |", flush=True)
    target = min(run["loss"] for run in plain)
    ratios = {key: statistics.median(a[key] / b[key] for a, b in zip(plain, ours, strict=True)) for key in ("seconds", "whole")}
    worst = max(run["loss"] for run in ours)
    print(f"\nparameters: plain {plain[0]['parameters']:,}, ours {ours[0]['parameters']:,}")
    print(f"target: {target:.4f}, the best of the plain loop; worst of ours: {worst:.4f}{'' if worst <= target else ', NOT REACHED'}")
    print(f"faster, median: {ratios['seconds']:.1f} times in the loop, {ratios['whole']:.1f} from the start of the process to its end")


def _result(run: Path, held_out: np.ndarray) -> dict[str, float]:
    """The loss of the exported model in fp32; the seconds of the loop are the trainer's own, without the validation at the end."""
    model = GPT.from_pretrained(run / "model", dtype=torch.float32)
    seconds = max(line["seconds"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line)
    return {"loss": held_out_loss(model, held_out), "seconds": seconds, "parameters": model.num_parameters()}


if __name__ == "__main__":
    if len(sys.argv) == 3:
        plain_run(sys.argv[1], int(sys.argv[2]))
    else:
        time_to_quality()
