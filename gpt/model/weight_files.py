"""The files of a checkpoint: where they are, which tensors they hold, and those tensors one after another.

Knows nothing of architectures. No more than one file is open, and no more of it in memory than a few tensors.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CLASS_NAMES = "id2label.json"  # beside an adapter
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja")
BYTES_PER_MAPPING = 32 * 2**20
# torch's dtypes in the words of safetensors, as far as a model may have them.
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class TensorHeader:
    """What is known of a tensor before it is read."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """F32, BF16 ... as safetensors has them."""


def find_checkpoint(path: str | Path, allow_pickle: bool = False) -> Path:
    """The local directory of a checkpoint; one at the Hugging Face hub is downloaded first, with its tokenizer.

    Args:
        path: a directory or a hub id.
        allow_pickle: download pytorch_model.bin where there are no safetensors.

    Raises:
        ValueError: it is neither here nor at the hub.
    """
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
    settings = ["config.json", "generation_config.json", "adapter_config.json", CLASS_NAMES]
    wanted = [*settings, *TOKENIZER_FILES, "*.safetensors", "*.safetensors.index.json"]
    try:
        # What lies in folders is the same model for other programs.
        found = Path(snapshot_download(path, allow_patterns=wanted, ignore_patterns=["*/*"]))
        if allow_pickle and not any(found.glob("*.safetensors")):
            snapshot_download(path, allow_patterns=["pytorch_model*.bin", "adapter_model.bin", PICKLE_INDEX], ignore_patterns=["*/*"])
    except (OSError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"no directory {path!r} in {Path.cwd()}, and it cannot be had from the Hugging Face hub: {reason}") from error
    return found


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file is not there, or holds no object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file.parent} has no {file.name}; a Hugging Face checkpoint needs one") from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}; copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object; copy it again")
    return content


def read_headers(directory: Path, allow_pickle: bool = False) -> list[TensorHeader]:
    """Name, shape and dtype of every tensor in a checkpoint's files, which are opened one at a time.

    Args:
        directory: of the checkpoint.
        allow_pickle: read pytorch_model.bin, if there are no safetensors.

    Raises:
        ValueError: there are no weights, a file is missing or broken, or they are pickled and must not be read.
    """
    headers = []
    for file in _files(directory, allow_pickle):
        if file.suffix == ".bin":
            headers += [TensorHeader(file, k, tuple(t.shape), DTYPE_NAMES.get(t.dtype, str(t.dtype))) for k, t in unpickle(file).items()]
            continue
        try:
            with safe_open(file, framework="pt") as opened:
                names = opened.keys()
                slices = {name: opened.get_slice(name) for name in names}
                headers += [TensorHeader(file, key, tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()]
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error}); copy it again") from error
    return headers


def read_tensors(headers: Iterable[TensorHeader], keep: bool = False) -> Iterator[tuple[TensorHeader, Tensor]]:
    """The tensors of these headers on the CPU, file by file.

    Each is mapped from its file, privately: what is written into it does not reach the file. What is read of it counts as used
    memory for as long as any tensor of its mapping lives, so a file is mapped anew every 32 MB.

    Args:
        headers: from `read_headers`.
        keep: the caller keeps all the tensors; one mapping for each file is enough.
    """
    by_file: dict[Path, list[TensorHeader]] = {}
    for header in headers:
        by_file.setdefault(header.file, []).append(header)
    for file, wanted in by_file.items():
        if file.suffix == ".bin":
            content = unpickle(file)
            yield from ((header, content[header.name]) for header in wanted)
            continue
        while wanted:
            read = 0
            with safe_open(file, framework="pt") as opened:
                while wanted and (keep or read < BYTES_PER_MAPPING):
                    header = wanted.pop(0)
                    tensor = opened.get_tensor(header.name)
                    read += tensor.nbytes
                    yield header, tensor


def _files(directory: Path, allow_pickle: bool) -> list[Path]:
    for whole, index in ((WEIGHTS, INDEX), (PICKLE, PICKLE_INDEX)):
        if (directory / whole).is_file():
            names = [whole]
        elif (directory / index).is_file():
            weight_map = read_json(directory / index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{directory / index} has no weight_map; copy it again")
            names = sorted({str(name) for name in weight_map.values()})
        else:
            continue
        if whole == PICKLE and not allow_pickle:
            raise ValueError(
                f"{directory} has its weights only as {whole if names == [whole] else index}, and pickled files can hold code; "
                "allow_pickle=true would load their tensors and run nothing; or convert them to safetensors with transformers"
            )
        for name in names:
            if Path(name).name != name or Path(name).suffix != Path(whole).suffix or not (directory / name).is_file():
                raise ValueError(f"{directory}: {index} names the file {name}, which is not there; copy it too")
        return [directory / name for name in names]
    raise ValueError(
        f"{directory} has neither {WEIGHTS} nor {INDEX}; copy the weights there "
        "(from the hub, pickled ones come only with allow_pickle=true)"
    )


def unpickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote; mapped, where it is not of the format before torch 1.6."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} is not made of tensors alone, and may be harmful; none of its code was run. Do not use it") from error
    except (RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        raise ValueError(
            f"{file} is not a whole file of torch.save ({type(error).__name__}: {str(error)[:80]!r}); copy it again"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) and t.layout is torch.strided for t in content.values()):
        raise ValueError(f"{file} does not hold tensors by their names; it is not the weights of a model of transformers")
    return content
