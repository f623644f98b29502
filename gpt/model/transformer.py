"""The GPT: embeddings, a stack of pre-norm blocks, a final norm and the output head.

Shapes: B batch, T time, E d_model, V vocab_size. Module names are a contract: freezing patterns and checkpoints use them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt.model.attention import Attention, KVCache, document_places
from gpt.model.config import GPTConfig, LoRAConfig
from gpt.model.feedforward import FeedForward
from gpt.model.heads import init_head, make_head
from gpt.model.lora import attach_as, init_adapters
from gpt.model.norms import block_norm, final_norm
from gpt.model.positions import rotary_tables, sinusoidal_table


class Embeddings(nn.Module):
    """Tokens to vectors, with absolute positions added where the config has them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.context_length, config.d_model) if config.positions == "learned" else None
        if config.positions == "sinusoidal":
            self.register_buffer("table", torch.empty(config.context_length, config.d_model), persistent=False)
        self.scale = config.embedding_scale
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, places: slice | Tensor) -> Tensor:
        """tokens (B, T) int64, at the positions `places`, a slice or an index (T,) or (B, T) -> (B, T, E)."""
        x = self.tokens(tokens)
        if self.scale != 1.0:
            x = x * self.scale
        if self.positions is not None:
            x = x + self.positions.weight[places]
        elif (table := getattr(self, "table", None)) is not None:
            x = x + table[places].to(x.dtype)
        return self.dropout(x)


class Block(nn.Module):
    """Pre-norm block: x + attention(norm x), then x + feedforward(norm x); or both at once (parallel_residual)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = block_norm(config)
        self.attention = Attention(config, layer)
        self.feedforward_norm = block_norm(config)
        self.feedforward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self.parallel = config.parallel_residual

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None, cache: KVCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x (B, T, E) -> (B, T, E)."""
        attended = self.dropout(self.attention(self.attention_norm(x), rotary, cache, mask))
        if self.parallel:
            return x + attended + self.dropout(self.feedforward(self.feedforward_norm(x)))
        x = x + attended
        return x + self.dropout(self.feedforward(self.feedforward_norm(x)))


class GPT(nn.Module):
    """A decoder-only transformer language model.

    Args:
        config: its shape; `vocab_size` must be set.
        lora: the adapters that it gets, besides which nothing trains; None, or of rank 0: none.

    The weights are initialised as GPT-2's were (`init_weights`), from torch's default generator: seed it first.
    Building under `torch.device("meta")` allocates nothing and initialises nothing.
    """

    def __init__(self, config: GPTConfig, lora: LoRAConfig | None = None) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("vocab_size=0: a GPT needs to know its number of token ids")
        self.config = config
        self.frozen_depth: int | None = None
        """So many blocks at the bottom, and the embeddings, do not train; None: the embeddings do."""
        self.frozen_blocks: Callable[[], Sequence[nn.Module]] | None = None
        """Asked for what computes in place of these blocks, at least; None: they do themselves."""
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = final_norm(config)
        self.head = make_head(config)
        if config.positions == "rotary":
            shape = (config.context_length, config.rotary_dim)
            self.register_buffer("rotary_cos", torch.empty(shape), persistent=False)
            self.register_buffer("rotary_sin", torch.empty(shape), persistent=False)
        self.tie()
        if lora is not None and lora.rank:
            attach_as(self, lora)
        if not self.head.weight.is_meta:
            self.init_weights()

    def tie(self) -> None:
        """Make the head share the token embedding, if the config says so (a move to another device can undo it)."""
        if self.config.tie_embeddings:
            self.head.weight = self.embeddings.tokens.weight

    def train(self, mode: bool = True) -> GPT:
        """As of any module, but what is frozen as a whole stays in eval mode: nothing is dropped there."""
        super().train(mode)
        if mode:
            for module in self.modules():
                parameters = list(module.parameters())
                if parameters and not any(p.requires_grad for p in parameters):
                    module.eval()
        return self

    @classmethod
    def materialise(
        cls, config: GPTConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, lora: LoRAConfig | None = None
    ) -> GPT:
        """Build on meta, then allocate on `device` once: parameters of `dtype`, uninitialised, and fp32 position tables, filled."""
        with torch.device("meta"):
            model = cls(config, lora)
        for p in model.parameters():
            p.data = p.data.to(dtype)
        model.to_empty(device=device)
        model.tie()
        model.init_tables()
        return model

    @torch.no_grad()
    def init_tables(self) -> None:
        """Fill the position tables, which are computed and never stored."""
        config = self.config
        if config.positions == "sinusoidal":
            table: Tensor = self.embeddings.get_buffer("table")
            table.copy_(sinusoidal_table(config.context_length, config.d_model))
        elif config.positions == "rotary":
            cos, sin = rotary_tables(config.context_length, config.rotary_dim, config.rope_theta, config.llama3_scaling)
            self.get_buffer("rotary_cos").copy_(cos)
            self.get_buffer("rotary_sin").copy_(sin)

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's initialisation (Radford et al. 2019, section 2.3).

        Weights N(0, 0.02), with residual projections scaled by 1/sqrt(2 n_layer); biases 0; norms 1.
        """
        self.init_tables()
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and name != "head":
                nn.init.normal_(module.weight, std=residual_std if name.endswith((".out", ".down")) else 0.02)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                nn.init.ones_(module.weight)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                nn.init.zeros_(bias)
        if not self.config.tie_embeddings:
            init_head(self.head)
        init_adapters(self)  # last, so that all else is as without them

    def hidden_states(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        states: Tensor | None = None,
        start: int = 0,
        end: int | None = None,
        *,
        blocks: Sequence[nn.Module] | None = None,
    ) -> Tensor:
        """tokens (B, T) int64 -> (B, T, E), after the final norm. With a cache, the T tokens are read after those it holds.

        With documents (B, T) int64, the number of each token's document, a token sees only its own document, up to its own place,
        and positions count from each document's first token.

        The way up may be cut in two: with `end`, what the embeddings and the blocks below it make of the tokens is returned, (B, T, E) in
        fp32 or the parameters' dtype; handed in as `states`, with `start` the same number, the rest follows. `blocks` compute in place of
        the model's own.

        Raises:
            ValueError: more tokens than context_length, or than the cache holds; or a cache and documents.
        """
        T = tokens.shape[1]
        if cache is None and self.config.context_length < T:  # a cache refuses by itself
            raise ValueError(f"{T} tokens do not fit context_length={self.config.context_length}")
        if documents is not None:
            if cache is not None:
                raise ValueError("a KV cache holds one document a row: it cannot be used with documents")
            places, mask = document_places(documents, self._attention_dtype(tokens.device.type))
        else:
            places, mask = cache.places(T) if cache is not None else (slice(0, T), None)
        rotary = None
        if self.config.positions == "rotary":
            cos, sin = self.get_buffer("rotary_cos")[places], self.get_buffer("rotary_sin")[places]
            rotary = (cos, sin) if cos.dim() == 2 else (cos[:, None], sin[:, None])
        x = self.embeddings(tokens, places) if states is None else states
        for block in (self.blocks if blocks is None else blocks)[start:end]:
            x = block(x, rotary, cache, mask)
        if end is not None:
            return x
        if cache is not None:
            cache.advance(T)
        return self.final_norm(x)

    @torch.no_grad()
    def frozen_states(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """What the frozen embeddings and blocks at the bottom make of tokens: (B, T) int64 -> (B, T, E), without gradients."""
        assert self.frozen_depth is not None
        blocks = None if self.frozen_blocks is None else self.frozen_blocks()
        return self.hidden_states(tokens, documents=documents, end=self.frozen_depth, blocks=blocks)

    def _attention_dtype(self, device: str) -> torch.dtype:
        """What keys are in, so that a mask is made once in that dtype and not once a block."""
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.embeddings.tokens.weight.dtype

    def forward(self, tokens: Tensor, cache: KVCache | None = None, documents: Tensor | None = None) -> Tensor:
        """tokens (B, T) int64, documents as for `hidden_states` -> logits (B, T, V), or (B, T, C) of C classes."""
        return self.head(self.hidden_states(tokens, cache, documents))

    def num_parameters(self, embeddings: bool = True) -> int:
        """How many parameters, each shared one once; without those of the embeddings and a tied head if asked."""
        total = sum(p.numel() for p in self.parameters())
        return total if embeddings else total - sum(p.numel() for p in self.embeddings.parameters())

    def flops_per_token(self, skipped: float = 0.0) -> int:
        """Floating-point operations to train on one token: 6 per matrix parameter, 12 n_layer n_head head_dim T for
        attention (PaLM, 2022, appendix B), the head counted, the embedding look-up not.

        Of these a third is the forward pass, a third the gradients of what a matrix is given, and a third those of its own, so a frozen
        matrix costs 4 per parameter, and one of the frozen blocks at the bottom 2.

        Args:
            skipped: the share of the tokens for which the frozen blocks at the bottom are not run.
        """
        config = self.config
        attention = 4 * config.n_head * config.head_dim * config.context_length
        depth, total = self.frozen_depth or 0, 0.0
        for number, block in enumerate(self.blocks):
            matrices = [p for p in block.parameters() if p.dim() == 2]
            size = sum(p.numel() for p in matrices)
            if number < depth:
                total += (1 - skipped) * (2 * size + attention)
            else:
                total += 4 * size + 2 * sum(p.numel() for p in matrices if p.requires_grad) + 3 * attention
        below_learns = depth < config.n_layer or any(p.requires_grad for p in self.final_norm.parameters())
        return round(total) + config.outputs * config.d_model * (2 + 2 * below_learns + 2 * self.head.weight.requires_grad)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        allow_pickle: bool = False,
    ) -> GPT:
        """Load a Hugging Face checkpoint directory or hub id of a supported architecture (`gpt.model.huggingface`)."""
        from gpt.model.huggingface import load_pretrained

        return load_pretrained(cls, path, device, dtype, allow_pickle)

    def save_pretrained(
        self, directory: str | Path, tokenizer: Any = None, dtype: torch.dtype | None = None, card: str | None = None
    ) -> None:
        """Write a Hugging Face directory of a stock architecture, which loads without any code of ours."""
        from gpt.model.huggingface import save_pretrained

        save_pretrained(self, directory, tokenizer, dtype, card)
