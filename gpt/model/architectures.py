"""The stock architectures that hold a GPT exactly: how each names its settings, and names and lays out its tensors.

One table per family, read in both directions. A setting that our model has no counterpart for is refused by name, never
approximated. What `transformers` 5.23 reads was read in its source; the keys that older readers need are written beside it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gpt.model.config import GPTConfig

# How a checkpoint lays out a matrix: as our nn.Linear (out, in); as GPT-2's Conv1D (in, out), fused parts side by side;
# or as GPT-NeoX's query_key_value (out, in), whose rows go head by head through q, k, v.
Layout = Literal["linear", "conv1d", "by_head"]

# (module of the family, ours, layout, whether it has a bias or the config key that says so), for one block.
ModuleEntry = tuple[str, tuple[str, ...], Layout, bool | str]


@dataclass(frozen=True)
class Family:
    """One stock architecture: its names, and what `transformers` takes for a key that config.json lacks."""

    class_name: str
    root: str
    tokens: str
    block: str
    final_norm: str
    modules: tuple[ModuleEntry, ...]
    activation_key: str
    dropout_keys: tuple[str, ...]
    defaults: dict[str, Any]
    positions: str | None = None
    norm_bias: bool = False
    head: str = "lm_head"
    token_head: str = "score"
    """The head of its class for tokens; that of its class for texts is `score` in every family."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Second names of keys, which count before the first."""

    @property
    def is_conv1d(self) -> bool:
        """Whether its matrices lie (in, out)."""
        return any(layout == "conv1d" for _, _, layout, _ in self.modules)


def _llama_like(class_name: str, qkv_bias: bool | str, out_bias: bool | str, mlp_bias: bool | str, qk_norm: bool = False) -> Family:
    head_norms: tuple[ModuleEntry, ...] = (
        ("self_attn.q_norm", ("attention.q_norm",), "linear", False),
        ("self_attn.k_norm", ("attention.k_norm",), "linear", False),
    )
    return Family(
        class_name, "model", "embed_tokens", "layers", "norm",
        (
            ("input_layernorm", ("attention_norm",), "linear", False),
            ("self_attn.q_proj", ("attention.q",), "linear", qkv_bias),
            ("self_attn.k_proj", ("attention.k",), "linear", qkv_bias),
            ("self_attn.v_proj", ("attention.v",), "linear", qkv_bias),
            ("self_attn.o_proj", ("attention.out",), "linear", out_bias),
            *(head_norms if qk_norm else ()),
            ("post_attention_layernorm", ("feedforward_norm",), "linear", False),
            ("mlp.gate_proj", ("feedforward.gate",), "linear", mlp_bias),
            ("mlp.up_proj", ("feedforward.up",), "linear", mlp_bias),
            ("mlp.down_proj", ("feedforward.down",), "linear", mlp_bias),
        ),
        activation_key="hidden_act",
        dropout_keys=("attention_dropout",),
        defaults={"tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False, "mlp_bias": False},
    )  # fmt: skip


_QKV = ("attention.q", "attention.k", "attention.v")
FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2LMHeadModel", "transformer", "wte", "h", "ln_f",
        (
            ("ln_1", ("attention_norm",), "linear", True),
            ("attn.c_attn", _QKV, "conv1d", True),
            ("attn.c_proj", ("attention.out",), "conv1d", True),
            ("ln_2", ("feedforward_norm",), "linear", True),
            ("mlp.c_fc", ("feedforward.up",), "conv1d", True),
            ("mlp.c_proj", ("feedforward.down",), "conv1d", True),
        ),
        activation_key="activation_function",
        dropout_keys=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        defaults={
            "tie_word_embeddings": True, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
            "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
        },
        positions="wpe",
        norm_bias=True,
        token_head="classifier",
        aliases={
            "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
    ),
    "llama": _llama_like("LlamaForCausalLM", "attention_bias", "attention_bias", "mlp_bias"),
    "qwen2": _llama_like("Qwen2ForCausalLM", True, False, False),
    "qwen3": _llama_like("Qwen3ForCausalLM", "attention_bias", "attention_bias", False, qk_norm=True),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", "gpt_neox", "embed_in", "layers", "final_layer_norm",
        (
            ("input_layernorm", ("attention_norm",), "linear", True),
            ("attention.query_key_value", _QKV, "by_head", "attention_bias"),
            ("attention.dense", ("attention.out",), "linear", "attention_bias"),
            ("post_attention_layernorm", ("feedforward_norm",), "linear", True),
            ("mlp.dense_h_to_4h", ("feedforward.up",), "linear", True),
            ("mlp.dense_4h_to_h", ("feedforward.down",), "linear", True),
        ),
        activation_key="hidden_act",
        dropout_keys=("attention_dropout", "hidden_dropout"),
        defaults={
            "tie_word_embeddings": False, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "attention_bias": True,
            "use_parallel_residual": True, "rotary_pct": 0.25,
        },
        norm_bias=True,
        head="embed_out",  # in files; transformers 5 renames it to lm_head as it loads, and back as it saves
        token_head="classifier",
    ),
}  # fmt: skip
MODEL_TYPES = {"GPT2": "gpt2", "Llama": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3", "GPTNeoX": "gpt_neox"}

# The classes of `transformers` that hold a head of classes, behind the family's name.
CLASSIFIERS = {"sequence": "ForSequenceClassification", "tokens": "ForTokenClassification"}

# Llama 3.1's rotary scaling: its key in config.json and our field.
LLAMA3 = {
    "factor": "rope_scaling_factor", "low_freq_factor": "rope_low_frequency_factor", "high_freq_factor": "rope_high_frequency_factor",
    "original_max_position_embeddings": "rope_original_context",
}  # fmt: skip

# transformers has several names for one function; the first is the one that older readers know, and is what we write.
ACTIVATIONS = {
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"),
    "gelu": ("gelu", "gelu_python"),
    "swiglu": ("silu", "swish"),
}
# Keys that change what a model computes and that ours has no counterpart for: fine only when absent, null, false, 0 or empty.
UNSUPPORTED = (
    "quantization_config", "compression_config", "per_layer_config", "pruned_heads", "use_bidirectional_attention",
    "is_encoder_decoder", "add_cross_attention", "scale_attn_by_inverse_layer_idx",
    "attn_logit_softcapping", "final_logit_softcapping", "attention_chunk_size", "no_rope_layers",
    "num_experts", "num_local_experts", "n_routed_experts",
)  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint and the parameters of ours that make it up."""

    name: str
    ours: tuple[str, ...]
    layout: Layout = "linear"

    def shape(self, parts: list[torch.Size]) -> tuple[int, ...]:
        """The shape of what `pack` makes of parts with these shapes."""
        whole = (sum(part[0] for part in parts), *parts[0][1:])
        return whole[::-1] if self.layout == "conv1d" else whole

    def pack(self, parts: list[Tensor], n_head: int) -> Tensor:
        """Our parameters, each (out, in) or (out,), to the checkpoint's tensor."""
        if self.layout == "by_head":
            heads = [part.unflatten(0, (n_head, -1)) for part in parts]  # each (H, D, ...)
            return torch.stack(heads, dim=1).flatten(0, 2)
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return whole.t() if self.layout == "conv1d" and whole.dim() == 2 else whole

    def unpack(self, tensor: Tensor, n_head: int) -> list[Tensor]:
        """The inverse of `pack`: views, but of "by_head"."""
        if self.layout == "by_head":
            return [part.flatten(0, 1) for part in tensor.unflatten(0, (n_head, len(self.ours), -1)).unbind(1)]
        if self.layout == "conv1d" and tensor.dim() == 2:
            return [part.t() for part in tensor.chunk(len(self.ours), dim=1)]
        return list(tensor.chunk(len(self.ours)))


def _stem(family: Family) -> str:
    """The family's name, with which the names of all its classes begin."""
    return re.sub("(LMHeadModel|ForCausalLM)$", "", family.class_name)


def head_of(values: dict[str, Any]) -> str:
    """Which head a checkpoint has, by the class that its config.json names: a `GPTConfig.head`."""
    named = [str(name) for name in values.get("architectures") or ()]
    return next((head for head, suffix in CLASSIFIERS.items() if any(name.endswith(suffix) for name in named)), "language_model")


def head_name(values: dict[str, Any]) -> str:
    """What a checkpoint with this config.json calls its head."""
    family = FAMILIES[values["model_type"]]
    return {"language_model": family.head, "sequence": "score", "tokens": family.token_head}[head_of(values)]


def stored_tensors(n_layer: int, values: dict[str, Any]) -> Iterator[StoredTensor]:
    """Every tensor that a checkpoint with this config.json holds, in order.

    Args:
        n_layer: number of blocks.
        values: from `to_hf_config` or `complete`.
    """
    family = FAMILIES[values["model_type"]]
    yield StoredTensor(f"{family.root}.{family.tokens}.weight", ("embeddings.tokens.weight",))
    if family.positions:
        yield StoredTensor(f"{family.root}.{family.positions}.weight", ("embeddings.positions.weight",))
    for layer in range(n_layer):
        for name, ours, layout, bias in family.modules:
            for kind in ("weight", "bias") if (values[bias] if isinstance(bias, str) else bias) else ("weight",):
                parts = tuple(f"blocks.{layer}.{module}.{kind}" for module in ours)
                yield StoredTensor(f"{family.root}.{family.block}.{layer}.{name}.{kind}", parts, layout)
    for kind in ("weight", "bias") if family.norm_bias else ("weight",):
        yield StoredTensor(f"{family.root}.{family.final_norm}.{kind}", (f"final_norm.{kind}",))
    head = head_of(values)
    if head != "language_model" or not values["tie_word_embeddings"]:
        yield StoredTensor(f"{head_name(values)}.weight", ("head.weight",))
    if head == "tokens" and values.get("token_classification_bias", True):
        yield StoredTensor(f"{head_name(values)}.bias", ("head.bias",))


def to_hf_config(config: GPTConfig) -> dict[str, Any]:
    """Our config as the config.json of its stock architecture; token ids and dtype are not in it."""
    model_type = MODEL_TYPES[config.stock_architecture()]
    family = FAMILIES[model_type]
    values: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        # A scaled input embedding is written already scaled, so it can no longer be the head.
        "tie_word_embeddings": config.tie_embeddings and config.embedding_scale == 1.0,
        family.activation_key: ACTIVATIONS[config.activation][0],
        **dict.fromkeys(family.dropout_keys, config.dropout),
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if config.head != "language_model":
        values |= {
            "architectures": [_stem(family) + CLASSIFIERS[config.head]],
            "id2label": {str(number): name for number, name in enumerate(config.classes)},
            "label2id": {name: number for number, name in enumerate(config.classes)},
            **({"problem_type": "single_label_classification"} if config.head == "sequence" else {"classifier_dropout": 0.0}),
        }
    if model_type == "gpt2":
        return values | {
            "n_positions": config.context_length, "n_ctx": config.context_length, "n_embd": config.d_model, "n_layer": config.n_layer,
            "n_head": config.n_head, "n_inner": config.d_ff, "layer_norm_epsilon": config.norm_eps, "scale_attn_weights": True,
        }  # fmt: skip
    # transformers 5 reads rope_parameters; older releases and other servers read the keys beside it.
    scaling = {"rope_type": "llama3", **{key: getattr(config, ours) for key, ours in LLAMA3.items()}} if config.llama3_scaling else {}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta, **scaling}
    values |= {
        "max_position_embeddings": config.context_length, "hidden_size": config.d_model, "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head, "rope_theta": config.rope_theta, "rope_parameters": rope,
    }  # fmt: skip
    if scaling:
        values["rope_scaling"] = scaling
    if model_type == "gpt_neox":
        rope["partial_rotary_factor"] = config.rope_fraction
        return values | {
            "layer_norm_eps": config.norm_eps, "use_parallel_residual": config.parallel_residual, "attention_bias": True,
            "rotary_pct": config.rope_fraction, "rotary_emb_base": config.rope_theta,
        }  # fmt: skip
    values |= {
        "num_key_value_heads": config.n_kv_head, "head_dim": config.head_dim, "rms_norm_eps": config.norm_eps,
        "attention_bias": config.bias or config.qkv_bias, "mlp_bias": config.bias,
    }  # fmt: skip
    return values if model_type == "llama" else values | {"use_sliding_window": False, "sliding_window": None}


def complete(values: dict[str, Any], where: str) -> dict[str, Any]:
    """A config.json without its nulls and second names, and with what `transformers` takes for the keys that it lacks.

    Raises:
        ValueError: its model_type or its architecture is none of ours.
    """
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None:
        raise ValueError(f"{where}: model_type={values.get('model_type')!r} cannot be loaded; {', '.join(FAMILIES)} can")
    named = values.get("architectures") or [family.class_name]
    known = [family.class_name, *(_stem(family) + suffix for suffix in ("Model", *CLASSIFIERS.values()))]
    if not {name.lower() for name in known} & {str(name).lower() for name in named}:
        can = f"{family.class_name}, {known[-2]} and {known[-1]} can"
        raise ValueError(f"{where}: architectures={json.dumps(named)} cannot be loaded as a language model or a classifier; {can}")
    values = {key: value for key, value in values.items() if value is not None}
    for alias, key in family.aliases.items():
        if alias in values:
            values[key] = values.pop(alias)
    return family.defaults | values


def from_hf_config(values: dict[str, Any], where: str) -> GPTConfig:
    """The content of a config.json as our config.

    Args:
        values: from `complete`.
        where: the file's name, for messages.

    Raises:
        ValueError: a key is missing, or says something that our model does not compute.
    """
    model_type, family = values["model_type"], FAMILIES[values["model_type"]]

    def size(key: str) -> int:
        if type(values.get(key)) is not int:
            raise ValueError(f"{where}: {key}={values.get(key)!r} must be a whole number in the config.json of a {model_type} model")
        return values[key]

    for key, default in family.defaults.items():
        if type(values[key]) is not type(default) and (type(default) is not float or type(values[key]) is not int):
            raise ValueError(f"{where}: {key}={json.dumps(values[key])} must be a {type(default).__name__}, such as {json.dumps(default)}")
    _refuse_unsupported(values, where)
    activation = next((ours for ours, names in ACTIVATIONS.items() if values[family.activation_key] in names), None)
    if activation is None or (activation == "swiglu") == family.norm_bias:
        raise ValueError(_unsupported(where, family.activation_key, values[family.activation_key]))
    dropouts = {values.get(key, 0.0) for key in family.dropout_keys}
    if len(dropouts) > 1:
        warnings.warn(f"{where}: {', '.join(family.dropout_keys)} differ, and GPT has one dropout: it is set to 0", stacklevel=4)
    common: dict[str, Any] = {
        **_classes(values, where),
        "vocab_size": size("vocab_size"),
        "activation": activation,
        "tie_embeddings": values["tie_word_embeddings"],
        "dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
    }
    if model_type == "gpt2":
        common |= {
            "context_length": size("n_positions"), "n_layer": size("n_layer"), "n_head": size("n_head"), "d_model": size("n_embd"),
            "d_ff": size("n_inner") if "n_inner" in values else 0, "norm_eps": values["layer_norm_epsilon"], "positions": "learned",
        }  # fmt: skip
    else:
        common |= {
            "context_length": size("max_position_embeddings"), "n_layer": size("num_hidden_layers"), "n_head": size("num_attention_heads"),
            "d_model": size("hidden_size"), "d_ff": size("intermediate_size"), "positions": "rotary",
            **_rope(values, where),
        }  # fmt: skip
    if model_type == "gpt_neox":
        common |= {"norm_eps": values["layer_norm_eps"], "parallel_residual": values["use_parallel_residual"]}
    elif model_type != "gpt2":
        # Defaults of the stock classes: Llama's are derived, Qwen's are those of its largest model.
        kv_heads, head_dim = (32 if model_type.startswith("qwen") else 0), (128 if model_type == "qwen3" else 0)
        common |= {
            "norm": "rmsnorm", "norm_eps": values["rms_norm_eps"],
            "n_kv_head": size("num_key_value_heads") if "num_key_value_heads" in values else kv_heads,
            "head_dim": size("head_dim") if "head_dim" in values else head_dim,
            "bias": model_type == "llama" and (values["attention_bias"] or values["mlp_bias"]),
            "qkv_bias": model_type == "qwen2" or (model_type == "qwen3" and values["attention_bias"]), "qk_norm": model_type == "qwen3",
        }  # fmt: skip
    try:
        return GPTConfig(**common)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _classes(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Our fields of the head. Its dropout in the stock classes is of their training alone, and has no counterpart here."""
    head = head_of(values)
    if head == "language_model":
        return {}
    if head == "sequence" and values.get("problem_type", "single_label_classification") != "single_label_classification":
        raise ValueError(_unsupported(where, "problem_type", values["problem_type"]))
    count = values.get("num_labels", 2)  # what `transformers` takes where it has written no names, which it does for two unnamed classes
    names = values.get("id2label", {str(number): f"LABEL_{number}" for number in range(count)} if type(count) is int else None)
    return {"head": head, "classes": class_names(names, where)}


def class_names(id2label: object, where: str) -> list[str]:
    """Classes in the order of the head's rows, out of what `transformers` calls id2label.

    Raises:
        ValueError: they are not numbered 0, 1 and so on.
    """
    if not isinstance(id2label, dict) or {str(number) for number in range(len(id2label))} != {str(key) for key in id2label}:
        raise ValueError(f"{where}: id2label={json.dumps(id2label)} must name the classes 0, 1 and so on, each once")
    classes = {str(key): name for key, name in id2label.items()}
    return [str(classes[str(number)]) for number in range(len(classes))]


def _unsupported(where: str, key: str, value: object) -> str:
    return f"{where}: {key}={json.dumps(value)} is not supported, and without it this would be another model; load it with transformers"


def _refuse_unsupported(values: dict[str, Any], where: str) -> None:
    for key in UNSUPPORTED:
        if values.get(key):
            raise ValueError(_unsupported(where, key, values[key]))
    for key in ("scale_attn_weights", "is_causal"):
        if not values.get(key, True):
            raise ValueError(_unsupported(where, key, values[key]))
    if set(values.get("layer_types", ())) - {"full_attention"}:
        raise ValueError(_unsupported(where, "layer_types", sorted(set(values["layer_types"]))))
    # Qwen's sliding_window counts only with use_sliding_window, and only from layer max_window_layers on.
    if values["model_type"].startswith("qwen"):
        if values.get("use_sliding_window") and values.get("max_window_layers", 28) < values.get("num_hidden_layers", 0):
            raise ValueError(_unsupported(where, "use_sliding_window", True))
    elif values.get("sliding_window"):
        raise ValueError(_unsupported(where, "sliding_window", values["sliding_window"]))


def _rope(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Our rope_* fields, with the precedence that transformers 5 gives to the places where they can stand."""
    neox = values["model_type"] == "gpt_neox"
    place = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = values.get(place) or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *(LLAMA3 if kind == "llama3" else ())}
    if kind not in ("default", "llama3") or set(rope) - known:
        raise ValueError(_unsupported(where, place, rope))
    rope = {"rope_theta": values.get("rotary_emb_base" if neox else "rope_theta", 10000.0)} | rope
    rope = {"partial_rotary_factor": values["rotary_pct"] if neox else values.get("partial_rotary_factor", 1.0)} | rope
    if not neox and rope["partial_rotary_factor"] != 1:
        raise ValueError(_unsupported(where, "partial_rotary_factor", rope["partial_rotary_factor"]))
    # The rotation of GPT-NeoX would follow a head_dim that its heads do not.
    if neox and values.get("head_dim") and values["head_dim"] * values["num_attention_heads"] != values["hidden_size"]:
        raise ValueError(_unsupported(where, "head_dim", values["head_dim"]))
    fields = {"rope_theta": "rope_theta", "partial_rotary_factor": "rope_fraction"}
    original = "original_max_position_embeddings"
    if kind == "llama3":
        fields |= LLAMA3
        rope = {original: values["max_position_embeddings"]} | rope | ({original: values[original]} if original in values else {})
    for key in fields:
        if type(rope.get(key)) not in (int, float):
            raise ValueError(f"{where}: {place} has {key}={json.dumps(rope.get(key))}, which must be a number")
    ours: dict[str, Any] = {field: float(rope[key]) for key, field in fields.items()}
    if kind == "llama3":
        if rope[original] % 1:
            raise ValueError(f"{where}: {original}={rope[original]} must be a whole number")
        ours |= {"rope_scaling": "llama3", "rope_original_context": int(rope[original])}
    return ours
