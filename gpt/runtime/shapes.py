"""The parameters of a model by name and shape, without the model: what the formulas of `gpt.runtime.memory` add up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from gpt.model.config import GPTConfig, LoRAConfig
from gpt.model.lora import ADAPTERS


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        name: in the model.
        shape: of it.
        split: the dimension that tensor parallelism divides, or None.
    """

    name: str
    shape: tuple[int, ...]
    split: int | None = None

    @cached_property
    def block(self) -> int | None:
        """The number of its block; None: it is one of those that FSDP's root holds."""
        return int(self.name.split(".")[1]) if self.name.startswith("blocks.") else None

    @property
    def is_norm(self) -> bool:
        """Whether it is a norm's within a block, which FSDP leaves whole."""
        return self.block is not None and "norm." in self.name

    @property
    def is_adapter(self) -> bool:
        """Whether it is what LoRA adds to a matrix."""
        return self.name.endswith(ADAPTERS)

    @property
    def is_matrix(self) -> bool:
        """Whether it is multiplied with activations under autocast, and Muon's if it trains."""
        return self.block is not None and len(self.shape) == 2 and not self.is_adapter

    def local(self, tensor: int = 1, shards: int = 1) -> int:
        """Its elements on rank 0: FSDP2 divides rows, and fills the last ranks' up to the first's."""
        shards = 1 if self.is_norm else shards
        shape = list(self.shape)
        if self.split is not None:
            shape[self.split] = -(-shape[self.split] // tensor)
        shape[0] = -(-shape[0] // shards)
        return math.prod(shape)


def parameters(c: GPTConfig, lora: LoRAConfig | None = None) -> list[Parameter]:
    """All parameters of a model, with those of its adapters."""
    d, f, a, kv = c.d_model, c.d_ff, c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    adapted = frozenset(lora.modules(c)) if lora is not None else frozenset()

    def norm(name: str) -> list[Parameter]:
        kinds = ("weight", "bias") if c.norm == "layernorm" and c.bias else ("weight",)
        return [Parameter(f"{name}.{kind}", (d,)) for kind in kinds]

    def linear(name: str, outputs: int, inputs: int, split: int, biased: bool) -> list[Parameter]:
        made = [Parameter(f"{name}.weight", (outputs, inputs), split)]
        made += [Parameter(f"{name}.bias", (outputs,), 0 if split == 0 else None)] if biased else []
        if lora is not None and name in adapted:
            made += [Parameter(f"{name}.lora_a", (lora.rank, inputs)), Parameter(f"{name}.lora_b", (outputs, lora.rank))]
            made += [Parameter(f"{name}.magnitude", (outputs,))] if lora.dora else []
        return made

    qkv = c.bias or c.qkv_bias
    found = [Parameter("embeddings.tokens.weight", (c.vocab_size, d))]
    found += [Parameter("embeddings.positions.weight", (c.context_length, d))] if c.positions == "learned" else []
    for number in range(c.n_layer):
        block = f"blocks.{number}"
        found += norm(f"{block}.attention_norm") + norm(f"{block}.feedforward_norm")
        found += [Parameter(f"{block}.attention.{x}_norm.weight", (c.head_dim,)) for x in "qk"] if c.qk_norm else []
        found += linear(f"{block}.attention.q", a, d, 0, qkv)
        found += [p for x in "kv" for p in linear(f"{block}.attention.{x}", kv, d, 0, qkv)]
        found += linear(f"{block}.attention.out", d, a, 1, c.bias)
        ups = ("gate", "up") if c.activation == "swiglu" else ("up",)
        found += [p for x in ups for p in linear(f"{block}.feedforward.{x}", f, d, 0, c.bias)]
        found += linear(f"{block}.feedforward.down", d, f, 1, c.bias)
    found += norm("final_norm")
    found += [] if c.tie_embeddings else [Parameter("head.weight", (c.outputs, d))]
    return found + ([Parameter("head.bias", (c.outputs,))] if c.head == "tokens" else [])
