"""Rows of a dataset of the Hugging Face hub, or of a local folder that `datasets` knows how to read.

Downloaded once and read from the disk, or read while it is downloaded (data.streaming=true).
"""

from __future__ import annotations

import ast
import copy
import hashlib
import logging
import os
import pickle
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gpt.data.config import SourceConfig
from gpt.data.files import fingerprint_files, list_files, one_line
from gpt.data.rows import RowReader, python_rows
from gpt.data.sources import OnError, ReadReport, Row, RowStream, Source
from gpt.errors import UserError
from gpt.typed import nearest_and_all

_SECONDS = 10  # to wait for the hub's first answer; `datasets` itself would try again for half a minute


class HubSource(Source):
    """Rows of one split of a dataset.

    Args:
        config: name, configuration and split of the dataset.
        on_error: what to do with rows that have none of our fields.
        streaming: read it while it is downloaded.

    Raises:
        UserError: a dataset, configuration, split or column that is not there, no network, or not allowed.
    """

    def __init__(self, config: SourceConfig, on_error: OnError, streaming: bool):
        self.config, self.name = config, f"{config.name} ({config.split})"
        self._path = os.path.expanduser(config.name)
        self._id = os.path.basename(os.path.abspath(self._path)) if os.path.isdir(self._path) else config.name  # on every machine the same
        self._revision, offline = (None, False) if os.path.isdir(self._path) else _revision(config.name)
        with quiet_hub(offline):
            try:
                import datasets

                self._dataset: Any = datasets.load_dataset(
                    self._path, config.config, split=config.split, streaming=streaming, revision=self._revision
                )
            except Exception as error:  # of a dozen libraries
                raise UserError(_reason(error, config)) from error
        self._streaming = streaming
        self._reader = RowReader(config, on_error, "data.name")
        if self._dataset.column_names is not None:
            columns = self._reader.check_columns(self._dataset.column_names, self.name)
            self._dataset = self._dataset.select_columns(columns)  # others may be pictures, slow to unpack
        # To copy it by `deepcopy` fails in other threads: it holds fsspec's cache of file systems, which grows by those of the thread.
        self._pickled = pickle.dumps(self._dataset) if streaming else b""
        self._classes = _class_names(self._dataset.features or {})
        self.size = self._dataset.info.dataset_size

    def fingerprint(self) -> str:
        """A hash of the dataset's id, configuration, split and revision; of a local folder its files instead of a revision."""
        if os.path.isdir(self._path):
            content = fingerprint_files(list_files([self._path]))
        else:
            content = self._revision or getattr(self._dataset, "_fingerprint", None)
        config = self.config
        return hashlib.sha256(repr((config.name, config.config, config.split, content)).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Source, id, configuration, split, revision, bytes and licence."""
        config = self.config
        return {
            "source": config.source, "name": config.name, "config": config.config, "split": config.split,
            "revision": self._revision, "bytes": self.size, "licence": config.licence or self._dataset.info.license or "",
        }  # fmt: skip

    def rows(self, report: ReadReport, state: dict[str, Any] | None = None) -> RowStream:
        """The rows of the split, in its order."""
        given = state or {"row": 0}
        position = {"row": given["row"]}
        if not self._streaming:
            return RowStream(self._rows(self._stored(position["row"]), report, position), lambda: dict(position))
        dataset = pickle.loads(self._pickled)  # since it keeps the place of one stream
        if "dataset" in given:
            dataset.load_state_dict(copy.deepcopy(given["dataset"]))

        def state_dict() -> dict[str, Any]:
            # The dataset knows its place only once a row was read.
            return {**position, "dataset": copy.deepcopy(dataset.state_dict())} if position["row"] > given["row"] else given

        return RowStream(self._rows(iter(dataset), report, position), state_dict)

    def _stored(self, start: int) -> Iterator[dict[str, Any]]:
        table = self._dataset.with_format("arrow")
        for first in range(start, len(table), 256):
            yield from python_rows(table[first : min(first + 256, len(table))])

    def _rows(self, values: Iterator[dict[str, Any]], report: ReadReport, position: dict[str, Any]) -> Iterator[Row]:
        number = position["row"]
        while True:
            place = f"{self.name}, row {number + 1}"
            try:
                with quiet_hub():
                    found = next(values)
            except StopIteration:
                break
            except Exception as error:
                raise UserError(f"data.name={self.config.name}: {place} cannot be read: {one_line(error)}") from error
            report.files += not number
            number += 1
            position["row"] = number
            there = {name: self._named(name, value) for name, value in found.items() if value is not None}
            row = self._reader.row(f"{self._id}/{self.config.split}:{number}", place, there, report)
            if row is not None:
                yield row

    def _named(self, field: str, value: Any) -> Any:
        """The name of a class instead of its number, where the dataset tells it."""
        names = self._classes.get(field)
        if names is None:
            return value
        if isinstance(value, list):
            return [self._named(field, item) for item in value]
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _class_names(features: dict[str, Any]) -> dict[str, list[str]]:
    found = {}
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)  # of a list
        if isinstance(names := getattr(inner, "names", None), list):
            found[name] = names
    return found


def _revision(name: str) -> tuple[str | None, bool]:
    """The commit that the hub has for a dataset, and whether to do without the hub, from what was downloaded before."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        return None, True
    try:
        return HfApi().dataset_info(name, timeout=_SECONDS).sha, False
    except hub.GatedRepoError as error:
        raise UserError(f"data.name={name}: the hub asks for consent to its terms; give it there, and set HF_TOKEN") from error
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        raise UserError(f"data.name={name}: the hub has no such dataset, or not for you: check the id, or set HF_TOKEN") from error
    except Exception:  # no network, or the hub is down; its errors are of another library in every version
        return None, True


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached, asked once."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # its errors are of another library in every version
        return False
    return True


@contextmanager
def quiet_hub(offline: bool = False) -> Iterator[None]:
    """Data sets are opened without the hub, from what was downloaded before, if `offline`; and without what the hub's libraries log
    and, where nobody watches them, without their bars, unless GPT_DEBUG=1: errors are said in a sentence.
    """
    import datasets
    from datasets import config as settings

    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    levels, bars, was_offline = [logger.level for logger in loggers], datasets.is_progress_bar_enabled(), settings.HF_HUB_OFFLINE
    if os.environ.get("GPT_DEBUG") != "1":
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
    settings.HF_HUB_OFFLINE = was_offline or offline
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
        settings.HF_HUB_OFFLINE = was_offline


def _reason(error: Exception, config: SourceConfig) -> str:
    """What to tell the user when a dataset cannot be opened."""
    text = " ".join(str(error).split())
    options = re.search(r"(?:Available|available|one of)[^\[]*(\[[^\]]*\])", text)
    known: list[str] = ast.literal_eval(options[1]) if options else []
    if "split" in text.lower() and known:
        return f"data.split={config.split}: {config.name} has no such split{nearest_and_all(config.split, known)}"
    if "config" in text.lower() and known:
        if config.config is None:
            return f"data.config: {config.name} needs one. There are: {', '.join(known)}"
        return f"data.config={config.config}: {config.name} has no such configuration{nearest_and_all(config.config, known)}"
    if isinstance(error, ConnectionError):
        return f"data.name={config.name}: the hub cannot be reached, and the dataset was not downloaded before; is there a network?"
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error  # "An error occurred" hides what it was
    return f"data.name={config.name}, data.split={config.split}: cannot be read: {one_line(cause)}"
