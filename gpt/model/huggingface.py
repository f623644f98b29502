"""A GPT from and to a Hugging Face directory of a stock architecture: config.json, safetensors, tokenizer files.

Both are read and written here, without `transformers`; what stands in them is `gpt.model.architectures`' business.
"""

from __future__ import annotations

import functools
import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpt.model.architectures import FAMILIES, StoredTensor, complete, from_hf_config, stored_tensors, to_hf_config
from gpt.model.config import GPTConfig
from gpt.model.transformer import GPT

MAX_SHARD_BYTES = 5 * 10**9
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Buffers that old checkpoints hold beside the weights: causal masks and rotary frequencies.
NOT_WEIGHTS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")


@torch.no_grad()
def load_pretrained(cls: type[GPT], path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> GPT:
    """Load a checkpoint of a stock architecture, tensor by tensor, into a model that is allocated once.

    Args:
        cls: GPT or a subclass.
        path: a directory with config.json and safetensors, or a Hugging Face hub id.
        device: where the model goes.
        dtype: of the parameters; None: the checkpoint's own (with several, the smallest that holds them all).

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: no such checkpoint, an architecture or a setting that we do not implement, or tensors that do not fit.
    """
    directory = _find(path)
    where = str(directory / "config.json")
    values = complete(_read_json(directory / "config.json"), where)
    config = from_hf_config(values, where)
    expected = list(stored_tensors(config.n_layer, values))
    with ExitStack() as stack:
        found = _open_weights(directory, values, stack)
        _check_names(directory, expected, found, values)
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in cls(config).named_parameters()}
        dtypes = {_check_tensor(directory, stored, found, shapes, config) for stored in expected}
        model = cls.materialise(config, device, dtype or functools.reduce(torch.promote_types, dtypes))
        empty = dict(model.named_parameters())
        for stored in expected:
            file, name = found[stored.name]
            for ours, part in zip(stored.ours, stored.unpack(file.get_tensor(name), config.n_head), strict=True):
                if ours in shapes:
                    empty.pop(ours).copy_(part)
                elif part.count_nonzero():
                    raise ValueError(f"{directory}: {stored.name} is not zero, and GPT has no bias there; load this one with transformers")
    for name, parameter in empty.items():
        assert name.endswith(".bias"), name
        parameter.zero_()  # the checkpoint has biases elsewhere, ours has them everywhere or nowhere
    return model.eval()


def _find(path: str | Path) -> Path:
    """The local directory of a checkpoint; one at the hub is downloaded first."""
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ValueError(f"{path} is a file; give the directory that holds config.json and {WEIGHTS}")
    if not isinstance(path, str) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise ValueError(f"no such directory: {path} (looked in {Path.cwd()}); give one with config.json and {WEIGHTS}, or a hub id")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise ValueError(f"no such directory: {path}; to load it from the hub, `pip install huggingface_hub`") from error
    try:
        return Path(snapshot_download(path, allow_patterns=["config.json", "*.safetensors", "*.safetensors.index.json"]))
    except (OSError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"no directory {path!r} in {Path.cwd()}, and it cannot be had from the Hugging Face hub: {reason}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file.parent} has no {file.name}; a Hugging Face checkpoint needs one") from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}; copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object; copy it again")
    return content


def _open_weights(directory: Path, values: dict[str, Any], stack: ExitStack) -> dict[str, tuple[Any, str]]:
    """Open the checkpoint's files: the tensor's full name -> (its open file, its name in there)."""
    names = [WEIGHTS]
    if not (directory / WEIGHTS).is_file():
        if not (directory / INDEX).is_file():
            pickles = ", ".join(sorted(p.name for p in directory.glob("*.bin")))
            reason = f"; {pickles} holds pickled code and is not read: convert it to safetensors with transformers' save_pretrained"
            raise ValueError(f"{directory} has neither {WEIGHTS} nor {INDEX}{reason if pickles else '; copy the weights there'}")
        names = sorted(set(_read_json(directory / INDEX).get("weight_map", {}).values()))
    found = {}
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise ValueError(f"{directory}: {INDEX} names the file {name}, which is not there; copy it too")
        try:
            file = stack.enter_context(safe_open(directory / name, framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{directory / name} is not a whole safetensors file ({error}); copy it again") from error
        found |= {key: (file, key) for key in file.keys() if not NOT_WEIGHTS.search(key)}  # noqa: SIM118 (not a dict)
    family = FAMILIES[values["model_type"]]
    heads = {"lm_head.weight", f"{family.head}.weight"}
    # Saved from the body alone, as OpenAI's GPT-2 was, the names lack the first part.
    root = "" if any(key.startswith(family.root + ".") for key in found) else family.root + "."
    return {f"{family.head}.weight" if key in heads else root + key: entry for key, entry in found.items()}


def _check_names(directory: Path, expected: list[StoredTensor], found: dict[str, tuple[Any, str]], values: dict[str, Any]) -> None:
    head_name = f"{FAMILIES[values['model_type']].head}.weight"
    if values["tie_word_embeddings"] and head_name in found:
        head = found.pop(head_name)
        tokens = found.setdefault(expected[0].name, head)  # some writers keep the shared tensor under the head's name alone
        if tokens is not head and not torch.equal(*(file.get_tensor(name) for file, name in (tokens, head))):
            raise ValueError(
                f"{directory}: {head_name} differs from the token embedding, which tie_word_embeddings=true says it is; "
                "set tie_word_embeddings to false in config.json, or remove the tensor"
            )
    names = {stored.name for stored in expected}
    for problem, wrong in (("lacks", names - set(found)), ("has, beyond what config.json describes,", set(found) - names)):
        if wrong:
            listed = ", ".join(sorted(wrong)[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            raise ValueError(f"{directory} {problem} {listed}; its config.json and its weights must be of one model")


def _check_tensor(
    directory: Path, stored: StoredTensor, found: dict[str, tuple[Any, str]], shapes: dict[str, torch.Size], config: GPTConfig
) -> torch.dtype:
    """The dtype of a stored tensor, after a look at its header."""
    file, name = found[stored.name]
    header = file.get_slice(name)
    parts = [torch.empty(_shape(ours, shapes), device="meta") for ours in stored.ours]
    shape = tuple(stored.pack(parts, config.n_head).shape)
    if tuple(header.get_shape()) != shape:
        raise ValueError(f"{directory}: {stored.name} has shape {tuple(header.get_shape())} where config.json asks for {shape}")
    if header.get_dtype() not in DTYPES:
        raise ValueError(f"{directory}: {stored.name} is {header.get_dtype()}, and only {', '.join(DTYPES)} can be loaded")
    return DTYPES[header.get_dtype()]


def _shape(name: str, shapes: dict[str, torch.Size]) -> torch.Size:
    """The shape of one of our parameters, also of a bias that this model does not have."""
    return shapes[name] if name in shapes else shapes[name.removesuffix("bias") + "weight"][:1]


@torch.no_grad()
def save_pretrained(model: GPT, directory: str | Path, tokenizer: Any = None, dtype: torch.dtype | None = None) -> None:
    """Write a directory that `transformers` loads with no code of ours: config, weights, and the tokenizer if given.

    Args:
        model: what to write; whole tensors, adapters merged.
        directory: made if it is not there; weights that it holds are replaced.
        tokenizer: a `gpt.data.tokenizer.Tokenizer`, or a `transformers` tokenizer.
        dtype: of the written weights; None: the model's own.

    Raises:
        ValueError: the tokenizer has ids that the model does not, or the model has parameters that its architecture cannot hold.
    """
    directory = Path(directory)
    config = model.config
    values = to_hf_config(config)
    expected = list(stored_tensors(config.n_layer, values))
    ours: dict[str, Tensor] = dict(model.named_parameters())
    if surplus := set(ours) - {name for stored in expected for name in stored.ours} - {"head.weight"}:
        raise ValueError(f"{values['architectures'][0]} cannot hold the parameter {min(surplus)}; merge adapters before saving")
    tied = model.head.weight is model.embeddings.tokens.weight
    assert tied == config.tie_embeddings, f"tie_embeddings={config.tie_embeddings}, but the head is {'' if tied else 'not '}the embedding"
    ours["head.weight"] = model.head.weight
    token_dtype = ours["embeddings.tokens.weight"].dtype
    ids = _token_ids(tokenizer, config.vocab_size)
    dtype_name = str(dtype or token_dtype).removeprefix("torch.")
    values |= {"bos_token_id": ids.get("bos_token_id"), "eos_token_id": ids.get("eos_token_id")}
    values |= {"dtype": dtype_name, "torch_dtype": dtype_name}

    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; give a directory to write the model into")
    directory.mkdir(parents=True, exist_ok=True)
    # Left-over weights would be loaded in place of these, and a file that is mapped elsewhere must not change under its reader.
    for old in (directory / WEIGHTS, directory / INDEX, *directory.glob("model-*-of-*.safetensors")):
        old.unlink(missing_ok=True)
    _write_json(directory / "config.json", values)
    _write_json(directory / "generation_config.json", ids)

    shards = _shards(expected, ours, config, (dtype or token_dtype).itemsize)
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            stored.name: stored.pack([_exported(model, ours, name, dtype) for name in stored.ours], config.n_head).contiguous()
            for stored in shard
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        _write_json(directory / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
    if tokenizer is not None:
        if hasattr(tokenizer, "to_transformers"):
            tokenizer = tokenizer.to_transformers(config.context_length)
        tokenizer.save_pretrained(str(directory))


def _exported(model: GPT, ours: dict[str, Tensor], name: str, dtype: torch.dtype | None) -> Tensor:
    """One parameter as the stock class needs it, on the CPU: scaled, or made up where it has it and our model has not."""
    config, tokens = model.config, ours["embeddings.tokens.weight"]
    tensor = ours.get(name)
    if tensor is None and name == "embeddings.positions.weight":
        sinusoidal = config.positions == "sinusoidal"
        tensor = model.embeddings.get_buffer("table") if sinusoidal else torch.zeros(config.context_length, config.d_model)
        tensor = tensor.to(tokens.dtype)
    elif tensor is None:
        weight = ours[name.removesuffix("bias") + "weight"]
        tensor = weight.new_zeros(weight.shape[0])
    elif tensor is tokens and config.embedding_scale != 1.0 and name != "head.weight":
        tensor = tensor * config.embedding_scale
    return tensor.detach().to("cpu", dtype or tensor.dtype)


def _shards(expected: list[StoredTensor], ours: dict[str, Tensor], config: GPTConfig, itemsize: int) -> list[list[StoredTensor]]:
    """Consecutive tensors in groups of at most MAX_SHARD_BYTES (a single larger tensor has one of its own)."""
    shapes = {"embeddings.positions.weight": torch.Size((config.context_length, config.d_model))} | {n: p.shape for n, p in ours.items()}
    shards: list[list[StoredTensor]] = [[]]
    filled = 0
    for stored in expected:
        size = itemsize * sum(_shape(name, shapes).numel() for name in stored.ours)
        if shards[-1] and filled + size > MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(stored)
        filled += size
    return shards


def _token_ids(tokenizer: Any, vocab_size: int) -> dict[str, int]:
    """bos, eos and pad ids, those that there are. pad stands only in generation_config.json: in config.json it would
    make the stock classes' embedding of that token untrainable."""
    if tokenizer is None:
        return {}
    if hasattr(tokenizer, "to_transformers"):
        count, end = tokenizer.vocab_size, tokenizer.end_of_text
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    else:
        count = len(tokenizer)
        ids = {key: getattr(tokenizer, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if count > vocab_size:
        raise ValueError(f"the tokenizer has {count} ids and the model vocab_size={vocab_size}; they must be of one run")
    return {key: value for key, value in ids.items() if value is not None}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
