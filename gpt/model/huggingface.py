"""A GPT from and to a Hugging Face directory of a stock architecture: config.json, safetensors, tokenizer files.

Both are read and written here, without `transformers`; what stands in them is `gpt.model.architectures`' business, and
where the files are and how they are opened that of `gpt.model.weight_files`.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpt.model.architectures import FAMILIES, StoredTensor, complete, from_hf_config, head_name, head_of, stored_tensors, to_hf_config
from gpt.model.config import GPTConfig
from gpt.model.lora import LoRALinear, adapted, adapter_parameters
from gpt.model.peft_files import base_of, is_adapter_folder, load_merged, shape_of
from gpt.model.transformer import GPT
from gpt.model.weight_files import INDEX, TOKENIZER_FILES, WEIGHTS, TensorHeader, find_checkpoint, read_headers, read_json, read_tensors

MAX_SHARD_BYTES = 5 * 10**9
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Buffers that old checkpoints hold beside the weights: causal masks and rotary frequencies.
NOT_WEIGHTS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")


@torch.no_grad()
def load_pretrained(
    cls: type[GPT],
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
) -> GPT:
    """Load a checkpoint of a stock architecture, tensor by tensor, into a model that is allocated once.

    Names, shapes and dtypes of all tensors are checked before that. The peak of memory is the model and a part of one file.
    On the CPU, weights stay mapped from the file where its dtype is ours and its layout a view of ours: do not change the file in
    place while the model lives (`save_pretrained` does not, it replaces it).

    Args:
        cls: GPT or a subclass.
        path: a directory with config.json and safetensors, or a Hugging Face hub id; or either of an adapter in PEFT's format, whose
            base is then loaded and the adapter merged into it.
        device: where the model goes.
        dtype: of the parameters; None: the checkpoint's own (with several, the smallest that holds them all).
        allow_pickle: read pytorch_model.bin where there are no safetensors; tensors only, none of its code is run.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: no such checkpoint, an architecture or a setting that we do not implement, or tensors that do not fit.
    """
    directory = find_checkpoint(path, allow_pickle)
    if is_adapter_folder(directory):
        return load_merged(load_pretrained(cls, base_of(directory), device, dtype, allow_pickle), directory, allow_pickle)
    where = str(directory / "config.json")
    values = complete(read_json(directory / "config.json"), where)
    config = from_hf_config(values, where)
    expected = {stored.name: stored for stored in stored_tensors(config.n_layer, values)}
    found = _full_names(directory, read_headers(directory, allow_pickle), values)
    _check_names(directory, list(expected), found, values)
    with torch.device("meta"), _NoInit():
        shapes = {name: p.shape for name, p in cls(config).named_parameters()}
    dtypes = {_check_tensor(directory, stored, found[name], shapes) for name, stored in expected.items()}

    dtype = dtype or functools.reduce(torch.promote_types, dtypes)
    with _NoInit():
        model = cls.materialise(config, device, dtype)
    # What is the same in memory as in its file is mapped from it, privately, as in `transformers`: what is not used is not read, and
    # a page is copied when it is written to. What is copied goes through mappings of its own, or all that was read of them would stay.
    mapped = {
        found[name]
        for name, stored in expected.items()
        if model.head.weight.is_cpu
        and stored.layout != "by_head"  # GPT-2's matrices are ours, transposed: a view
        and (DTYPES[found[name].dtype], found[name].file.suffix) == (dtype, ".safetensors")
    }
    copied = [header for header in found.values() if header not in mapped]
    names = {header: name for name, header in found.items()}
    empty = dict(model.named_parameters())
    for header, tensor in chain(read_tensors(mapped, keep=True), read_tensors(copied)):
        stored = expected[names[header]]
        for ours, part in zip(stored.ours, stored.unpack(tensor, config.n_head), strict=True):
            if ours not in shapes:
                if part.count_nonzero():
                    raise ValueError(f"{directory}: {stored.name} is not zero, and GPT has no bias there; load this one with transformers")
            elif header in mapped:
                empty.pop(ours).data = part
            else:
                parameter = empty.pop(ours)
                # A transposed copy is fast only of whole rows and within one dtype.
                parameter.copy_(part if part.is_contiguous() else part.t().contiguous().t().to(parameter.dtype))
    for name, parameter in empty.items():
        assert name.endswith(".bias"), name
        parameter.zero_()  # the checkpoint has biases elsewhere, ours has them everywhere or nowhere
    return model.eval()


def read_config(directory: Path) -> GPTConfig:
    """The shape of the model in a directory with a config.json, or of that of an adapter in PEFT's format.

    Raises:
        ValueError: there is none, or it says something that our model does not compute.
    """
    if is_adapter_folder(directory):
        return shape_of(directory, read_config(find_checkpoint(base_of(directory))))
    where = directory / "config.json"
    return from_hf_config(complete(read_json(where), str(where)), str(where))


class _NoInit(TorchFunctionMode):
    """Allocate weights and leave them so. On the meta device, initialisers and empty_like import torch's compiler: over a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty_like:
            return torch.empty(args[0].shape, dtype=args[0].dtype, **kwargs)
        return kwargs["tensor"] if getattr(func, "__module__", None) == "torch.nn.init" else func(*args, **kwargs)


def _full_names(directory: Path, headers: list[TensorHeader], values: dict[str, Any]) -> dict[str, TensorHeader]:
    """Every weight of the checkpoint by the name that the stock class gives it."""
    weights = [header for header in headers if not NOT_WEIGHTS.search(header.name)]
    family, head = FAMILIES[values["model_type"]], head_name(values)
    heads = {f"{head}.weight": f"{head}.weight", f"{head}.bias": f"{head}.bias"}
    if head_of(values) == "language_model":
        heads["lm_head.weight"] = f"{head}.weight"
    # Saved from the body alone, as OpenAI's GPT-2 was, the names lack the first part.
    root = "" if any(header.name.startswith(family.root + ".") for header in weights) else family.root + "."
    found: dict[str, TensorHeader] = {}
    for header in weights:
        name = heads.get(header.name) or root + header.name
        if name in found:
            raise ValueError(f"{directory}: {name} is there twice, in {found[name].file.name} and {header.file.name}; remove one")
        found[name] = header
    return found


def _check_names(directory: Path, expected: list[str], found: dict[str, TensorHeader], values: dict[str, Any]) -> None:
    name = f"{head_name(values)}.weight"
    if head_of(values) == "language_model" and values["tie_word_embeddings"] and name in found:
        head = found.pop(name)
        tokens = found.setdefault(expected[0], head)  # some writers keep the shared tensor under the head's name alone
        if tokens is not head and not torch.equal(*(tensor for _, tensor in [*read_tensors([tokens]), *read_tensors([head])])):
            raise ValueError(
                f"{directory}: {name} differs from the token embedding, which tie_word_embeddings=true says it is; "
                "set tie_word_embeddings to false in config.json, or remove the tensor"
            )
    for problem, wrong in (("lacks", {*expected} - {*found}), ("has, beyond what config.json describes,", {*found} - {*expected})):
        if wrong:
            listed = ", ".join(sorted(wrong)[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            raise ValueError(f"{directory} {problem} {listed}; its config.json and its weights must be of one model")


def _check_tensor(directory: Path, stored: StoredTensor, header: TensorHeader, shapes: dict[str, torch.Size]) -> torch.dtype:
    """The dtype of a stored tensor, when its header is what it should be."""
    shape = stored.shape([_shape(ours, shapes) for ours in stored.ours])
    if header.shape != shape:
        raise ValueError(f"{directory}: {stored.name} has shape {header.shape} where config.json asks for {shape}")
    if header.dtype not in DTYPES:
        raise ValueError(f"{directory}: {stored.name} is {header.dtype}, and only {', '.join(DTYPES)} can be loaded")
    return DTYPES[header.dtype]


def _shape(name: str, shapes: dict[str, torch.Size]) -> torch.Size:
    """The shape of one of our parameters, also of a bias that this model does not have."""
    return shapes[name] if name in shapes else shapes[name.removesuffix("bias") + "weight"][:1]


@torch.no_grad()
def save_pretrained(
    model: GPT, directory: str | Path, tokenizer: Any = None, dtype: torch.dtype | None = None, card: str | None = None
) -> None:
    """Write a directory that `transformers` loads with no code of ours: config, weights, and the tokenizer if given.

    Everything is written into a folder inside it and then moved into place, config.json last: a save that fails leaves
    what was there, one that is killed while moving leaves a directory without config.json, which nothing loads.

    Args:
        model: what to write; whole tensors. Adapters are merged in what is written, and stay as they are in the model.
        directory: made if it is not there; weights that it holds are replaced.
        tokenizer: a `gpt.data.tokenizer.Tokenizer`, or a `transformers` tokenizer.
        dtype: of the written weights; None: the model's own.
        card: text of README.md, the model card.

    Raises:
        ValueError: the tokenizer has ids that the model does not, or the model has parameters that its architecture cannot hold.
    """
    directory, config = Path(directory).expanduser(), model.config
    values = to_hf_config(config)
    expected = list(stored_tensors(config.n_layer, values))
    adapters = adapter_parameters(model)
    ours: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if name not in adapters}
    surplus = ours.keys() - {name for stored in expected for name in stored.ours}
    if surplus:
        raise ValueError(f"{values['architectures'][0]} cannot hold the parameter {min(surplus)}; save a model without it")
    tied = model.head.weight is model.embeddings.tokens.weight
    assert tied == config.tie_embeddings, f"tie_embeddings={config.tie_embeddings}, but the head is {'' if tied else 'not '}the embedding"
    ours["head.weight"] = model.head.weight
    token_dtype = ours["embeddings.tokens.weight"].dtype
    if tokenizer is not None:
        count = tokenizer.vocab_size if hasattr(tokenizer, "to_transformers") else len(tokenizer)
        if count > config.vocab_size:
            raise ValueError(f"the tokenizer has {count} ids and the model vocab_size={config.vocab_size}; they must be of one run")
        if hasattr(tokenizer, "to_transformers"):
            tokenizer = tokenizer.to_transformers(config.context_length)
        if config.head != "language_model" and tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
            tokenizer = copy.deepcopy(tokenizer)  # the caller's stays as it is
            tokenizer.pad_token = tokenizer.eos_token
        if config.head == "sequence" and tokenizer.pad_token_id is None:
            warnings.warn(
                "the tokenizer names neither padding nor an end of text: config.json gets no pad_token_id, and "
                f"{values['architectures'][0]} then takes one text at a time",
                stacklevel=3,
            )
    ids = {key: getattr(tokenizer, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids = {key: value for key, value in ids.items() if value is not None}
    dtype_name = str(dtype or token_dtype).removeprefix("torch.")
    values |= {"bos_token_id": ids.get("bos_token_id"), "eos_token_id": ids.get("eos_token_id")}
    # For a language model pad stands only in generation_config.json: in config.json it would make the stock classes' embedding of it
    # untrainable. The stock classes of classifiers find the last token of each text by it, and take one text at a time without.
    if config.head != "language_model":
        values["pad_token_id"] = ids.get("pad_token_id")
    values |= {"dtype": dtype_name, "torch_dtype": dtype_name}
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; give a directory to write the model into")
    directory.mkdir(parents=True, exist_ok=True)
    aside = directory / ".unfinished"
    shutil.rmtree(aside, ignore_errors=True)  # of a save that was killed
    aside.mkdir()
    try:
        if tokenizer is not None:
            tokenizer.save_pretrained(str(aside))
        if card is not None:
            (aside / "README.md").write_text(card, encoding="utf-8")
        _write_weights(model, ours, _shards(expected, ours, config, (dtype or token_dtype).itemsize), dtype, aside)
        _write_json(aside / "config.json", values)
        if config.head == "language_model":
            _write_json(aside / "generation_config.json", ids)
        for file in aside.glob("*.safetensors"):  # which come readable by their owner alone
            shutil.copymode(aside / "config.json", file)
        _move_into_place(aside, directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_weights(
    model: GPT, ours: dict[str, Tensor], shards: list[list[StoredTensor]], dtype: torch.dtype | None, directory: Path
) -> None:
    weight_map: dict[str, str] = {}
    total_size = 0
    layers = {f"{name}.weight": layer for name, layer in adapted(model).items()}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            stored.name: stored.pack(
                [_exported(model, ours, layers, name, dtype) for name in stored.ours], model.config.n_head
            ).contiguous()
            for stored in shard
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        _write_json(directory / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def _move_into_place(aside: Path, directory: Path) -> None:
    """Replace the model in `directory` by the whole one in `aside`. Left-overs would be loaded in place of what is new."""
    files = sorted((f for f in aside.rglob("*") if f.is_file()), key=lambda f: f.name == "config.json")
    stale = ["config.json", "generation_config.json", WEIGHTS, INDEX, "model-*-of-*.safetensors"]
    if (aside / "tokenizer_config.json").exists():
        stale += TOKENIZER_FILES
    for pattern in stale:
        for old in directory.glob(pattern):
            if not old.is_dir():
                old.unlink()
    for file in files:
        target = directory / file.relative_to(aside)
        target.parent.mkdir(exist_ok=True)
        os.replace(file, target)


def _exported(model: GPT, ours: dict[str, Tensor], layers: dict[str, LoRALinear], name: str, dtype: torch.dtype | None) -> Tensor:
    """One parameter as the stock class needs it, on the CPU: merged, scaled, or made up where it has it and our model has not."""
    config, tokens = model.config, ours["embeddings.tokens.weight"]
    tensor = layers[name].merged_weight() if name in layers else ours.get(name)
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


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
