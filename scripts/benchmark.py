"""The measurements behind benchmarks/RESULTS.md: `make bench`, or `make bench ARGS="loss attention"` for some of them.

What is compared runs in turn, A B A B, in one process, and medians are given, so that a machine whose speed drifts does not
favour either. Run it on a quiet machine.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from baseline_classification import classification
from benchmark_checkpoint import checkpoints
from benchmark_data import batches, encoding
from benchmark_freezing import freezing
from benchmark_inference import cache, decode, first_token, load
from benchmark_preparation import preparation
from benchmark_quality import time_to_quality
from benchmark_training import trainer_overhead, training
from torch import Tensor

from gpt.compose import compose_run
from gpt.config import DeviceConfig
from gpt.model import native_attention, native_products, native_rowwise
from gpt.model.attention import blockwise_causal_attention
from gpt.model.kernels import kernels_of, without_native
from gpt.model.loss import LinearCrossEntropy
from gpt.model.transformer import GPT
from gpt.runtime.compiling import compile_model
from gpt.runtime.device import find_device
from gpt.training.optimizer import build_optimizers

DEVICE = find_device(DeviceConfig())


def in_turn(candidates: dict[str, Callable[[], object]], runs: int = 9) -> dict[str, float]:
    """Name -> median seconds, after two warm-up runs of each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(runs + 2):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            DEVICE.synchronize()
            if number >= 2:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(t) for name, t in times.items()}


def table(title: str, rows: dict[str, float], scale: float = 1e3, unit: str = "ms") -> None:
    """Print a Markdown table, each row relative to the first."""
    print(f"\n### {title}\n\n| | {unit} | relative |\n| --- | ---: | ---: |")
    first = next(iter(rows.values()))
    for name, value in rows.items():
        print(f"| {name} | {value * scale:,.1f} | {value / first:.2f} |")


def attention() -> None:
    """Forward and backward of causal attention in the default model's shape."""
    for B, T, H, D in ((16, 256, 3, 64), (8, 512, 3, 64), (4, 1024, 3, 64)):
        table(f"attention, B {B}, T {T}, {H} heads of {D}, forward + backward", in_turn(_attentions(B, T, H, D)))


def _attentions(B: int, T: int, H: int, D: int) -> dict[str, Callable[[], object]]:
    q, k, v = (torch.randn(B, T, H, D, device=DEVICE.type, dtype=DEVICE.dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    gradient = torch.randn(B, H, T, D, device=DEVICE.type, dtype=DEVICE.dtype)
    compiled = torch.compile(blockwise_causal_attention, dynamic=False)
    found: dict[str, Callable[[], object]] = {}
    if kernels_of(DEVICE.type).native and native_attention.is_native(D):
        found["C++"] = lambda: native_attention.native_causal_attention(q, k, v).backward(gradient)
    found["scaled_dot_product_attention"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(gradient)
    found["products of blocks of queries around softmaxes"] = lambda: blockwise_causal_attention(q, k, v).backward(gradient)
    found["the same, compiled"] = lambda: compiled(q, k, v).backward(gradient)
    return found


def products() -> None:
    """Forward and backward of linear layers with a bias in the shapes of a block of GPT-2's shape, with fp32 weights: ours, and torch's."""
    for inputs, outputs in ((384, 384), (384, 1536), (1536, 384)):
        rows = in_turn(_products(4096, inputs, outputs))
        table(f"linear, 4,096 x {inputs} -> {outputs}, forward + backward", rows)
        for name, seconds in rows.items():
            print(f"- {name}: {6 * 4096 * inputs * outputs / seconds / 1e9:,.0f} GFLOP/s")


def _products(N: int, inputs: int, outputs: int) -> dict[str, Callable[[], object]]:
    layer = native_products.Linear(inputs, outputs).to(DEVICE.type)
    x = torch.randn(N, inputs, device=DEVICE.type, dtype=DEVICE.dtype, requires_grad=True)
    gradient = torch.randn(N, outputs, device=DEVICE.type, dtype=DEVICE.dtype)

    def ours() -> None:
        with DEVICE.autocast():
            y = layer(x)
        torch.autograd.grad(y, [x, *layer.parameters()], gradient)

    def plain() -> None:
        with without_native():
            ours()

    return {"C++": ours, "torch": plain} if native_products.is_native() else {"torch": plain}


def between_products() -> None:
    """Forward and backward of what lies between products in a block of GPT-2's shape: ours in C++, and torch's, compiled and not."""
    for name, candidates in _between_products(4096, 384, 1536).items():
        table(f"{name}, forward + backward", in_turn(candidates))


def _between_products(N: int, E: int, hidden: int) -> dict[str, dict[str, Callable[[], object]]]:
    x, gate, up = (torch.randn(N, width, device=DEVICE.type, requires_grad=True) for width in (E, hidden, hidden))
    gate, up = (t.detach().to(DEVICE.dtype).requires_grad_() for t in (gate, up))
    weight, bias = (torch.rand(E, device=DEVICE.type, requires_grad=True) for _ in range(2))
    gradients = {width: torch.randn(N, width, device=DEVICE.type, dtype=DEVICE.dtype) for width in (E, hidden)}

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias).to(DEVICE.dtype)

    kinds: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = {
        f"LayerNorm of {E}": (partial(native_rowwise.native_norm, eps=1e-5, centred=True), layer_norm, (x, weight, bias)),
        f"GELU of {hidden}": (native_rowwise.native_gelu, partial(F.gelu, approximate="tanh"), (gate,)),
        f"SwiGLU of {hidden}": (native_rowwise.native_swiglu, lambda gate, up: F.silu(gate) * up, (gate, up)),
    }
    found: dict[str, dict[str, Callable[[], object]]] = {}
    for name, (native, plain, inputs) in kinds.items():
        functions = {"torch, compiled": torch.compile(plain, dynamic=False), "torch": plain}
        if native_rowwise.suits_products(gate):
            functions = {"C++": native, **functions}
        found[name] = {k: partial(lambda f, t: f(*t).backward(gradients[t[0].shape[1]]), f, inputs) for k, f in functions.items()}
    return found


def loss() -> None:
    """Forward and backward of the loss."""
    for N, E, V in ((4096, 192, 2048), (4096, 384, 8192)):
        table(f"loss, N {N}, d {E}, V {V}, forward + backward", in_turn(_losses(N, E, V)))


def _losses(N: int, E: int, V: int) -> dict[str, Callable[[], object]]:
    hidden = torch.randn(N, E, device=DEVICE.type, requires_grad=True)
    weight = (torch.randn(V, E, device=DEVICE.type) * 0.02).requires_grad_()
    targets = torch.randint(V, (N,), device=DEVICE.type)
    ours, compiled = LinearCrossEntropy(DEVICE.dtype), LinearCrossEntropy(DEVICE.dtype)
    compiled.compile_softmax(dynamic=False)
    compiled.nll_and_gradient = compiled.softmax

    def plain() -> None:
        with DEVICE.autocast():
            logits = F.linear(hidden, weight)
        F.cross_entropy(logits.float(), targets, reduction="sum").backward()

    candidates: dict[str, Callable[[], object]] = {
        "linear, cross_entropy": plain,
        "ours": lambda: ours(hidden, weight, targets).backward(),
        "ours, softmax compiled by torch": lambda: compiled(hidden, weight, targets).backward(),
    }
    if (fused := getattr(F, "linear_cross_entropy", None)) is not None:
        low = hidden.detach().to(DEVICE.dtype).requires_grad_(), weight.detach().to(DEVICE.dtype).requires_grad_()
        candidates["torch's linear_cross_entropy"] = lambda: fused(*low, targets, reduction="sum").backward()
    return candidates


def step() -> None:
    """A training step of the default model, eager and compiled."""
    config = compose_run("pretrain", ["model.vocab_size=2048"])
    tokens = torch.randint(2048, (config.train.batch_tokens // config.model.context_length, config.model.context_length + 1))
    tokens = tokens.to(DEVICE.type)

    def make(compiled: bool) -> Callable[[], object]:
        model, loss = GPT(config.model).to(DEVICE.type), LinearCrossEntropy(DEVICE.dtype)
        model.tie()
        if compiled:
            compile_model(model, loss, DEVICE)
        optimizers = build_optimizers(config.optimizer, model, DEVICE.dtype)

        def run() -> None:
            with DEVICE.autocast():
                hidden = model.hidden_states(tokens[:, :-1])
            (loss(hidden, model.head.weight, tokens[:, 1:]) / config.train.batch_tokens).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        return run

    rows = in_turn({"compiled": make(True), "eager": make(False)}, runs=15)
    table("training step of the default model", rows)
    flops = 6 * sum(p.numel() for p in GPT(config.model).parameters()) * config.train.batch_tokens
    square = torch.randn(2048, 2048, device=DEVICE.type, dtype=DEVICE.dtype)
    rate = 2 * 2048**3 / in_turn({"product": lambda: square @ square})["product"]
    for name, seconds in rows.items():
        share = flops / seconds / rate
        print(f"- {name}: {config.train.batch_tokens / seconds:,.0f} tokens/s, {share:.0%} of the rate of a 2048^3 product")


def documents() -> None:
    """A training step of the default model on rows of several documents, masked and not."""
    config = compose_run("pretrain", ["model.vocab_size=2048"])
    B, T = config.train.batch_tokens // config.model.context_length, config.model.context_length
    tokens = torch.randint(2048, (B, T + 1)).to(DEVICE.type)
    rows = (torch.arange(T) // 64).expand(B, T).to(DEVICE.type)

    def make(masked: bool, compiled: bool) -> Callable[[], object]:
        model, loss = GPT(config.model).to(DEVICE.type), LinearCrossEntropy(DEVICE.dtype)
        model.tie()
        if compiled:
            compile_model(model, loss, DEVICE)

        def run() -> None:
            with DEVICE.autocast():
                hidden = model.hidden_states(tokens[:, :-1], documents=rows if masked else None)
            (loss(hidden, model.head.weight, tokens[:, 1:]) / config.train.batch_tokens).backward()
            model.zero_grad()

        return run

    candidates = {f"{'masked' if masked else 'not masked'}, {'compiled' if compiled else 'eager'}": make(masked, compiled)
                  for compiled in (True, False) for masked in (False, True)}  # fmt: skip
    table("forward and backward of the default model, rows of four documents", in_turn(candidates, runs=15))


def startup() -> None:
    """From the start of `gpt pretrain` to the end of its first step, with nothing cached and with everything."""
    with tempfile.TemporaryDirectory() as folder:
        settings = f"train.log_every=1 data.cache_dir={folder}/data run.dir={folder}/runs"
        environment = {**os.environ, "HOME": folder, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "PYTHONUNBUFFERED": "1"}
        for caches in ("cold", "warm"):
            started = time.perf_counter()
            command = [sys.executable, "-m", "gpt", "pretrain", *settings.split()]
            process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            if not any(line.startswith("step 1 ") for line in process.stderr or ()):
                raise SystemExit("the run ended before its first step")
            print(f"- {caches} caches: {time.perf_counter() - started:.1f} s to the first step")
            process.terminate()
            process.communicate()


BENCHMARKS = {
    "startup": startup, "attention": attention, "products": products, "between_products": between_products, "loss": loss, "step": step,
    "documents": documents,
    "encoding": encoding, "batches": batches, "preparation": preparation,
    "training": training, "trainer_overhead": trainer_overhead, "freezing": freezing, "quality": time_to_quality,
    "classification": classification,
    "checkpoints": checkpoints,
    "decode": decode, "cache": cache, "first_token": first_token, "load": load,
}  # fmt: skip


def main() -> None:
    """Run the benchmarks named on the command line, or all."""
    names = sys.argv[1:] or list(BENCHMARKS)
    if unknown := set(names) - BENCHMARKS.keys():
        raise SystemExit(f"no such benchmark: {', '.join(sorted(unknown))}; there are: {', '.join(BENCHMARKS)}")
    DEVICE.prepare_training()
    print(f"{DEVICE.description}, {DEVICE.dtype}, torch {torch.__version__}")
    for name in names:
        BENCHMARKS[name]()


if __name__ == "__main__":
    main()
