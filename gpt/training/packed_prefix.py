"""Frozen blocks at the bottom as they compute fastest on a CPU in bf16: weights cast and packed once, and not at every step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt.inference.packing import PackedLinear, joined, packs
from gpt.model import native_rowwise
from gpt.model.attention import KVCache
from gpt.model.native_products import is_plain
from gpt.model.native_rowwise import add_to
from gpt.model.transformer import GPT, Block
from gpt.runtime.allocator import give_back_freed_memory
from gpt.runtime.device import Device
from gpt.runtime.paged import move_to_file


def packs_prefix(device: Device) -> bool:
    """Whether a device computes frozen blocks faster so: oneDNN multiplies bf16, and norms hand it to it."""
    return device.is_host and device.dtype == torch.bfloat16 and packs(device.dtype) and native_rowwise.is_native()


class PackedPrefix:
    """Makes the stand-ins of a model's frozen blocks, when first asked and whenever their weights are others (a checkpoint has been read).

    They share norms with the blocks that they stand for; matrices are in bf16, in oneDNN's layout, GELU or SiLU is computed in the product
    before it, and q, k and v are one product. A block with adapters stands for itself. The matrices of the others, which steps do
    not read, are then kept in a file.

    Args:
        model: whose blocks.
        folder: for that file.
    """

    def __init__(self, model: GPT, folder: Path) -> None:
        self._model, self._folder = model, folder
        self._blocks: list[nn.Module] = []
        self._made_of: list[tuple[int, int]] = []

    def __call__(self) -> Sequence[nn.Module]:
        """What to compute in place of the frozen blocks."""
        blocks = list(self._model.blocks[: self._model.frozen_depth])
        if _state(blocks) != self._made_of:
            self._blocks.clear()
            self._blocks.extend(self._packed(block) for block in blocks)
            self._put_away([block for block, twin in zip(blocks, self._blocks, strict=True) if twin is not block])
            self._made_of = _state(blocks)
        return self._blocks

    def _put_away(self, blocks: Sequence[nn.Module]) -> None:
        matrices = [p for block in blocks for p in block.parameters() if p.dim() == 2]
        try:
            move_to_file(matrices, self._folder)
        except OSError as error:
            warnings.warn(f"weights of frozen blocks stay in memory: {self._folder} cannot be written ({error.strerror})", stacklevel=3)
        give_back_freed_memory()  # between these matrices lie small things, so that what a step makes finds no room there

    @torch.no_grad()
    def _packed(self, block: nn.Module) -> nn.Module:
        assert isinstance(block, Block)
        attention, feedforward = block.attention, block.feedforward
        linears = [attention.q, attention.k, attention.v, attention.out, feedforward.up, feedforward.down, feedforward.gate]
        if not all(is_plain(linear) for linear in linears if linear is not None):
            return block
        with torch.device("meta"):
            twin = _PackedBlock(self._model.config, attention.layer)
        twin.attention_norm, twin.feedforward_norm = block.attention_norm, block.feedforward_norm
        twin.attention.q_norm, twin.attention.k_norm = attention.q_norm, attention.k_norm
        activated, gated = feedforward.activation, feedforward.gate is not None
        packed: dict[nn.Module, dict[str, nn.Module]] = {
            twin.attention: {"qkv": _narrow(joined(attention)), "out": _narrow(attention.out)},
            twin.feedforward: {
                "up": _narrow(feedforward.up, None if gated else activated),
                "down": _narrow(feedforward.down),
                "activation": nn.Identity(),
            },
        }
        if feedforward.gate is not None:
            packed[twin.feedforward]["gate"] = _narrow(feedforward.gate, activated)
        for module, parts in packed.items():
            for name, part in parts.items():
                setattr(module, name, part)
        del twin.attention.q, twin.attention.k, twin.attention.v
        return twin.eval()


def _state(blocks: Sequence[nn.Module]) -> list[tuple[int, int]]:
    """What is another once weights are."""
    return [(p.data_ptr(), p._version) for block in blocks for p in block.parameters()]


class _PackedBlock(Block):
    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None, cache: KVCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """As of `Block`, but x is changed in place: nothing else reads it where nothing has gradients."""
        attended = self.attention(self.attention_norm(x), rotary, cache, mask)
        if self.parallel:
            made = self.feedforward(self.feedforward_norm(x))
            return add_to(add_to(x, attended), made)
        x = add_to(x, attended)
        return add_to(x, self.feedforward(self.feedforward_norm(x)))


def _narrow(linear: nn.Linear, activation: nn.Module | None = None) -> PackedLinear:
    narrow = nn.Linear(1, 1, bias=False, device="meta")
    narrow.weight = nn.Parameter(linear.weight.bfloat16(), requires_grad=False)
    if linear.bias is not None:
        narrow.bias = nn.Parameter(linear.bias.bfloat16(), requires_grad=False)
    return PackedLinear(narrow, activation)
