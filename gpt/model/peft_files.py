"""Adapters from and to files of the library PEFT: adapter_config.json beside adapter_model.safetensors, which hold the changes alone.

That of a classifier has `id2label.json` beside them, the names of its classes as `transformers` has them in a config: PEFT's own files
hold the new head, but not what it tells apart, and a `config.json` there would make `transformers` take the folder for a whole model.

Read in PEFT 0.21's source. A stock architecture that keeps q, k and v in one matrix has one adapter where ours has up to three: those
lie in it side by side, A's rows stacked and B block-diagonal, which is the same function exactly. What PEFT knows and our layers do
not compute is refused by name, never approximated.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gpt.model.architectures import FAMILIES, StoredTensor, class_names, head_name, stored_tensors, to_hf_config
from gpt.model.config import GPTConfig
from gpt.model.heads import adopt
from gpt.model.lora import LoRALinear, adapted, adapter_parameters, attach, merge
from gpt.model.transformer import GPT
from gpt.model.weight_files import CLASS_NAMES, INDEX, PICKLE, PICKLE_INDEX, WEIGHTS, read_json, unpickle

ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_KEY = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector|lora_embedding_A|lora_embedding_B)(\.default)?(\.weight|\.bias)?$")
_TASKS = {"language_model": "CAUSAL_LM", "sequence": "SEQ_CLS", "tokens": "TOKEN_CLS"}

# Keys of adapter_config.json that change what is computed, in ways that ours does not: fine only when absent, null, false or empty.
_UNSUPPORTED = (
    "lora_bias", "use_qalora", "use_bdlora", "layer_replication", "target_parameters", "trainable_token_indices", "arrow_config",
    "alora_invocation_tokens", "kasa_config", "monteclora_config", "megatron_config", "ensure_weight_tying",
)  # fmt: skip
# Initialisations that leave the base's weights as they are. Others (pissa, olora, corda, loftq ...) change them too.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass
class Adapter:
    """What an adapter's files say, in our names.

    Attributes:
        ranks: adapted layers, each with its rank and scale.
        tensors: lora_a, lora_b and magnitude of each.
        replaced: parameters of the base that it brings whole, such as a new head.
        dropout, dora: as of `LoRALinear`.
    """

    ranks: dict[str, tuple[int, float]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    dropout: float = 0.0
    dora: bool = False


def is_adapter_folder(directory: Path) -> bool:
    """Whether a folder holds an adapter, and no whole model beside it."""
    whole = (WEIGHTS, INDEX, PICKLE, PICKLE_INDEX)
    return (directory / ADAPTER_CONFIG).is_file() and not any((directory / name).is_file() for name in whole)


def base_of(directory: Path) -> str:
    """What an adapter's files call the model that it changes: a hub id, or a folder, looked for relative to theirs first.

    Raises:
        ValueError: they name none, or another adapter.
    """
    base = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{directory / ADAPTER_CONFIG} names no base_model_name_or_path; write there which model the adapter was trained on"
        )
    base = str(directory / base) if (directory / base).is_dir() else base
    if is_adapter_folder(Path(base).expanduser()):
        raise ValueError(
            f"{directory / ADAPTER_CONFIG} names {base} as its base, which is an adapter too; merge that one first (gpt export)"
        )
    return base


def shape_of(directory: Path, base: GPTConfig) -> GPTConfig:
    """The shape of an adapter's model: its base's, with the head that the adapter was trained for.

    Raises:
        ValueError: it is for classes that neither its base nor a file beside it names.
    """
    where, names = directory / ADAPTER_CONFIG, directory / CLASS_NAMES
    task = read_json(where).get("task_type")
    head = next((head for head in ("sequence", "tokens") if _TASKS[head] == task), None)
    if head is None:
        return base
    if names.is_file():
        classes = class_names(read_json(names), str(names))
    elif base.head == head:
        classes = base.classes
    else:
        raise ValueError(
            f"{where}: task_type={task} is of a head for classes, and nothing says which they are; write them into {CLASS_NAMES} beside "
            'it, in the order of the head: {"0": "<a class>", "1": "<another>", ...}'
        )
    if (head, classes) == (base.head, base.classes):
        return base
    try:
        return replace(base, head=head, classes=classes, tie_embeddings=False)
    except ValueError as error:
        raise ValueError(f"{names}: {error}") from error


# Writing


@torch.no_grad()
def save_adapter(model: GPT, directory: str | Path, base: str, tokenizer: Any = None, card: str | None = None) -> None:
    """Write the adapters of a model as PEFT's files, and with them whatever else of it trains, such as a new head.

    `peft.PeftModel.from_pretrained(<the base in transformers>, directory)` then computes what `model` computes. Each file is written aside
    and moved into place, the config last.

    Args:
        model: with adapters; whole tensors.
        directory: made if it is not there.
        base: the model without adapters, a folder of `transformers` or a hub id; it goes into the config.
        tokenizer: a `gpt.data.tokenizer.Tokenizer`, or one of `transformers`; written beside.
        card: text of README.md.

    Raises:
        ValueError: the model has no adapters, or PEFT's format cannot hold what else of it trains.
    """
    layers = adapted(model)
    if not layers:
        raise ValueError("the model has no adapters, so there is nothing to write in PEFT's format; save it whole")
    directory, config = Path(directory).expanduser(), model.config
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, tuple[int, float]] = {}
    whole: list[str] = []
    trained = {name for name, p in model.named_parameters() if p.requires_grad} - adapter_parameters(model).keys()
    shared = "embeddings.tokens.weight" if config.tie_embeddings else ""
    if below := sorted(name for name in trained if name == shared or name.rpartition(".")[0] in layers):
        why = "the head shares it" if below[0] == shared else "it has an adapter too"
        raise ValueError(f"{below[0]} has been trained, and {why}, which PEFT's format cannot hold; the whole model can be saved")
    for stored in stored_tensors(config.n_layer, to_hf_config(config)):
        parts = {ours.removesuffix(".weight"): layers.get(ours.removesuffix(".weight")) for ours in stored.ours}
        name = stored.name.removesuffix(".weight")
        if stored.name.endswith(".weight") and any(parts.values()):
            of_module, ranks[name] = _packed(model, stored, parts)
            tensors |= {f"{_PREFIX}{name}.{key}": tensor for key, tensor in of_module.items()}
        elif any(ours in trained for ours in stored.ours):
            packed = stored.pack([model.get_parameter(ours).detach() for ours in stored.ours], config.n_head)
            tensors[_PREFIX + stored.name] = packed.cpu().contiguous()
            whole.append(stored.name.rpartition(".")[0])
    first = next(iter(layers.values()))
    rank, scale = Counter(ranks.values()).most_common(1)[0][0]
    alike = {name for name, count in Counter(map(_short, ranks)).items() if count == config.n_layer} if _uniform(ranks) else set()
    named = {short if (short := _short(name)) in alike else name: of for name, of in ranks.items()}
    values = {
        "peft_type": "LORA",
        "task_type": _TASKS[config.head],
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole(rank * scale),
        "lora_dropout": first.dropout,
        "target_modules": list(named),
        "rank_pattern": {name: r for name, (r, _) in named.items() if r != rank},
        "alpha_pattern": {name: _whole(r * s) for name, (r, s) in named.items() if r * s != rank * scale},
        "modules_to_save": list(dict.fromkeys(whole)) or None,
        "fan_in_fan_out": FAMILIES[to_hf_config(config)["model_type"]].is_conv1d,
        "bias": "none",
        "use_dora": first.magnitude is not None,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        if hasattr(tokenizer, "to_transformers"):
            tokenizer = tokenizer.to_transformers(config.context_length)
        tokenizer.save_pretrained(str(directory))
    if card is not None:
        (directory / "README.md").write_text(card, encoding="utf-8")
    aside = directory / f".{ADAPTER_WEIGHTS}"
    save_file(tensors, aside, metadata={"format": "pt"})
    aside.chmod(0o666 & ~_umask())  # it comes readable by its owner alone
    for name in (ADAPTER_CONFIG, CLASS_NAMES):  # of other weights
        (directory / name).unlink(missing_ok=True)
    os.replace(aside, directory / ADAPTER_WEIGHTS)
    if config.classes:
        names = json.dumps({str(number): name for number, name in enumerate(config.classes)}, ensure_ascii=False, indent=2)
        (directory / CLASS_NAMES).write_text(names + "\n", encoding="utf-8")
    aside = directory / f".{ADAPTER_CONFIG}"
    aside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, directory / ADAPTER_CONFIG)


def _packed(model: GPT, stored: StoredTensor, parts: Mapping[str, LoRALinear | None]) -> tuple[dict[str, Tensor], tuple[int, float]]:
    """The tensors of one adapter of PEFT, which may be several of ours; with its rank and scale."""
    there = [layer for layer in parts.values() if layer is not None]
    scale = there[0].scale
    stacked: list[Tensor] = []  # the different A's
    columns: dict[LoRALinear, slice] = {}
    for layer in there:
        start = 0
        for a in stacked:
            if torch.equal(a, layer.lora_a):  # of one adapter of PEFT, read and not trained since
                break
            start += len(a)
        else:
            stacked.append(layer.lora_a)
        columns[layer] = slice(start, start + layer.rank)
    rank = sum(map(len, stacked))
    b_parts, magnitudes = [], []
    for name, layer in parts.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        b = there[0].lora_b.new_zeros(linear.out_features, rank)
        if layer is not None:
            b[:, columns[layer]] = layer.lora_b * (layer.scale / scale)
        b_parts.append(b)
        magnitude = None if layer is None else layer.magnitude
        magnitudes.append(torch.linalg.vector_norm(linear.weight.float(), dim=1) if magnitude is None else magnitude)
    order = StoredTensor(stored.name, stored.ours, "by_head" if stored.layout == "by_head" else "linear")
    found = {"lora_A.weight": torch.cat(stacked), "lora_B.weight": order.pack(b_parts, model.config.n_head)}
    if there[0].magnitude is not None:
        found["lora_magnitude_vector"] = order.pack(magnitudes, model.config.n_head)
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in found.items()}, (rank, scale)


def _short(name: str) -> str:
    """A module's name within its block: `attn.c_proj` of `transformer.h.3.attn.c_proj`, which ends no other module's name."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[-1]


def _uniform(ranks: Mapping[str, tuple[int, float]]) -> bool:
    """Whether modules of one short name have one rank and scale in all blocks."""
    return all(len({of for other, of in ranks.items() if _short(other) == short}) == 1 for short in {*map(_short, ranks)})


def _whole(number: float) -> float:
    """As an int, which PEFT writes, where it is one."""
    return int(number) if number == int(number) else number


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Reading


def load_adapter(model: GPT, directory: str | Path, allow_pickle: bool = False) -> None:
    """Give a model the adapters that PEFT's files hold, in place; nothing but they, and what they replace, then trains.

    Args:
        model: the adapter's base, without adapters.
        directory: with adapter_config.json.
        allow_pickle: read adapter_model.bin where there are no safetensors; tensors only, none of its code is run.

    Raises:
        ValueError: the files are of another kind, or of another model.
    """
    adapter = read_adapter(Path(directory).expanduser(), model.config, allow_pickle)
    attach(model, adapter.ranks, adapter.dropout, adapter.dora)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in (adapter.tensors | adapter.replaced).items():
            if parameters[name].shape != tensor.shape:
                raise ValueError(f"{directory}: {name} has shape {(*tensor.shape,)} where the model's is {(*parameters[name].shape,)}")
            parameters[name].copy_(tensor)
    for name in adapter.tensors | adapter.replaced:
        parameters[name].requires_grad_(True)


def load_merged(base: GPT, directory: Path, allow_pickle: bool = False) -> GPT:
    """An adapter merged into its base; all of it can train, in evaluation mode.

    Args:
        base: the adapter's base, which is changed unless the adapter brings another head.
        directory, allow_pickle: as of `load_adapter`.

    Raises:
        ValueError: as of `load_adapter` and `shape_of`.
    """
    model, shape = base, shape_of(directory, base.config)
    if shape != base.config:
        table = base.embeddings.tokens.weight
        model = type(base).materialise(shape, table.device, table.dtype)
        adopt(model, shape, base, base.config)
    load_adapter(model, directory, allow_pickle)
    merge(model)
    return model.requires_grad_(True).eval()


def read_adapter(directory: Path, config: GPTConfig, allow_pickle: bool = False) -> Adapter:
    """An adapter's files, for a model of this shape.

    Raises:
        ValueError: as of `load_adapter`.
    """
    values = read_json(directory / ADAPTER_CONFIG)
    where = str(directory / ADAPTER_CONFIG)
    _refuse(values, where)
    hf = to_hf_config(config)
    family, head = FAMILIES[hf["model_type"]], head_name(hf)
    modules = {s.name.removesuffix(".weight"): s for s in stored_tensors(config.n_layer, hf) if s.name.endswith(".weight")}
    whole = {s.name: s for s in stored_tensors(config.n_layer, hf)}
    found: dict[str, dict[str, Tensor]] = {}
    adapter = Adapter(dropout=float(values.get("lora_dropout") or 0.0), dora=bool(values.get("use_dora")))
    for key, tensor in _read_tensors(directory, allow_pickle).items():
        name = key.removeprefix(_PREFIX)
        match = _KEY.match(name)
        inner = match[1] if match else name.replace(".modules_to_save.default", "").replace(".modules_to_save", "")
        if inner.partition(".")[0] not in (family.root, family.head, head, "lm_head"):
            inner = f"{family.root}.{inner}"  # trained on the body alone
        if match and inner in modules and any(".attention." in ours or ".feedforward." in ours for ours in modules[inner].ours):
            found.setdefault(inner, {})[match[2]] = tensor
        elif not match and (stored := whole.get(_head_name(inner, head))) is not None:
            if config.tie_embeddings and stored.ours[0] in ("embeddings.tokens.weight", "head.weight"):
                raise ValueError(
                    f"{directory} replaces {inner} alone, which the model shares between embedding and head; load it with peft"
                )
            adapter.replaced |= dict(zip(stored.ours, stored.unpack(tensor, config.n_head), strict=True))
        else:
            raise ValueError(f"{directory}: {key} changes no matrix inside a block of a {hf['model_type']} model; load this one with peft")
    if not found:
        raise ValueError(f"{directory} holds no adapter: no lora_A and lora_B is in its weights; copy it again")
    for name, tensors in found.items():
        needed = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if adapter.dora else set())
        if tensors.keys() != needed:
            odd = min(tensors.keys() ^ needed)
            raise ValueError(
                f"{directory}: {name} {'lacks' if odd in needed else 'has'} {odd}; its config and its weights must be of one adapter"
            )
        _unpack(adapter, modules[name], tensors, _scale(values, name, len(tensors["lora_A"])), config, directory)
    return adapter


def _unpack(
    adapter: Adapter, stored: StoredTensor, tensors: Mapping[str, Tensor], scale: float, config: GPTConfig, directory: Path
) -> None:
    """Add one adapter of PEFT, which may be several of ours: of each, only the rows of A that its rows of B use."""
    a, b = tensors["lora_A"], tensors["lora_B"]
    order = StoredTensor(stored.name, stored.ours, "by_head" if stored.layout == "by_head" else "linear")
    if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1]:
        raise ValueError(f"{directory}: {stored.name} has an A of shape {(*a.shape,)} and a B of {(*b.shape,)}, which cannot be multiplied")
    heads = config.n_head if stored.layout == "by_head" else 1
    if len(b) % (len(stored.ours) * heads):
        raise ValueError(
            f"{directory}: {stored.name} has a B of shape {(*b.shape,)}, which does not divide into q, k and v of {heads} heads"
        )
    parts = order.unpack(b, config.n_head)
    used = [part.any(0) for part in parts]
    any_used = any(bool(columns.any()) for columns in used)
    magnitudes = order.unpack(tensors["lora_magnitude_vector"], config.n_head) if adapter.dora else [None] * len(parts)
    for ours, part, columns, magnitude in zip(stored.ours, parts, used, magnitudes, strict=True):
        name = ours.removesuffix(".weight")
        if not columns.any():
            if any_used and not adapter.dora:
                continue  # this part of the matrix has no adapter
            columns = torch.ones_like(columns) if not any_used else torch.arange(len(columns)) == 0
        adapter.ranks[name] = int(columns.sum()), scale
        adapter.tensors |= {f"{name}.lora_a": a[columns], f"{name}.lora_b": part[:, columns]}
        if magnitude is not None:
            adapter.tensors[f"{name}.magnitude"] = magnitude.flatten()


def _refuse(values: Mapping[str, Any], where: str) -> None:
    if values.get("peft_type") != "LORA":
        raise ValueError(
            f"{where}: peft_type={json.dumps(values.get('peft_type'))} cannot be loaded, only LORA can; merge it with peft first"
        )
    for key in _UNSUPPORTED:
        if values.get(key):
            raise ValueError(
                f"{where}: {key}={json.dumps(values[key])} is not supported, and without it this would be another model; load it with peft"
            )
    if values.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias={json.dumps(values['bias'])} is not supported, only none is; merge it with peft first")
    if values.get("init_lora_weights") not in _PLAIN_STARTS:
        raise ValueError(
            f"{where}: init_lora_weights={json.dumps(values['init_lora_weights'])} changes the base's weights too; save it with peft's "
            "path_initial_model_for_weight_conversion, or merge it with peft first"
        )
    for key in ("r", "lora_alpha"):
        if type(values.get(key)) not in (int, float) or values[key] <= 0:
            raise ValueError(f"{where}: {key}={json.dumps(values.get(key))} must be a number greater than 0")


def _scale(values: Mapping[str, Any], name: str, rank: int) -> float:
    """What PEFT multiplies an adapter by: `alpha_pattern` counts before `lora_alpha`, the first that matches the end of the name."""
    patterns: Mapping[str, float] = values.get("alpha_pattern") or {}
    alpha = next((alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), values["lora_alpha"])
    return float(alpha) / (rank**0.5 if values.get("use_rslora") else rank)


def _head_name(name: str, head: str) -> str:
    return f"{head}.weight" if name == "lm_head.weight" else name


def _read_tensors(directory: Path, allow_pickle: bool) -> dict[str, Tensor]:
    file = directory / ADAPTER_WEIGHTS
    if file.is_file():
        try:
            with safe_open(file, framework="pt") as opened:
                names = opened.keys()
                return {name: opened.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error}); copy it again") from error
    if not (directory / ADAPTER_PICKLE).is_file():
        raise ValueError(f"{directory} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}; copy it there too")
    if not allow_pickle:
        raise ValueError(
            f"{directory} has its weights only as {ADAPTER_PICKLE}, and pickled files can hold code; allow_pickle=true would load their "
            "tensors and run nothing; or convert them to safetensors with peft"
        )
    return unpickle(directory / ADAPTER_PICKLE)
