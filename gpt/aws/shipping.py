"""What a job takes along: files that must lie in S3 before it starts, by the hash of what is in them, and `gpt` itself as a wheel.

A wheel is a zip with a RECORD (https://packaging.python.org/en/latest/specifications/binary-distribution-format/); this one is the same
to the byte for the same sources.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import gpt
from gpt.arguments import config_directory
from gpt.errors import UserError

PACKAGE = "gpt-trainer"
_TIME = (2020, 1, 1, 0, 0, 0)  # of every file in the wheel
HASH_DIGITS = 16


@dataclass(frozen=True)
class Upload:
    """A file that must lie at an S3 uri before the job starts."""

    uri: str
    """s3://bucket/key of the object."""
    source: Path | bytes
    """A file here, or what is to be in it."""
    sha256: str
    """Of its content, in hex."""
    size: int
    """In bytes."""


def uploads_below(root: str, files: Mapping[str, Path | bytes], key: str) -> tuple[str, list[Upload]]:
    """Lay files below `<root>/<hash>/`, where the hash is of their names and contents.

    Args:
        root: s3 uri without a slash at its end.
        files: relative name, with forward slashes -> a file here, or its content.
        key: what the user calls them, for messages.

    Returns:
        the uri of the folder, with a slash at its end, and each file with its own.

    Raises:
        UserError: a file that cannot be read, or a name that S3 does not take.
    """
    digests: dict[str, tuple[str, int]] = {}
    for name, source in sorted(files.items()):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{key}: the name of {name!a} is not UTF-8, and S3 takes no other; rename it") from error
        digests[name] = _digest(source, key)
    total = hashlib.sha256()
    for name, (digest, _) in digests.items():
        total.update(f"{name}\0{digest}\n".encode())
    folder = f"{root}/{total.hexdigest()[:HASH_DIGITS]}/"
    return folder, [Upload(folder + name, files[name], digest, size) for name, (digest, size) in digests.items()]


def _digest(source: Path | bytes, key: str) -> tuple[str, int]:
    """SHA-256 in hex, and size in bytes."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest(), len(source)
    try:
        with source.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest(), stream.tell()
    except OSError as error:
        raise UserError(f"{key}: {source} cannot be read: {error.strerror}") from error


def build_wheel() -> tuple[str, bytes]:
    """The name and the content of a wheel of this very `gpt`, configs and all; the sources as they are now, whatever is committed."""
    package = Path(cast(str, gpt.__file__)).parent
    files = {f"gpt/{name}": path for name, path in _sources(package).items() if not name.startswith("configs/")}
    files |= {f"gpt/configs/{name}": path for name, path in _sources(config_directory()).items()}
    stem = f"{PACKAGE.replace('-', '_')}-{gpt.__version__}"
    contents = {name: path.read_bytes() for name, path in sorted(files.items())}
    contents[f"{stem}.dist-info/METADATA"] = _metadata(package).encode()
    contents[f"{stem}.dist-info/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: gpt\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = f"{stem}.dist-info/RECORD"
    lines = [f"{_quoted(name)},sha256={_base64(content)},{len(content)}" for name, content in contents.items()]
    contents[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # deflated, it would differ with the version of zlib
        for name, content in contents.items():
            entry = zipfile.ZipInfo(name, _TIME)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)
    return f"{stem}-py3-none-any.whl", buffer.getvalue()


def _sources(folder: Path) -> dict[str, Path]:
    """Every file below a folder by its relative name, without caches and hidden ones."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    return {name: path for name, path in found.items() if not any(part.startswith((".", "__pycache__")) for part in name.split("/"))}


def _metadata(package: Path) -> str:
    """METADATA, with what the package needs; of a checkout as its pyproject.toml says."""
    project = package.parent / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        python, needs = table["requires-python"], table["dependencies"]
    else:
        installed = importlib.metadata.metadata(PACKAGE)
        python = installed["Requires-Python"]
        needs = [need for need in installed.get_all("Requires-Dist") or [] if "extra ==" not in need]
    head = ["Metadata-Version: 2.1", f"Name: {PACKAGE}", f"Version: {gpt.__version__}", f"Requires-Python: {python}"]
    return "\n".join([*head, *(f"Requires-Dist: {need}" for need in sorted(needs)), ""])


def _base64(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _quoted(name: str) -> str:
    """A name as a field of RECORD, which is CSV."""
    return f'"{name}"' if "," in name else name
