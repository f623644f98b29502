"""GPTConfig: every choice that defines a GPT's shape, checked when it is made; and LoRAConfig, which adapters it gets.

A config is accepted only if a stock `transformers` architecture can hold it exactly (`stock_architecture`),
so whatever is trained here can be served elsewhere. Imports no torch: the command line reads it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal, get_args, get_origin, get_type_hints

Architecture = Literal["GPT2", "Llama", "Qwen2", "Qwen3", "GPTNeoX"]


@dataclass
class GPTConfig:
    """The shape of a GPT. A 0 in a size means "derived from the others" and is replaced by the number when built.

    Raises:
        ValueError: sizes that do not fit together, or a combination that no stock architecture can express.
    """

    vocab_size: int = 0
    """Number of token ids. 0 in a run's config: as many as the tokenizer has."""
    context_length: int = 1024
    """Longest sequence, in tokens."""
    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Query heads per block."""
    n_kv_head: int = 0
    """Key/value heads per block; fewer than n_head is grouped-query attention. 0: n_head."""
    head_dim: int = 0
    """Width of one head. 0: d_model / n_head."""
    d_model: int = 768
    """Width of the residual stream."""
    d_ff: int = 0
    """Width inside the feed-forward. 0: 4 d_model, or for swiglu 8/3 d_model rounded up to a multiple of 64."""
    positions: Literal["learned", "sinusoidal", "rotary", "none"] = "learned"
    """How position enters: a learned table, the sine table of "Attention Is All You Need", rotation of q and k, or not."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_fraction: float = 1.0
    """Share of each head that is rotated."""
    rope_scaling: Literal["none", "llama3"] = "none"
    """How the rotary frequencies are stretched for a context longer than the one first trained on; llama3 is Llama 3.1's rule."""
    rope_scaling_factor: float = 8.0
    """llama3: what low frequencies are divided by. Used, as the three below, only with rope_scaling=llama3."""
    rope_low_frequency_factor: float = 1.0
    """llama3: wavelengths above rope_original_context / this are divided in full."""
    rope_high_frequency_factor: float = 4.0
    """llama3: wavelengths below rope_original_context / this stay as they are; between the two there is a smooth passage."""
    rope_original_context: int = 8192
    """llama3: the context length, in tokens, before it was stretched."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before attention, before the feed-forward, and at the end."""
    norm_eps: float = 1e-5
    """Added to the variance inside each norm."""
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu_tanh"
    """Feed-forward non-linearity; swiglu is gated."""
    bias: bool = True
    """Biases in every linear layer and layernorm."""
    qkv_bias: bool = False
    """Biases on q, k and v even where bias is false (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys (Qwen3)."""
    tie_embeddings: bool = True
    """The output head shares the token embedding's weights."""
    embedding_scale: float = 1.0
    """Token embeddings are multiplied by this on the way in (sqrt(d_model) in the 2017 transformer)."""
    parallel_residual: bool = False
    """Attention and feed-forward read the same input and are added together (GPT-NeoX)."""
    dropout: float = 0.0
    """Dropout on embeddings, attention weights and both residual branches, while training."""
    head: Literal["language_model", "sequence", "tokens"] = "language_model"
    """What the output is: the next token; the class of a text, read at its last token; or that of each word, at its first piece. In a
    fine-tuning run, as its rows show: text_label makes it sequence, tokens_tags tokens."""
    classes: list[str] = field(default_factory=list)
    """head=sequence and tokens: the classes in order. [] in a run's config: data.labels, or those that occur in the data."""

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_head()
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}")
        if self.d_model % self.n_head and not (self.head_dim and self.norm == "rmsnorm"):
            below = self.d_model // self.n_head * self.n_head
            near = f"{below} or {below + self.n_head}" if below else f"{self.n_head}"
            free = "; or set head_dim" if self.norm == "rmsnorm" else ""
            raise ValueError(f"d_model={self.d_model} is not divisible by n_head={self.n_head} (nearest: {near}{free})")
        self.head_dim = self.head_dim or self.d_model // self.n_head
        if not self.d_ff:
            self.d_ff = -(-8 * self.d_model // (3 * 64)) * 64 if self.activation == "swiglu" else 4 * self.d_model
        if self.positions == "rotary" and (self.rotary_dim < 2 or self.rotary_dim % 2):
            if self.rope_fraction == 1:
                raise ValueError(f"head_dim={self.head_dim} (d_model / n_head unless set) must be even: rotary positions turn pairs")
            raise ValueError(
                f"rope_fraction={self.rope_fraction} of head_dim={self.head_dim} rotates {self.rotary_dim} dimensions; "
                "it must be an even number of at least 2"
            )
        self.stock_architecture()

    def _check_ranges(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                raise ValueError(f"{name}={getattr(self, name)} must be one of {', '.join(get_args(hint))}")
        for name in ("context_length", "n_layer", "n_head", "d_model", "rope_original_context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("vocab_size", "n_kv_head", "head_dim", "d_ff"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative (0 means: derived)")
        for name in ("rope_theta", "norm_eps", "embedding_scale", "rope_low_frequency_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0 and finite")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and less than 1")
        if not 0 < self.rope_fraction <= 1:
            raise ValueError(f"rope_fraction={self.rope_fraction} must be greater than 0 and at most 1")
        if not 1 <= self.rope_scaling_factor < math.inf:
            raise ValueError(f"rope_scaling_factor={self.rope_scaling_factor} must be at least 1 and finite")
        low, high = self.rope_low_frequency_factor, self.rope_high_frequency_factor
        if not low < high < math.inf:
            raise ValueError(f"rope_high_frequency_factor={high} must be greater than rope_low_frequency_factor={low} and finite")
        if self.rope_scaling != "none" and self.positions != "rotary":
            raise ValueError(f"rope_scaling={self.rope_scaling} with positions={self.positions} must be none: nothing is rotated there")

    def _check_head(self) -> None:
        if self.head == "language_model":
            if self.classes:
                raise ValueError(f"classes={_some(self.classes)} with head=language_model must be []; head=sequence or tokens has classes")
            return
        self.tie_embeddings = False  # there is nothing that the embedding could be tied to
        if len(self.classes) == 1:
            raise ValueError(f"classes={_some(self.classes)} is one class; telling classes apart takes two or more")
        if not all(isinstance(name, str) and name.strip() for name in self.classes):
            raise ValueError(f"classes={_some(self.classes)}: each must be a name")
        if len(set(self.classes)) < len(self.classes):
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            raise ValueError(f"classes: {twice} is there twice; no stock architecture can hold two classes of one name")

    @property
    def outputs(self) -> int:
        """Numbers that the head gives for each token: one for every id of the vocabulary, or for every class."""
        return self.vocab_size if self.head == "language_model" else len(self.classes)

    @property
    def rotary_dim(self) -> int:
        """How many of head_dim's dimensions are rotated."""
        return int(self.head_dim * self.rope_fraction)

    @property
    def llama3_scaling(self) -> tuple[float, float, float, int] | None:
        """(factor, low frequency factor, high frequency factor, original context) if the rotary frequencies are scaled so."""
        if self.rope_scaling == "none":
            return None
        return self.rope_scaling_factor, self.rope_low_frequency_factor, self.rope_high_frequency_factor, self.rope_original_context

    def stock_architecture(self) -> Architecture:
        """The `transformers` family that holds this config exactly.

        Raises:
            ValueError: none does; the message names the field to change.
        """
        rms = self.norm == "rmsnorm"
        family = "Llama, Qwen2, Qwen3" if rms else "GPT-2, GPT-NeoX"
        because = f"norm={self.norm}"
        demands: list[tuple[str, object, str]] = []
        if rms:
            demands += [("positions", "rotary", because), ("activation", "swiglu", because), ("rope_fraction", 1.0, because)]
            demands += [("parallel_residual", False, because)]
            demands += [("bias", False, "qk_norm=true")] if self.qk_norm else []
        else:
            demands += [("qk_norm", False, because), ("n_kv_head", self.n_head, because)]
            demands += [("head_dim", self.d_model // self.n_head, because)]
            demands += [("parallel_residual", False, f"positions={self.positions}")] if self.positions != "rotary" else []
            if self.activation == "swiglu":
                raise ValueError(f"activation=swiglu with {because} must be gelu or gelu_tanh: no stock architecture ({family}) is gated")
        for name, value, because in demands:
            if getattr(self, name) != value:
                found, wanted = str(getattr(self, name)).lower(), str(value).lower()  # true and false, as on the command line
                raise ValueError(f"{name}={found} with {because} must be {wanted}: no stock architecture ({family}) can hold another")
        if rms and self.qk_norm:
            return "Qwen3"
        if rms and self.qkv_bias and not self.bias:
            return "Qwen2"
        if self.d_model % self.n_head:  # transformers refuses it, also where head_dim is given
            raise ValueError(
                f"d_model={self.d_model} is not divisible by n_head={self.n_head}: no stock architecture with {because} can hold it"
            )
        if rms:
            return "Llama"
        return "GPTNeoX" if self.positions == "rotary" else "GPT2"


def _some(names: list[str]) -> str:
    """A list of names, cut to a readable length."""
    return "[" + ", ".join(map(str, names[:5])) + (", ...]" if len(names) > 5 else "]")


@dataclass
class LoRAConfig:
    """Low-rank adapters (Hu et al., "LoRA", 2021): the weights stay as they are, and each chosen matrix W becomes W + alpha / rank B A.

    Raises:
        ValueError: a rank, alpha or dropout that cannot be.
    """

    rank: int = 0
    """Rank of every adapter; 8 is usual. 0: no adapters, the weights themselves train."""
    alpha: float = 16.0
    """Adapters count alpha / rank times, so that another rank needs no other learning rate."""
    dropout: float = 0.0
    """Of what adapters read, while training; with it a step takes half as long again."""
    targets: list[str] = field(default_factory=lambda: ["attention", "feedforward"])
    """Which projections get one: attention.{q,k,v,out}, feedforward.{up,gate,down}; a name, the end or the beginning of one, or a
    pattern: [q, v], [feedforward], ["blocks.1?.attention.*"]."""
    dora: bool = False
    """Also learn the length of each row of W (Liu et al., "DoRA", 2024): closer to full fine-tuning, and hardly slower."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank={self.rank} must be at least 1, such as 8; 0 is no adapters")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha} must be greater than 0 and finite; usual are rank and twice the rank")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and less than 1")

    @property
    def scale(self) -> float:
        """What the product of an adapter's two matrices is multiplied by."""
        return self.alpha / self.rank if self.rank else 0.0

    def modules(self, config: GPTConfig) -> list[str]:
        """The names of the matrices that get an adapter in a model of this shape, in its order.

        Raises:
            ValueError: a target names none; the message has the nearest that does.
        """
        if not self.rank:
            return []
        names = list(_projections(config))
        chosen: set[str] = set()
        for target in self.targets:
            found = [name for name in names if _names(target, name)]
            if not found:
                raise ValueError(f"targets: {_no_target(target, names, config)}")
            chosen.update(found)
        if not chosen:
            raise ValueError("targets=[]: no projection is named, so nothing would train; leave it out for all of them")
        return [name for name in names if name in chosen]

    def of_most_blocks(self, config: GPTConfig) -> LoRAConfig | None:
        """The same adapters for a model of fewer blocks: those of a block as most are; None: those have none."""
        inner: dict[str, list[str]] = {f"blocks.{layer}": [] for layer in range(config.n_layer)}
        for name in self.modules(config):
            blocks, layer, rest = name.split(".", 2)
            inner[f"{blocks}.{layer}"].append(rest)
        most = max(inner.values(), key=list(inner.values()).count)
        return replace(self, targets=most) if most else None


# What PEFT's users call these projections in the stock architectures.
_STOCK_PROJECTIONS = {
    "q_proj": "attention.q", "k_proj": "attention.k", "v_proj": "attention.v", "o_proj": "attention.out", "dense": "attention.out",
    "c_attn": "attention.q, attention.k and attention.v", "query_key_value": "attention.q, attention.k and attention.v",
    "up_proj": "feedforward.up", "gate_proj": "feedforward.gate", "down_proj": "feedforward.down", "c_fc": "feedforward.up",
    "dense_h_to_4h": "feedforward.up", "dense_4h_to_h": "feedforward.down", "c_proj": "attention.out and feedforward.down",
    "query": "attention.q", "key": "attention.k", "value": "attention.v", "qkv": "attention.q, attention.k and attention.v",
    "attn": "attention", "self_attn": "attention", "mlp": "feedforward", "all-linear": "attention and feedforward, the default",
}  # fmt: skip


def _projections(config: GPTConfig) -> Iterator[str]:
    """Every matrix inside the blocks."""
    inner = ("up", "gate", "down") if config.activation == "swiglu" else ("up", "down")
    for layer in range(config.n_layer):
        yield from (f"blocks.{layer}.attention.{name}" for name in ("q", "k", "v", "out"))
        yield from (f"blocks.{layer}.feedforward.{name}" for name in inner)


def _names(target: str, name: str) -> bool:
    """Whether a target is a module's name, a run of its parts, or a pattern of either."""
    parts = name.split(".")
    runs = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
    return any(fnmatchcase(run, target) for run in runs if not run.isdigit())


def _no_target(target: str, names: Iterable[str], config: GPTConfig) -> str:
    short = list(dict.fromkeys(name.split(".", 2)[2] for name in names))
    there = f"There are: {', '.join(short)}, in blocks.0 to blocks.{config.n_layer - 1}"
    if stock := _STOCK_PROJECTIONS.get(target.rpartition(".")[2]):
        return f"{target} is {stock} here. {there}"
    if target.partition(".")[0] in ("head", "embeddings"):
        return f"{target} gets no adapter, only matrices inside blocks do. {there}"
    known = [*short, *(name.partition(".")[2] for name in short), "attention", "feedforward", *names]
    close = difflib.get_close_matches(target, known, 1, 0.5)
    return f"no projection is called {target}{f'. Did you mean {close[0]}?' if close else '.'} {there}"
