"""The folder that stands for S3 in a rehearsal, and what SageMaker keeps in step with it: a host's checkpoints."""

from __future__ import annotations

import filecmp
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from gpt.aws.shipping import Upload
from gpt.errors import UserError

SYNC_SECONDS = 1.0


class Storage:
    """Objects by their s3 uri, as files `<root>/<bucket>/<key>`.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, uri: str) -> Path:
        """Where the object of this uri lies, or the folder of those whose uris begin with it."""
        return self.root / uri.removeprefix("s3://").rstrip("/")

    def upload(self, upload: Upload) -> bool:
        """Put a file where the job is to find it; False if it is there already.

        Raises:
            UserError: its content is not what it was when the job was planned.
        """
        target, source = self.path(upload.uri), upload.source
        if target.is_file() and target.stat().st_size == upload.size and _sha256(target) == upload.sha256:
            return False
        if isinstance(source, bytes):
            _put(target, lambda aside: aside.write_bytes(source))
        else:
            _put(target, lambda aside: shutil.copyfile(source, aside))
        if _sha256(target) != upload.sha256:
            raise UserError(f"{upload.source} has changed while it was uploaded; start again when nothing writes to it")
        return True

    def download(self, uri: str, folder: Path) -> None:
        """Copy all objects below a uri into a folder, which is made; of the uri of one object, that."""
        source = self.path(uri)
        folder.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
        elif source.is_file():
            shutil.copyfile(source, folder / source.name)

    def collect(self, folder: Path, uri: str) -> int:
        """Copy the files below a folder, if it is there, to below a uri; returns how many there were."""
        files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
        for file in files:
            _put(self.path(uri) / file.relative_to(folder), lambda aside, file=file: shutil.copyfile(file, aside))
        return len(files)


class CheckpointSync:
    """Copies what changes in the checkpoint folders of the hosts to S3, again and again while it is entered, and removes there what they do
    (https://docs.aws.amazon.com/sagemaker/latest/dg/model-checkpoints.html).

    Args:
        storage: S3.
        uri: where the folders of all hosts go: into one place.
        folders: of the hosts, filled from there already.
        say: told of a file of which two hosts have different ones.
    """

    def __init__(self, storage: Storage, uri: str, folders: Sequence[Path], say: Callable[[str], None]) -> None:
        self._target, self._folders, self._say = storage.path(uri), list(folders), say
        self._seen = [_stamps(folder) for folder in folders]
        self._owner: dict[str, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="checkpoint sync")

    def __enter__(self) -> CheckpointSync:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._ended.wait(SYNC_SECONDS):
            self.once()

    def once(self) -> None:
        """Copy what has changed since the last time."""
        for number, folder in enumerate(self._folders):
            found, seen = _stamps(folder), self._seen[number]
            for name in seen.keys() - found.keys():
                _remove(self._target, name)
            for name in sorted(name for name, stamp in found.items() if seen.get(name) != stamp):
                target, other = self._target / name, self._owner.setdefault(name, number)
                try:
                    if other != number and not filecmp.cmp(folder / name, target, shallow=False):
                        one, two = sorted((other + 1, number + 1))
                        self._say(f"warning: hosts {one} and {two} both write checkpoints/{name}, with different content")
                    _put(target, lambda aside, file=folder / name: shutil.copyfile(file, aside))
                except FileNotFoundError:  # removed, or renamed, in the meantime
                    found.pop(name)
            self._seen[number] = found


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder, by name."""
    found = {}
    for at, _, names in os.walk(folder):
        for name in names:
            path = Path(at, name)
            try:
                stat = path.stat()
            except FileNotFoundError:  # in the meantime
                continue
            found[path.relative_to(folder).as_posix()] = (stat.st_size, stat.st_mtime_ns)
    return found


def _put(target: Path, write: Callable[[Path], object]) -> None:
    """Make an object: of it there is nothing, the old one, or all of the new one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.part")
    try:
        write(aside)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def _remove(root: Path, name: str) -> None:
    """Remove an object, and the folders that only it was in, of which S3 knows nothing."""
    path = root / name
    path.unlink(missing_ok=True)
    while (path := path.parent) != root and path.is_dir() and not any(path.iterdir()):
        path.rmdir()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
