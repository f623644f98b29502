"""What a run is to the formulas of its memory: a model, how it trains and how it is laid out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch

from gpt.config import RunConfig
from gpt.model import native_attention, native_products, native_rowwise
from gpt.model.config import GPTConfig, LoRAConfig
from gpt.model.loss import chunk_size
from gpt.runtime.device import Device
from gpt.runtime.shapes import Parameter, parameters

FLOAT = 4  # bytes; parameters, gradients and states


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
        checkpointing: none, full, every_n or selective.
        every: n of every_n.
        optimizer: muon or adamw.
        ema: whether an average of the weights is kept.
        compiled: whether blocks and loss are.
        documents: whether rows hold several documents, none of which sees another.
        plain: whether RMSNorm, dropout and attention with dropout are several operations each, as on a CPU, and keep what is between
            them, and compiled attention is our own; else they are the fused ones of a GPU.
        native_rows: whether the blocks' norms, the activations and the loss are those of `gpt.model.native_rowwise`.
        native_attention: whether attention without dropout is that of `gpt.model.native_attention`.
        native_products: whether products of whole matrices without adapters are those of `gpt.model.native_products`.
        fused_adamw: whether AdamW is one kernel; else several operations, which keep what is between them.
        chunk: tokens of which the loss holds the logits.
        lora: its adapters.
        trains: names of the parameters that train; None: all.
        beside: bytes of another model that the device holds, a teacher or a reference.
    """

    model: GPTConfig
    shards: int = 0
    replicas: int = 1
    tensor: int = 1
    length: int = 1024
    micro_batch: int = 1
    passes: int = 1
    width: int = 2
    checkpointing: Literal["none", "full", "every_n", "selective"] = "none"
    every: int = 1
    optimizer: Literal["muon", "adamw"] = "muon"
    ema: bool = False
    compiled: bool = False
    documents: bool = False
    plain: bool = False
    native_rows: bool = False
    native_attention: bool = False
    native_products: bool = False
    fused_adamw: bool = True
    chunk: int = 512
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    trains: frozenset[str] | None = None
    beside: float = 0.0

    @property
    def is_divided(self) -> bool:
        """Whether FSDP2 is at work: also for ddp with tensor parallelism, over groups of one."""
        return self.shards > 0 or self.tensor > 1

    @property
    def ranks(self) -> int:
        """All processes."""
        return max(1, self.shards) * self.replicas * self.tensor

    @property
    def tokens(self) -> int:
        """Of a pass, M."""
        return self.micro_batch * self.length

    @cached_property
    def parameters(self) -> list[Parameter]:
        """All of them, those of adapters too."""
        return parameters(self.model, self.lora)

    @property
    def depth(self) -> int:
        """Blocks at the bottom that run without gradients: nothing below, or in them, trains."""
        if self.learns("embeddings."):
            return 0
        return min((n for n in range(self.model.n_layer) if self.learns(f"blocks.{n}.")), default=self.model.n_layer)

    @property
    def layers(self) -> int:
        """Blocks that backward goes through."""
        return self.model.n_layer - self.depth

    @property
    def computed_again(self) -> int:
        """Blocks of which backward computes activations a second time."""
        every_n = sum(number % self.every == 0 for number in range(self.depth, self.model.n_layer))
        return {"none": 0, "every_n": every_n}.get(self.checkpointing, self.layers)

    def learns(self, beginning: str, end: str = "") -> bool:
        """Whether any parameter trains whose name begins, and ends, so."""
        return self.trains is None or any(name.startswith(beginning) and name.endswith(end) for name in self.trains)

    @property
    def head_learns(self) -> bool:
        """Whether the head has a gradient."""
        return self.learns("embeddings.tokens." if self.model.tie_embeddings else "head.")

    def chosen(self, blocks: bool = True, root: bool = True, matrices: bool | None = None, learning: bool = False) -> list[Parameter]:
        """Parameters: of all only the blocks' or the others; `matrices`: the blocks' alone, or all but those; only those that train."""
        return [
            p
            for p in self.parameters
            if (root if p.block is None else blocks)
            and matrices in (None, p.is_matrix)
            and (not learning or self.trains is None or p.name in self.trains)
        ]

    def elements(self, blocks: bool = True, root: bool = True, matrices: bool | None = None, learning: bool = False) -> int:
        """Elements of the chosen ones on rank 0."""
        return sum(p.local(self.tensor, max(1, self.shards)) for p in self.chosen(blocks, root, matrices, learning))

    def gathered(self, blocks: bool, learning: bool = False) -> int:
        """Elements of the blocks, or of the others, as FSDP gathers them; or of those that train."""
        shards = max(1, self.shards)
        return sum(p.local(self.tensor, shards) * shards for p in self.chosen(blocks, not blocks, None, learning) if not p.is_norm)


def case_of(config: RunConfig, ranks: int, micro_batch: int, device: Device, compiled: bool, trains: frozenset[str] | None = None) -> Case:
    """The case that a run is, without another model beside it.

    Args:
        config: the run. A vocabulary that is not known yet is as large as the tokenizer's is to be.
        ranks: processes, one per device.
        micro_batch: sequences of a pass; what one rank has of a batch, if that is less.
        device: of each rank.
        compiled: whether blocks and loss are.
        trains: names of the parameters that train; None: all.
    """
    p, train = config.parallel, config.train
    model = replace(config.model, vocab_size=config.model.vocab_size or config.tokenizer.vocab_size)
    data = max(1, ranks // p.tensor)
    is_sharded = p.name == "fsdp" and ranks > 1
    mine = max(1, train.batch_tokens // config.sequence_length // data)
    size = min(micro_batch, mine)
    return Case(
        model, data // p.replicate if is_sharded else 0, p.replicate if is_sharded else data, p.tensor if ranks > 1 else 1,
        config.sequence_length, size, -(-mine // size), device.dtype.itemsize, train.activation_checkpointing,
        train.activation_checkpointing_n, config.optimizer.name, bool(train.ema), compiled, config.on_examples or config.data.document_mask,
        device.is_host, *native_parts(device, model), device.fused_adamw,
        chunk_size(device.type, model.outputs, size * config.sequence_length), config.lora, trains,
    )  # fmt: skip


def native_parts(device: Device, model: GPTConfig) -> tuple[bool, bool, bool]:
    """`native_rows`, `native_attention` and `native_products` of a case on this device; where its products are in bf16, the libraries are
    built for it."""
    if not device.is_host or device.dtype != torch.bfloat16:
        return False, False, False
    fits = all(width % 16 == 0 for width in (model.d_model, model.d_ff, model.n_head * model.head_dim, model.n_kv_head * model.head_dim))
    return native_rowwise.is_native(), native_attention.is_native(model.head_dim), fits and native_products.is_native()
