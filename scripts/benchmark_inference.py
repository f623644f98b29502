"""Measurements of reading, writing and loading, beside `transformers` on the same weights: part of `make bench`."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from gpt.inference.decode import Speed, generate_tokens
from gpt.inference.packing import pack_for_inference
from gpt.inference.quantize import quantize_int8
from gpt.inference.sampling import Sampling
from gpt.model.config import GPTConfig
from gpt.model.transformer import GPT

GPT2 = GPTConfig(vocab_size=50257, context_length=1024, n_layer=12, n_head=12, d_model=768)
PROMPT, NEW = 32, 64
GREEDY = Sampling(temperature=0)
BATCHES = (1, 16)

Rates = tuple[float, float]  # seconds until the first token, seconds per step after it


def _save_gpt2(folder: Path) -> None:
    torch.manual_seed(0)
    GPT(GPT2).save_pretrained(folder)


def _ours(model: GPT, batch: int, prompt: int = PROMPT, new: int = NEW) -> Rates:
    speed = Speed()
    prompts = torch.randint(50257, (batch, prompt), generator=torch.Generator().manual_seed(1)).tolist()
    for _ in generate_tokens(model, prompts, new, GREEDY, speed=speed):
        pass
    return speed.prompt_seconds, speed.seconds / max(1, new - 1)


@torch.no_grad()
def _theirs(model: transformers.PreTrainedModel, batch: int, prompt: int = PROMPT, new: int = NEW) -> Rates:
    tokens = torch.randint(50257, (batch, prompt), generator=torch.Generator().manual_seed(1))
    took = []
    for length in (1, new):
        started = time.perf_counter()
        model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=length, min_new_tokens=length, do_sample=False)  # pyright: ignore[reportCallIssue]
        took.append(time.perf_counter() - started)
    return took[0], (took[1] - took[0]) / max(1, new - 1)


def _in_turn(candidates: dict[str, Callable[[], Rates]], runs: int) -> dict[str, Rates]:
    """Name -> medians, after a warm-up run of each."""
    found: dict[str, list[Rates]] = {name: [] for name in candidates}
    for number in range(runs + 1):
        for name, run in candidates.items():
            rates = run()
            if number:
                found[name].append(rates)
    return {name: (statistics.median(r[0] for r in rates), statistics.median(r[1] for r in rates)) for name, rates in found.items()}


def _bandwidth(size: int) -> float:
    """Bytes a second at which this machine reads a buffer of that size, the best of several readings: a sum over fp32."""
    buffer = torch.ones(size // 4)
    took = []
    for _ in range(12):
        started = time.perf_counter()
        buffer.sum()
        took.append(time.perf_counter() - started)
    return size / min(took)


def _bytes_per_token(model: torch.nn.Module, itemsize: float) -> int:
    """What one token must read at least: every matrix of the blocks and the head once (not the embeddings, not the cache)."""
    blocks = sum(p.numel() for name, p in model.named_parameters() if "blocks" in name)
    return int((blocks + GPT2.vocab_size * GPT2.d_model) * itemsize)


def decode() -> None:
    """Tokens a second after the first one, GPT-2 124M with random weights, beside transformers.generate."""
    with tempfile.TemporaryDirectory() as folder:
        _save_gpt2(Path(folder))
        for dtype in (torch.bfloat16, torch.float32):
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            read = _bytes_per_token(GPT(GPT2), dtype.itemsize)
            models = {"ours": GPT.from_pretrained(folder, dtype=dtype), "ours, int8": GPT.from_pretrained(folder, dtype=dtype)}
            quantize_int8(models["ours, int8"])
            for model in models.values():
                pack_for_inference(model)
            for batch in BATCHES:
                candidates = {"transformers.generate": lambda: _theirs(theirs, batch)}  # noqa: B023
                candidates |= {name: lambda model=model: _ours(model, batch) for name, model in models.items()}  # noqa: B023
                rates = _in_turn(candidates, runs=7)
                name = str(dtype).removeprefix("torch.")
                print(f"\n### decode, GPT-2 124M, {name}, batch {batch}, {PROMPT} + {NEW} tokens\n")
                print("| | tokens/s | relative | share of the memory's bandwidth |\n| --- | ---: | ---: | ---: |")
                bandwidth = _bandwidth(read)
                for who, (_, seconds) in rates.items():
                    size = read / dtype.itemsize if "int8" in who else read
                    share = f"{size / seconds / bandwidth:.0%}" if batch == 1 else ""
                    print(f"| {who} | {batch / seconds:,.1f} | {rates['transformers.generate'][1] / seconds:.2f} | {share} |")
                print(f"\nbandwidth, the best of 12 sums over {read / 1e6:.0f} MB: {bandwidth / 1e9:.1f} GB/s")


def first_token() -> None:
    """Seconds until the first token of a 512-token prompt."""
    with tempfile.TemporaryDirectory() as folder:
        _save_gpt2(Path(folder))
        for dtype in (torch.bfloat16, torch.float32):
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            ours = GPT.from_pretrained(folder, dtype=dtype)
            pack_for_inference(ours)
            rates = _in_turn({"transformers.generate": lambda: _theirs(theirs, 1, 512, 2), "ours": lambda: _ours(ours, 1, 512, 2)}, runs=9)  # noqa: B023
            print(f"\n### first token of a 512-token prompt, GPT-2 124M, {str(dtype).removeprefix('torch.')}\n")
            print("| | ms | relative |\n| --- | ---: | ---: |")
            for who, (seconds, _) in rates.items():
                print(f"| {who} | {seconds * 1e3:,.0f} | {seconds / rates['transformers.generate'][0]:.2f} |")


_LOADERS = {
    "transformers": "import transformers; load = lambda: transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)",
    "ours": "from gpt import GPT; load = lambda: GPT.from_pretrained(path, dtype=torch.bfloat16)",
}
_LOAD = """
import sys, time, torch
path, tokens = sys.argv[1], torch.arange(8)[None]
{how}
getattr(transformers, "AutoModelForCausalLM") if "transformers" in dir() else None
level = lambda key: int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) / 1024
before, started = level("VmRSS"), time.perf_counter()
model = load()
loaded = time.perf_counter() - started
with torch.no_grad():
    model(tokens)
print(loaded, time.perf_counter() - started, level("VmHWM") - before)
"""


def load() -> None:
    """Time and peak memory to load a checkpoint of 1.5B parameters (GPT-2 XL's shape, bf16) and to read eight tokens with it."""
    with tempfile.TemporaryDirectory() as folder:
        shape = GPTConfig(vocab_size=50257, context_length=1024, n_layer=48, n_head=25, d_model=1600)
        model = GPT.materialise(shape, dtype=torch.bfloat16)
        torch.manual_seed(0)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.02)
        model.save_pretrained(folder)
        size = sum(p.numel() * p.itemsize for p in model.parameters())
        del model
        found: dict[str, list[list[float]]] = {name: [] for name in _LOADERS}
        for number in range(6):
            for name, how in _LOADERS.items():
                done = subprocess.run(
                    [sys.executable, "-c", _LOAD.format(how=how), folder], capture_output=True, text=True, check=True, env={**os.environ}
                )
                if number:
                    found[name].append([float(figure) for figure in done.stdout.split()])
        print(f"\n### loading 1.5B parameters in bf16 ({size / 2**20:,.0f} MiB), the file in the page cache\n")
        print("| | seconds to load | ... and to read 8 tokens | peak memory above the imports, MiB |\n| --- | ---: | ---: | ---: |")
        for name, runs in found.items():
            loaded, read, peak = (statistics.median(column) for column in zip(*runs, strict=True))
            print(f"| {name} | {loaded:.2f} | {read:.2f} | {peak:,.0f} |")
