"""Measurements of reading, writing and loading, beside `transformers` on the same weights: part of `make bench`."""

from __future__ import annotations

import functools
import json
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
# What one token must read at least: every number of the blocks and of the head once, not the embeddings, not the cache.
READ = 12 * 12 * 768 * 768 + 50257 * 768

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


def _in_processes(task: str, processes: int, *arguments: str) -> list[dict[str, Rates]]:
    """What `_<task>` prints in each of several processes: how fast memory is, and all that depends on it, is settled as one starts."""
    found = []
    for _ in range(processes):
        done = subprocess.run([sys.executable, __file__, task, *arguments], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def _bandwidth(size: int) -> float:
    """Bytes a second at which this machine reads a buffer of that size, the best of several readings: a sum over fp32."""
    buffer = torch.ones(size // 4)
    took = []
    for _ in range(12):
        started = time.perf_counter()
        buffer.sum()
        took.append(time.perf_counter() - started)
    return size / min(took)


def decode() -> None:
    """Tokens a second after the first one, GPT-2 124M with random weights, beside transformers.generate."""
    with tempfile.TemporaryDirectory() as folder:
        _save_gpt2(Path(folder))
        for dtype in (torch.bfloat16, torch.float32):
            processes = _in_processes("_decode_once", 5, folder, str(dtype)[6:])
            for batch in BATCHES:
                print(f"\n### decode, GPT-2 124M, {str(dtype)[6:]}, batch {batch}, {PROMPT} + {NEW} tokens\n")
                print("| | tokens/s | relative | in each process | share of the bandwidth |\n| --- | ---: | ---: | --- | ---: |")
                for who in ("transformers.generate", "ours", "ours, int8"):
                    key = f"{who} {batch}"
                    ratios = sorted(p[f"transformers.generate {batch}"][1] / p[key][1] for p in processes)
                    rate = statistics.median(batch / p[key][1] for p in processes)
                    size = READ * (1 if "int8" in who else dtype.itemsize)
                    share = statistics.median(size / p[key][1] / p["bandwidth"][1] for p in processes)
                    each = " ".join(f"{ratio:.2f}" for ratio in ratios)
                    shown = f"{share:.0%}" if batch == 1 else ""
                    print(f"| {who} | {rate:,.0f} | {statistics.median(ratios):.2f} | {each} | {shown} |")
            rates = " ".join(f"{p['bandwidth'][1] / 1e9:.0f}" for p in processes)
            print(f"\nbandwidth, the best of 12 sums over {READ * dtype.itemsize / 1e6:.0f} MB in each process: {rates} GB/s")


def _decode_once(folder: str, dtype_name: str) -> dict[str, Rates]:
    dtype = getattr(torch, dtype_name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    found: dict[str, Rates] = {}
    for batch in BATCHES:
        models = {"ours": GPT.from_pretrained(folder, dtype=dtype), "ours, int8": GPT.from_pretrained(folder, dtype=dtype)}
        quantize_int8(models["ours, int8"])
        for model in models.values():
            pack_for_inference(model, batch)
        candidates: dict[str, Callable[[], Rates]] = {f"transformers.generate {batch}": functools.partial(_theirs, theirs, batch)}
        candidates |= {f"{name} {batch}": functools.partial(_ours, model, batch) for name, model in models.items()}
        found |= _in_turn(candidates, runs=3)
    return found | {"bandwidth": (0.0, _bandwidth(READ * dtype.itemsize))}


def cache() -> None:
    """Attention of one query over a key/value cache, 12 heads of 64, in each dtype."""
    print("\n### attention of one query over a cache, 12 heads of 64, microseconds\n")
    print("| | bf16 | fp32 |\n| --- | ---: | ---: |")
    for batch, length in ((1, 128), (1, 512), (1, 1024), (16, 128)):
        took: dict[torch.dtype, list[float]] = {torch.bfloat16: [], torch.float32: []}
        for _ in range(60):
            for dtype, times in took.items():
                keys = torch.randn(batch, 12, 1024, 64).to(dtype)[:, :, :length]
                query = torch.randn(batch, 12, 1, 64).to(dtype)
                started = time.perf_counter()
                torch.nn.functional.scaled_dot_product_attention(query, keys, keys)
                times.append(time.perf_counter() - started)
        medians = " | ".join(f"{statistics.median(times) * 1e6:,.0f}" for times in took.values())
        print(f"| batch {batch}, {length} tokens | {medians} |")


def first_token() -> None:
    """Seconds until the first token of a 512-token prompt."""
    with tempfile.TemporaryDirectory() as folder:
        _save_gpt2(Path(folder))
        for dtype in (torch.bfloat16, torch.float32):
            processes = _in_processes("_first_token_once", 5, folder, str(dtype)[6:])
            print(f"\n### first token of a 512-token prompt, GPT-2 124M, {str(dtype)[6:]}\n")
            print("| | ms | relative |\n| --- | ---: | ---: |")
            for who in ("transformers.generate", "ours"):
                seconds = statistics.median(p[who][0] for p in processes)
                relative = statistics.median(p[who][0] / p["transformers.generate"][0] for p in processes)
                print(f"| {who} | {seconds * 1e3:,.0f} | {relative:.2f} |")


def _first_token_once(folder: str, dtype_name: str) -> dict[str, Rates]:
    dtype = getattr(torch, dtype_name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ours = GPT.from_pretrained(folder, dtype=dtype)
    pack_for_inference(ours)
    return _in_turn({"transformers.generate": lambda: _theirs(theirs, 1, 512, 2), "ours": lambda: _ours(ours, 1, 512, 2)}, runs=5)


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


SHAPES_1_5B = {
    "GPT-2 XL's shape": GPTConfig(vocab_size=50257, context_length=1024, n_layer=48, n_head=25, d_model=1600),
    "Qwen2.5 1.5B's shape": GPTConfig(
        vocab_size=151936, context_length=4096, n_layer=28, n_head=12, n_kv_head=2, d_model=1536, d_ff=8960, positions="rotary",
        norm="rmsnorm", activation="swiglu", bias=False, qkv_bias=True,
    ),
}  # fmt: skip


def load() -> None:
    """Time and peak memory to load a checkpoint of 1.5B parameters in bf16, and to read eight tokens with it."""
    for name, shape in SHAPES_1_5B.items():
        with tempfile.TemporaryDirectory() as folder:
            model = GPT.materialise(shape, dtype=torch.bfloat16)
            for p in model.parameters():
                torch.nn.init.normal_(p, std=0.02)
            model.save_pretrained(folder)
            size = sum(p.numel() * p.itemsize for p in model.parameters())
            del model
            found: dict[str, list[list[float]]] = {name: [] for name in _LOADERS}
            for number in range(6):
                for who, how in _LOADERS.items():
                    command = [sys.executable, "-c", _LOAD.format(how=how), folder]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    if number:
                        found[who].append([float(figure) for figure in done.stdout.split()])
            print(f"\n### loading {name}, {size / 2**20:,.0f} MiB in bf16, the file in the page cache\n")
            print("| | seconds to load | ... and to read 8 tokens | peak memory above the imports, MiB |\n| --- | ---: | ---: | ---: |")
            for who, runs in found.items():
                loaded, read, peak = (statistics.median(column) for column in zip(*runs, strict=True))
                print(f"| {who} | {loaded:.2f} | {read:.2f} | {peak:,.0f} |")


if __name__ == "__main__":
    print(json.dumps({"_decode_once": _decode_once, "_first_token_once": _first_token_once}[sys.argv[1]](*sys.argv[2:])))
