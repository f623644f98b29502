"""What a model needs of each device that it is spread over: memory and communication, by formulas.

`python scripts/scaling.py` prints the tables of docs/scaling.md, which explains the formulas; with `--check` small models train in one, two
and four processes on this machine's CPU, and what they keep and send is printed beside the formulas (`scripts/scaling_check.py`).
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from gpt.compose import compose_run
from gpt.model.config import GPTConfig

ROOT = Path(__file__).resolve().parent.parent
CHUNK = 512  # tokens of which `LinearCrossEntropy` holds the logits
FLOAT = 4  # bytes; parameters, gradients and states


@dataclass(frozen=True)
class Parameter:
    """Parameters of one shape.

    Attributes:
        shape: of each.
        count: how many of them.
        split: the dimension that tensor parallelism divides, or None.
        in_block: whether they are a block's; the others are what FSDP's root holds.
    """

    shape: tuple[int, ...]
    count: int
    split: int | None = None
    in_block: bool = True

    @property
    def is_matrix(self) -> bool:
        """Whether it is multiplied with activations under autocast, and Muon's."""
        return self.in_block and len(self.shape) == 2

    def local(self, tensor: int = 1, shards: int = 1) -> int:
        """Elements of all of them on rank 0: FSDP2 divides rows, and fills the last ranks' up to the first's."""
        shape = list(self.shape)
        if self.split is not None:
            shape[self.split] = -(-shape[self.split] // tensor)
        shape[0] = -(-shape[0] // shards)
        return math.prod(shape) * self.count


def parameters(c: GPTConfig) -> list[Parameter]:
    """All parameters of a model."""
    for is_other in (c.qk_norm, c.parallel_residual, c.dropout):
        assert not is_other, "no formulas for these"
    d, f, a, kv, L = c.d_model, c.d_ff, c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_layer
    biased_norm = c.norm == "layernorm" and c.bias
    found = [Parameter((c.vocab_size, d), 1 if c.tie_embeddings else 2, None, False)]
    found += [Parameter((c.context_length, d), 1, None, False)] if c.positions == "learned" else []
    found += [Parameter((d,), 1 + biased_norm, None, False), Parameter((d,), 2 * L * (1 + biased_norm))]
    ups = 2 if c.activation == "swiglu" else 1
    qkv = c.bias or c.qkv_bias
    for outputs, inputs, count, split, biased in (
        (a, d, 1, 0, qkv), (kv, d, 2, 0, qkv), (d, a, 1, 1, c.bias), (f, d, ups, 0, c.bias), (d, f, 1, 1, c.bias)
    ):  # fmt: skip
        found.append(Parameter((outputs, inputs), count * L, split))
        found += [Parameter((outputs,), count * L, 0 if split == 0 else None)] if biased else []
    return found


@dataclass(frozen=True)
class Case:
    """A model, how it trains and how it is laid out.

    Attributes:
        model: its shape.
        shards: ranks that FSDP divides parameters over; 0: ddp, or one process.
        replicas: groups of those that hold the same; under ddp, all that divide the batch.
        tensor: ranks that each matrix is divided over.
        length: T, tokens of a sequence.
        micro_batch: sequences of a pass.
        passes: micro-batches of a step and rank.
        width: bytes of an activation in a matrix product: 2 bf16, 4 fp32.
        checkpointing: none, full or selective.
        optimizer: muon or adamw.
        ema: whether an average of the weights is kept.
        plain_rmsnorm: whether an RMSNorm is made of several operations, as on a CPU, and keeps what is between them.
    """

    model: GPTConfig
    shards: int = 0
    replicas: int = 1
    tensor: int = 1
    length: int = 1024
    micro_batch: int = 1
    passes: int = 1
    width: int = 2
    checkpointing: str = "none"
    optimizer: str = "muon"
    ema: bool = False
    plain_rmsnorm: bool = False

    @property
    def is_divided(self) -> bool:
        """Whether FSDP2 is at work: also for ddp with tensor parallelism, over groups of one."""
        return self.shards > 0 or self.tensor > 1

    @property
    def ranks(self) -> int:
        """All processes."""
        return max(1, self.shards) * self.replicas * self.tensor

    def elements(self, whole: bool = False, blocks: bool = True, root: bool = True, matrices: bool | None = None) -> int:
        """Parameters on rank 0; `whole`: as FSDP gathers them. `matrices`: the blocks' alone, or all but those."""
        shards = max(1, self.shards)
        chosen = [p for p in parameters(self.model) if (blocks if p.in_block else root) and matrices in (None, p.is_matrix)]
        return sum(p.local(self.tensor, shards) * (shards if whole else 1) for p in chosen)


def block_activations(case: Case) -> int:
    """Bytes that a block keeps for its backward pass, without weights."""
    c, M, e, t = case.model, case.micro_batch * case.length, case.width, case.tensor
    d, f, a, kv = c.d_model, c.d_ff // t, c.n_head * c.head_dim // t, c.n_kv_head * c.head_dim // t
    is_rms, is_gated = c.norm == "rmsnorm", c.activation == "swiglu"
    norm = M * (4 * d + (4 if is_rms else 8)) + (4 * M * d if is_rms and case.plain_rmsnorm else 0)
    casts = 3 if e == 2 else 1  # autocast casts a product's input for each product by itself
    attention = casts * e * M * d + e * M * (2 * a + 2 * kv) + 4 * M * c.n_head // t
    if c.positions == "rotary" and e == 2:
        attention += 4 * e * case.length * c.rotary_dim  # cos and sin, cast for q and for k
    wide = (2 if e == 2 else 1, 4) if is_gated else (1, 2)
    return 2 * norm + attention + e * M * (wide[0] * d + wide[1] * f)


def kept_products(case: Case) -> int:
    """Bytes of a block's products and attention, which selective checkpointing keeps."""
    c, M, e, t = case.model, case.micro_batch * case.length, case.width, case.tensor
    a, kv, ups = c.n_head * c.head_dim // t, c.n_kv_head * c.head_dim // t, 2 if c.activation == "swiglu" else 1
    return e * M * (2 * a + 2 * kv + 2 * c.d_model + ups * c.d_ff // t) + 4 * M * c.n_head // t


def activations(case: Case) -> int:
    """Bytes that the blocks, the embeddings and the final norm keep for backward; with checkpointing, and one block computed again."""
    c, M = case.model, case.micro_batch * case.length
    ends = M * (4 * c.d_model + (4 if c.norm == "rmsnorm" else 8) + 8)
    ends += 4 * M * c.d_model if c.norm == "rmsnorm" and case.plain_rmsnorm else 0
    block = block_activations(case)
    if case.checkpointing == "none":
        return ends + c.n_layer * block
    kept = 4 * M * c.d_model + (kept_products(case) if case.checkpointing == "selective" else 0)
    return ends + c.n_layer * kept + block


def loss_bytes(case: Case) -> int:
    """What `LinearCrossEntropy` keeps for backward: both gradients, made in forward."""
    c = case.model
    return case.width * case.micro_batch * case.length * c.d_model + FLOAT * c.vocab_size * c.d_model


def states(case: Case) -> dict[str, float]:
    """Bytes on rank 0 that last from step to step, by what they are for."""
    local = case.elements()
    averaged_once = case.elements(matrices=True) if case.optimizer == "muon" else 0
    optimizer = FLOAT * (averaged_once + 2 * (local - averaged_once))
    return {"parameters": FLOAT * local, "optimizer": optimizer, "average": FLOAT * local if case.ema else 0}


def accumulated(case: Case) -> float:
    """Bytes of gradients on rank 0 while passes add them up: FSDP's whole ones; DDP's own, besides its buckets, which always are."""
    buckets = 0 if case.is_divided or case.replicas == 1 else FLOAT * case.elements()
    return buckets + (FLOAT * case.elements(whole=case.is_divided) if case.passes > 1 else 0)


def cast_weights(case: Case) -> float:
    """Bytes of the blocks' matrices in bf16, whole also under FSDP: backward needs them, or autocast keeps them until forward ends."""
    return case.width * case.elements(whole=True, matrices=True) if case.width == 2 else 0


def passes(case: Case, casts_stay: bool = True) -> dict[str, float]:
    """Bytes on rank 0 besides the states at the fullest moment of the passes, by what they are for.

    Args:
        case: what trains.
        casts_stay: whether casts of weights are kept, as they are; False is how it could be.
    """
    c, M = case.model, case.micro_batch * case.length
    head = c.vocab_size * c.d_model
    again = block_activations(case) if case.checkpointing != "none" else 0
    root = FLOAT * case.elements(whole=True, blocks=False) if case.is_divided else 0
    block = FLOAT * case.elements(whole=True, root=False) / c.n_layer
    gradients, casts = accumulated(case), cast_weights(case) if casts_stay else 0
    # The loss: dW, the head in bf16, a chunk's part of dW, and 23 bytes a logit, counted from the source.
    loss = loss_bytes(case) + 2 * case.width * head + 23 * min(CHUNK, M) * c.vocab_size
    forward = {"gradients": gradients, "weight casts": casts, "activations": activations(case) - again, "loss": loss}
    forward["gathered"] = root + block if case.is_divided else 0  # FSDP2 keeps what the last block was gathered in until it gathers again
    # Backward begins: dW and dW scaled; of FSDP this block, the next one and, where it is not added to others, the gradient.
    casts = casts if case.checkpointing == "none" else casts / c.n_layer
    dw = case.width * M * c.d_model + 2 * FLOAT * head
    gathered = root + (2 if case.passes > 1 else 3) * block if case.is_divided else 0
    backward = {"gradients": gradients, "weight casts": casts, "activations": activations(case), "loss": dw, "gathered": gathered}
    # And ends: all gradients, the embedding's and the head's before they are added up.
    all_of_them = max(gradients, FLOAT * case.elements())
    end = {"gradients": all_of_them, "activations": block_activations(case), "loss": 2 * FLOAT * head, "gathered": gathered}
    return max((forward, backward, end), key=lambda parts: sum(parts.values()))


def update(case: Case) -> dict[str, float]:
    """Bytes on rank 0 besides the states at the fullest moment of an update that is measured, for which the weights are copied."""
    size = FLOAT * case.elements()
    # The update is put where the gradients were; DDP's buckets stay.
    parts = {"gradients": size, "weights before": size, "muon": 0.0 if case.is_divided or case.replicas == 1 else size}
    if case.optimizer != "muon":
        return parts
    sets: dict[tuple[int | None, ...], list[int]] = defaultdict(lambda: [0, 0])  # of the same shape and layout: made orthogonal together
    for p in parameters(case.model):
        if p.is_matrix:
            found = sets[(*p.shape, p.split if case.tensor > 1 else None)]
            found[0] += p.local(case.tensor, max(1, case.shards))
            found[1] += math.prod(p.shape) * p.count
    for (rows, columns, _), (here, total) in sets.items():
        assert rows is not None
        assert columns is not None
        mine, gram = total / case.ranks, min(rows, columns) / max(rows, columns)
        copies = 3 if case.is_divided else 2  # the whole matrices, x and what follows it; then x xT and the polynomial
        orthogonal = case.width * (here + mine * (copies + 2 * gram))
        applied = here * max(3 * case.width, 2 * case.width + FLOAT)  # gradients cast, updates, those that apply, in fp32
        parts["muon"] = max(parts["muon"], orthogonal, applied)
    return parts


def peak(case: Case) -> float:
    """Bytes on rank 0, the most at any time."""
    return sum(states(case).values()) + max(sum(passes(case).values()), sum(update(case).values()))


def lean_peak(case: Case) -> float:
    """As `peak`, if gradients were sent and divided in every pass and no cast of a weight were kept."""
    lean = replace(case, passes=1)
    return sum(states(case).values()) + max(sum(passes(lean, casts_stay=False).values()), sum(update(lean).values()))


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
    blocks, root = (case.elements(whole=True, blocks=b, root=not b) * FLOAT for b in (True, False))
    result = {"parameters": 0.0, "gradients": 0.0, "activations": 0.0, "muon": 0.0}
    result["parameters"] = case.passes * ring(S, 2 * blocks + root)
    result["gradients"] = ring(S, blocks + root) + 2 * ring(R, (blocks + root) / S)
    inputs = 5 if case.model.activation == "swiglu" else 4  # products whose input's gradient is summed, each by itself and in fp32
    products = case.micro_batch * case.length * case.model.d_model * (2 * case.width + inputs * FLOAT)
    result["activations"] = case.passes * L * 2 * ring(t, products)
    if case.optimizer == "muon":
        whole = case.width * sum(math.prod(p.shape) * p.count for p in parameters(case.model) if p.is_matrix)
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
    """

    name: str
    ranks: int
    memory: float
    flops: float
    link: float


H100, H200 = (Machine(f"8 {name}", 8, size, 989e12, 450e9) for name, size in (("H100", 80e9), ("H200", 141e9)))
TRAINIUM2 = Machine("64 Trainium2", 64, 24 * 2**30, 166.75e12, 1024e9 / 4 / 2)
MFU = 0.4  # share of the peak that is assumed; not measured
ROOM = 0.9  # share of the memory that is ours; the rest is the runtime's, the collectives' and what lies in pieces


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
    matrices = sum(math.prod(p.shape) * p.count for p in parameters(c) if p.is_matrix)
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
        found[name] = Case(c, shards, replicas, tensor, c.context_length, size, mine // size)
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
                "full, lean",
                "fits, with checkpointing",
            )
        )
        print(row("---", *["---:"] * 8, "---"))
        for machine in (H100, TRAINIUM2):
            for layout, case in layouts(c, machine, sequences, micro_batch).items():
                kinds = {kind: replace(case, checkpointing=kind) for kind in ("none", "selective", "full")}
                most = {kind: peak(it) for kind, it in kinds.items()} | {"lean": lean_peak(kinds["full"])}
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
