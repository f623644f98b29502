"""What a run reads on this machine, as input channels of its job: each path of the config becomes one in the container.

Files keep their names and their order there, so that the job reads the same text as a run here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from gpt.arguments import expanded
from gpt.aws.shipping import Upload, uploads_below
from gpt.aws.validation import with_channels
from gpt.config import RunConfig
from gpt.data.files import list_files
from gpt.errors import UserError
from gpt.typed import nearest

ROOT = "/opt/ml"
"""Of everything that SageMaker lays out in a container."""
CHANNELS = f"{ROOT}/input/data"
CODE = "code"
"""The channel of what is run."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_WEIGHTS = (".safetensors", ".json", ".jinja", ".txt", ".model")
_BESIDE_TOKENIZER = ("tokenizer_config.json", "chat_template.jinja")


class Inputs:
    """The channels of a job, and the uploads behind them.

    Args:
        root: s3 uri below which inputs go by their content, without a slash at its end.

    Attributes:
        channels: name -> s3 uri.
        uploads: what must lie there.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.channels: dict[str, str] = {}
        self.uploads: list[Upload] = []
        self._shipped: dict[str, str] = {}  # real path -> path in the container

    def add(self, name: str, uri: str, key: str) -> str:
        """Make a channel of what lies in S3; returns its folder in the container.

        Raises:
            UserError: there is one of that name.
        """
        if name in (CODE, *self.channels):
            what = "is that of the code" if name == CODE else "is taken by another input"
            raise UserError(f"{key}: the channel {name} {what}; give it another name, such as {name}.mine")
        self.channels[name] = uri
        return f"{CHANNELS}/{name}"

    def ship(self, name: str, files: Mapping[str, Path], key: str) -> str:
        """Make a channel of files of this machine; returns its folder in the container."""
        folder = self.add(name, "", key)
        self.channels[name], uploads = uploads_below(self.root, files, key)
        self.uploads += uploads
        for inside, path in files.items():
            self._shipped.setdefault(os.path.realpath(path), f"{folder}/{inside}")
        return folder

    def place(self, path: Path) -> str | None:
        """Where a file that is shipped already is in the container."""
        return self._shipped.get(os.path.realpath(path))


def read_inputs(config: RunConfig, root: str) -> tuple[Inputs, dict[str, Any]]:
    """The channels that a config asks for, and the config, as plain values, with every path of this machine replaced.

    Args:
        config: of the run.
        root: s3 uri below which inputs go.

    Raises:
        UserError: something that it names is not there, cannot be read or cannot be shipped.
    """
    config = with_channels(config)
    inputs, values = Inputs(root), config.to_dict()
    values["init"] = _ship_model(inputs, "init", config.init, config.allow_pickle, "init")
    values["distill"]["teacher"] = _ship_model(inputs, "teacher", config.distill.teacher, config.allow_pickle, "distill.teacher")
    values["tokenizer"]["path"] = _ship_tokenizer(inputs, config.tokenizer.path, "tokenizer.path")
    if config.adapt_tokenizer != "train":
        values["adapt_tokenizer"] = _ship_tokenizer(inputs, config.adapt_tokenizer, "adapt_tokenizer")
    _ship_channels(inputs, config.launch.channels)
    for section, name, key in [(values["data"], "train", "data"), *_parts(values["data"])]:
        section["paths"] = _ship_data(inputs, section["paths"], name, f"{key}.paths", config.launch.channels)
        folder = expanded(section["name"])
        if section["source"] == "hf" and folder.is_dir():
            inside = {f"{folder.resolve().name}/{file}": path for file, path in _listed(str(folder), f"{key}.name").items()}
            channel = "dataset" if key == "data" else f"{name}.dataset"
            section["name"] = f"{inputs.ship(channel, inside, f'{key}.name')}/{folder.resolve().name}"
    return inputs, values


def _parts(data: dict[str, Any]) -> list[tuple[dict[str, Any], str, str]]:
    return [(part, f"part{number}", f"data.parts[{number}]") for number, part in enumerate(data["parts"])]


def _ship_channels(inputs: Inputs, channels: Mapping[str, str]) -> None:
    """Those of launch.channels."""
    for name, source in channels.items():
        key = f"launch.channels.{name}"
        if source.startswith("s3://"):
            inputs.add(name, _folder_uri(source, key), key)
        elif _URL.match(source):
            raise UserError(f"{key}={source}: an input channel comes from S3 or from this machine; give an s3 uri or a folder")
        else:
            inputs.ship(name, _listed(source, key), key)


def _ship_data(inputs: Inputs, paths: list[str], name: str, key: str, given: Mapping[str, str]) -> list[str]:
    """Files of text or rows: `paths` as they are in the container."""
    there: list[str] = []
    several = len(paths) > 1
    for number, path in enumerate(paths, 1):
        channel = f"{name}.{number}" if several else name
        if path.startswith("channel://"):
            named, _, rest = path.removeprefix("channel://").partition("/")
            if named not in given:
                remedy = nearest(named, given) or f"; add launch.channels.{named}=<s3 uri or folder>"
                raise UserError(f"{key}: the job has no channel {named!r}{remedy}")
            there.append(f"{CHANNELS}/{named}" + (f"/{rest}" if rest else ""))
        elif path.startswith(f"{ROOT}/"):
            there.append(path)
        elif path.startswith("s3://"):
            there.append(inputs.add(channel, _folder_uri(path, key), key))
        elif _URL.match(path):
            there.append(path)
        else:
            files = {inside: file for inside, file in _listed(path, key).items() if inputs.place(file) is None}
            if files:  # else what came before has them all, and a file is read once
                there.append(inputs.ship(channel, files, key))
    return there


def _folder_uri(uri: str, key: str) -> str:
    """An s3 uri as a channel has it: with a slash at its end where it is a folder, else `books` would be `books-old` too."""
    if any(character in uri for character in "*?["):
        raise UserError(f"{key}={uri}: a channel takes a folder of S3 or one object, not a pattern; name the folder")
    last = uri.rpartition("/")[2]
    return uri if not last or ("." in last and uri.count("/") > 2) else f"{uri}/"


def _listed(path: str, key: str) -> dict[str, Path]:
    """The files that a path, a folder or a glob stands for, by their names from there on, compressed ones as they are."""
    try:
        found = list_files([path])
    except UserError as error:
        raise UserError(str(error).replace("data.paths", key, 1)) from error
    files: dict[str, Path] = {}
    for file in found:
        suffix = PurePosixPath(file.path).suffix if file.compression else ""
        files[file.name + suffix] = Path(file.path)
    return files


def _ship_model(inputs: Inputs, channel: str, path: str | None, pickles: bool, key: str) -> str | None:
    """Weights of this machine, as `gpt.inference.loading.locate` finds them: a Hugging Face folder, a run or one of its checkpoints."""
    if path is None or not os.path.exists(directory := expanded(path)):
        return path
    directory = directory.absolute()
    if (run := directory.parent.parent) and (run / "config.yaml").is_file() and directory.parent.name == "checkpoints":
        return f"{inputs.ship(channel, _checkpoint_files(run, directory), key)}/checkpoints/{directory.name}"
    if (directory / "config.yaml").is_file() and not (directory / "config.json").is_file():
        if not (directory / "model" / "config.json").is_file():
            return inputs.ship(channel, _checkpoint_files(directory, _newest_checkpoint(directory, path, key)), key)
        directory = directory / "model"
    try:
        names = sorted(entry.name for entry in directory.iterdir() if not entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{key}={path}: {directory} cannot be read: {error.strerror}; give the folder of a model") from error
    wanted = (*_WEIGHTS, ".bin") if pickles else _WEIGHTS
    files = {name: directory / name for name in names if name.endswith(wanted)}
    if "adapter_config.json" in files:
        _refuse_local_base(directory, path, key)
    elif "config.json" not in files:
        raise UserError(f"{key}={path}: there is no config.json in {directory}; give a run or the folder of a model")
    return inputs.ship(channel, files, key)


def _refuse_local_base(adapter: Path, path: str, key: str) -> None:
    """An adapter goes into a job alone, so what it changes must be had there."""
    file = adapter / "adapter_config.json"
    try:
        base = str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{key}={path}: {file} does not say which model it was made for; copy it again") from error
    if os.path.exists(adapter / base) or os.path.exists(expanded(base)):
        raise UserError(
            f"{key}={path}: this adapter changes {base}, a folder of this machine that the job does not have; merge it first (gpt export), "
            "and give what comes out"
        )


def _newest_checkpoint(run: Path, path: str, key: str) -> Path:
    whole = sorted(marker.parent for marker in (run / "checkpoints").glob("step-*/COMPLETE"))
    if not whole:
        raise UserError(f"{key}={path}: the run has neither a model/ folder nor a whole checkpoint yet; wait for one, or give another run")
    return whole[-1]


def _checkpoint_files(run: Path, checkpoint: Path) -> dict[str, Path]:
    """A checkpoint with what of its run is needed to read it, as they lie in the run's folder."""
    inside = _listed(str(checkpoint), "init")
    return {
        **{name: run / name for name in ("config.yaml", "tokenizer.json")},
        **{f"checkpoints/{checkpoint.name}/{name}": file for name, file in inside.items()},
    }


def _ship_tokenizer(inputs: Inputs, path: str | None, key: str) -> str | None:
    """A tokenizer of this machine, as `gpt.data.tokenizer.load_tokenizer` finds it, with what it reads beside it."""
    if path is None:
        return None
    file = expanded(path)
    if file.is_dir():
        of_run = file / "model" / "tokenizer.json"
        file = of_run if (file / "config.yaml").is_file() and of_run.is_file() else file / "tokenizer.json"
    if not file.is_file():
        if path.startswith(("/", ".", "~")) or path.endswith(".json") or file.parent == expanded(path):
            raise UserError(f"{key}={path}: there is no tokenizer at {file}; give a folder that holds a tokenizer.json, or that file")
        return path
    beside = [file.parent / name for name in _BESIDE_TOKENIZER if (file.parent / name).is_file()]
    there = inputs.place(file)
    if there is not None and all(inputs.place(other) for other in beside):
        return there
    return f"{inputs.ship('tokenizer', {part.name: part for part in (file, *beside)}, key)}/{file.name}"
