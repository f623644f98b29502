"""What a model needs of each device that it is spread over: memory and communication, by formulas.

`python scripts/scaling.py` prints the tables of docs/scaling.md, which explains the formulas; with `--check` small models train in one, two
and four processes on this machine's CPU, and what they keep and send is printed beside the formulas (`scripts/scaling_check.py`).
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from gpt.compose import compose_run
from gpt.model.config import GPTConfig
from gpt.model.loss import chunk_size
from gpt.runtime.case import FLOAT, Case
from gpt.runtime.memory import ROOM, accumulated, cast_weights, peak, states
from gpt.runtime.shapes import parameters

ROOT = Path(__file__).resolve().parent.parent


def snapshot(case: Case) -> float:
    """Bytes of host memory that a checkpoint takes of rank 0, whatever the layout."""
    return sum(states(replace(case, shards=0, replicas=1, tensor=1)).values())


def ring(ranks: int, size: float) -> float:
    """Bytes that each rank sends so that all get `size` bytes, of which each has a part; a reduce-scatter is the same backwards."""
    return (ranks - 1) / ranks * size


def traffic(case: Case, all_to_all: bool = True) -> dict[str, float]:
    """Bytes that a rank sends in a step, by what for.

    Args:
        case: what trains.
        all_to_all: whether the backend has it; gloo has not, and DTensor gathers instead.
    """
    S, R, t, L = max(1, case.shards), case.replicas, case.tensor, case.model.n_layer
    blocks, root = case.gathered(blocks=True), case.gathered(blocks=False)
    learning = case.gathered(blocks=True, learning=True) + case.gathered(blocks=False, learning=True)
    norms = sum(p.local(t) for p in case.chosen(learning=True) if p.is_norm)
    result = {"parameters": 0.0, "gradients": 0.0, "activations": 0.0, "muon": 0.0}
    backward = min(L, case.layers + 1) if case.layers else 0  # the block below is gathered ahead, whether or not it is needed
    result["parameters"] = case.passes * ring(S, case.width * blocks * (1 + backward / L) + FLOAT * root)
    if case.is_divided:
        result["gradients"] = case.passes * ring(S, FLOAT * learning) + 2 * ring(R, FLOAT * learning / S)
        result["gradients"] += 2 * ring(S * R, FLOAT * norms)
    else:
        result["gradients"] = 2 * ring(R, FLOAT * case.elements(learning=True))
    if case.model.qk_norm:  # each rank's heads have a part of the gradients of the norms that they share
        result["gradients"] += 2 * ring(t, FLOAT * 2 * L * case.model.head_dim)
    # Products whose input's gradient is summed, each by itself, in the dtype in which the norm hands it to them.
    inputs = (5 if case.model.activation == "swiglu" else 4) * (case.width if case.native_rows else FLOAT)
    products = case.micro_batch * case.length * case.model.d_model * (2 * case.width + inputs)
    result["activations"] = case.passes * L * 2 * ring(t, products)
    if case.optimizer == "muon":
        whole = case.width * sum(math.prod(p.shape) for p in case.chosen(matrices=True, learning=True))
        there = ring(S, whole / (t * (1 if not all_to_all else S))) + ring(t, whole / (S * (1 if not all_to_all else t)))
        back = ring(S, whole / (t * R * (1 if not all_to_all else S))) + ring(t, whole / (S * R * (1 if not all_to_all else t)))
        result["muon"] = there + back + ring(R, whole / (S * t))
    return result


# The document's tables


@dataclass(frozen=True)
class Machine:
    """Ranks that are joined by one kind of link; from data sheets, see docs/scaling.md.

    Attributes:
        name: for people.
        ranks: how many.
        memory: bytes of a rank.
        flops: of a rank, dense bf16, a second.
        link: bytes a second that a rank can send.
        device: torch's type.
        fused_adamw: whether it has AdamW as one kernel.
    """

    name: str
    ranks: int
    memory: float
    flops: float
    link: float
    device: str = "cuda"
    fused_adamw: bool = True


H100, H200 = (Machine(f"8 {name}", 8, size, 989e12, 450e9) for name, size in (("H100", 80e9), ("H200", 141e9)))
TRAINIUM2 = Machine("64 Trainium2", 64, 24 * 2**30, 166.75e12, 1024e9 / 4 / 2, "neuron", fused_adamw=False)
MFU = 0.4  # share of the peak that is assumed; not measured


def llama_8b(length: int) -> GPTConfig:
    """Llama 3 8B's shape (Llama Team, "The Llama 3 Herd of Models", 2024, table 3; its published config)."""
    return GPTConfig(
        128256, length, n_layer=32, n_head=32, n_kv_head=8, d_model=4096, d_ff=14336, positions="rotary", rope_theta=500000.0,
        norm="rmsnorm", activation="swiglu", bias=False, tie_embeddings=False,
    )  # fmt: skip


def gpt2_xl() -> GPTConfig:
    """The preset model=gpt2-xl."""
    return compose_run("pretrain", ["model=gpt2-xl"]).model


def flops_per_token(c: GPTConfig) -> float:
    """As `GPT.flops_per_token`, without building it."""
    matrices = sum(math.prod(p.shape) for p in parameters(c) if p.is_matrix)
    return 6 * (matrices + c.vocab_size * c.d_model) + 12 * c.n_layer * c.n_head * c.head_dim * c.context_length


def layouts(c: GPTConfig, machine: Machine, sequences: int, micro_batch: int) -> dict[str, Case]:
    """What one would try on a machine; `sequences` make a batch."""
    n = machine.ranks
    divided = 4 if n == 8 else 16
    plans = {"ddp": (0, n, 1), "fsdp": (n, 1, 1), f"hybrid, replicate {n // divided}": (divided, n // divided, 1)}
    for t in (2, 8):
        if c.n_kv_head % t == 0:
            plans |= {f"fsdp, tensor {t}": (n // t, 1, t)}
    found = {}
    for name, (shards, replicas, tensor) in plans.items():
        mine = sequences // (n // tensor)
        size = min(micro_batch, mine)
        case = Case(c, shards, replicas, tensor, c.context_length, size, mine // size)
        chunk = chunk_size(machine.device, c.vocab_size, case.tokens)
        found[name] = replace(case, chunk=chunk, fused_adamw=machine.fused_adamw)
    return found


def row(*cells: object) -> str:
    """A line of a table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def gigabytes(size: float) -> str:
    """In 1e9 bytes."""
    return f"{size / 1e9:.1f}" if size else "-"


def tables() -> None:
    """Print the tables of docs/scaling.md."""
    models = {"GPT-2 XL": (gpt2_xl(), 512, 8), "Llama 8B": (llama_8b(8192), 128, 1)}
    print(row("GB", "parameters", "of which Muon's", "Muon + AdamW", "AdamW alone", "average", "host snapshot", "TFLOP a token"))
    print(row("---", *["---:"] * 7))
    for name, (c, _, _) in models.items():
        case = Case(c, ema=True)
        count = f"{case.elements() / 1e9:.3f}e9", f"{case.elements(matrices=True) / 1e9:.3f}e9"
        sizes = states(case)["optimizer"], states(replace(case, optimizer="adamw"))["optimizer"], states(case)["average"], snapshot(case)
        print(row(name, *count, *map(gigabytes, sizes), f"{flops_per_token(c) / 1e12:.4f}"))
    for name, (c, sequences, micro_batch) in models.items():
        print(f"\n### {name}: {sequences} sequences of {c.context_length}, {sequences * c.context_length:,} tokens a step\n")
        print(
            row(
                "GB a rank",
                "passes",
                "states",
                "gradients",
                "casts",
                "peak: none",
                "selective",
                "full",
                "fits, with checkpointing",
            )
        )
        print(row("---", *["---:"] * 7, "---"))
        for machine in (H100, TRAINIUM2):
            for layout, case in layouts(c, machine, sequences, micro_batch).items():
                kinds = {kind: replace(case, checkpointing=kind) for kind in ("none", "selective", "full")}
                most = {kind: peak(it) for kind, it in kinds.items()}
                rooms = {"": machine.memory} | ({"on H200 ": H200.memory} if machine is H100 else {})
                fits = {where: next((kind for kind in kinds if most[kind] < ROOM * size), "no") for where, size in rooms.items()}
                sizes = sum(states(case).values()), accumulated(case), cast_weights(case), *most.values()
                print(
                    row(
                        f"{machine.name}: {layout}",
                        f"{case.passes} x {case.micro_batch}",
                        *map(gigabytes, sizes),
                        ", ".join(w + f for w, f in fits.items()),
                    )
                )
        print(
            "\n" + row("GB sent by a rank a step", "parameters", "gradients", "activations", "Muon", "all", "s on the link", "s of compute")
        )
        print(row("---", *["---:"] * 7))
        for machine in (H100, TRAINIUM2):
            for layout, case in layouts(c, machine, sequences, micro_batch).items():
                sent = traffic(case)
                seconds = sequences * c.context_length * flops_per_token(c) / machine.ranks / (machine.flops * MFU)
                total = sum(sent.values())
                print(
                    row(
                        f"{machine.name}: {layout}",
                        *map(gigabytes, (*sent.values(), total)),
                        f"{total / machine.link:.2f}",
                        f"{seconds:.2f}",
                    )
                )


def main() -> None:
    """Print the tables, or measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="measure small runs beside the formulas")
    if parser.parse_args().check:
        sys.exit(subprocess.run([sys.executable, "-m", "scripts.scaling_check"], cwd=ROOT, check=False).returncode)
    tables()


if __name__ == "__main__":
    main()
