"""Text and examples that every Python install carries, so that every kind of training can be tried offline on real data.

All of it comes from the running Python's own standard library: sources without tests, in the order of their names, cut into
functions for fine-tuning, and the chapters of the language reference that `help()` shows.
"""

from __future__ import annotations

import ast
import hashlib
import io
import keyword
import os
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from gpt.data.config import SourceConfig
from gpt.data.files import StoredFile, fingerprint_files, local_file
from gpt.data.sources import OnError, ReadReport, Row, RowStream, Source, TextSource
from gpt.errors import UserError

T = TypeVar("T")
LICENCE = "PSF-2.0"
PACKAGES = ("asyncio", "collections", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib", "xml")
"""The classes of stdlib_packages: those with most functions (180 and more) of the packages that every Python from 3.11 on has."""
EXCEPTIONS = (
    "AttributeError", "ImportError", "IndexError", "KeyError", "NotImplementedError", "OSError", "RuntimeError", "StopIteration",
    "TypeError", "ValueError",
)  # fmt: skip
"""The classes of stdlib_exceptions: of the built-in ones that say what went wrong, those that ten packages and more raise or catch."""
TAGS = ("keyword", "name", "string", "number", "comment", "operator")
"""The classes of stdlib_tokens."""
PER_CLASS = 400
"""At most so many examples of a class of texts, from all over what there is."""
_LONGEST = 4000  # characters of a function
_LONGEST_BEFORE = 600  # characters before an exception, some 200 tokens: what is cut at a context of 256 loses its end, which matters most
_SHORTEST_DOCSTRING = 10  # characters of its first line
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def standard_library_files() -> list[StoredFile]:
    """The running Python's own modules, sorted by name, without tests.

    Raises:
        UserError: it has none; some installs hold compiled files only.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for where, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS]  # site-packages may hold a hundred thousand files
        found += [local_file(root, Path(where, n)) for n in names if n.endswith(".py")]
    if not found:
        raise UserError(f"data=stdlib: this Python has no sources in {root}; give text of your own, data=text data.paths=[book.txt]")
    return sorted(found, key=lambda f: f.name)


class StandardLibrary(TextSource):
    """The sources of the standard library, a text a file."""

    def __init__(self, config: SourceConfig, on_error: OnError):
        super().__init__(config, standard_library_files(), on_error)
        self.name = config.source

    def describe(self) -> dict[str, Any]:
        """As of files, and which Python."""
        return {**super().describe(), "python": platform.python_version(), "licence": self.config.licence or LICENCE}


class EmbeddedSource(Source):
    """Examples made of the standard library, or the chapters of its language reference."""

    def __init__(self, config: SourceConfig):
        self.config, self.name = config, config.source
        self._make = _MAKERS[config.source]

    def fingerprint(self) -> str:
        """A hash of the Python version, which also decides how functions are found, and of the standard library's content."""
        digest = hashlib.sha256(f"{self.config.source} {platform.python_version()}".encode())
        if self.config.source == "stdlib_topics":
            digest.update(repr([row.values for row in _topics()]).encode())
        else:
            digest.update(fingerprint_files(standard_library_files()).encode())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Source, Python version and licence."""
        return {"source": self.config.source, "python": platform.python_version(), "licence": self.config.licence or LICENCE}

    def rows(self, report: ReadReport, state: dict[str, Any] | None = None) -> RowStream:
        """The examples, in the order of the files and within a file from top to bottom."""
        position = dict(state or {"row": 0})

        def read() -> Iterator[Row]:
            by = self.config.holdout_by
            for row in islice(self._make(), position["row"], None):
                report.files += not position["row"]
                position["row"] += 1
                yield replace(row, group=group_of(row.name, by)) if by else row

        return RowStream(read(), lambda: dict(position))


def group_of(name: str, by: str) -> str:
    """What a function belongs to, by its name: its top-level package or module, its file, or its outermost class, where it has one."""
    file, _, function = name.partition(":")
    if by == "package":
        return file.partition("/")[0].removesuffix(".py")
    outermost, dot, _ = function.partition(".")
    return f"{file}:{outermost}" if by == "class" and dot else file


@dataclass(frozen=True)
class _Function:
    name: str  # json/decoder.py:JSONDecoder.decode
    node: ast.FunctionDef | ast.AsyncFunctionDef
    lines: list[str]  # of its file

    @property
    def place(self) -> str:
        file, _, function = self.name.partition(":")
        return f"{file}, {function}"

    def source(self, without: range = range(0)) -> str:
        """Its source as written, with decorators, at the left margin, without the lines of some numbers, ending with a newline."""
        first = min([self.node.lineno, *(d.lineno for d in self.node.decorator_list)])
        margin = self.lines[self.node.lineno - 1][: self.node.col_offset]
        kept = (n for n in range(first, (self.node.end_lineno or first) + 1) if n not in without)
        return "".join(self.lines[n - 1].removeprefix(margin) + "\n" for n in kept)

    def before(self, line: int, column: int) -> str:
        """Its source up to a place of its file, in UTF-8 bytes from the line's start as `ast` counts them, without the blanks before it."""
        margin = self.lines[self.node.lineno - 1][: self.node.col_offset]
        begun = self.lines[line - 1].encode()[:column].decode().removeprefix(margin)
        return (self.source(without=range(line, (self.node.end_lineno or line) + 1)) + begun).rstrip()


def _functions(files: Iterable[StoredFile]) -> Iterator[_Function]:
    """The functions of modules and classes, not those within functions, of at most _LONGEST characters."""
    for file in files:
        try:
            with tokenize.open(file.path) as stream, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes such as "\d"
                source = stream.read()
                tree = ast.parse(source)
        except (SyntaxError, ValueError):  # templates and samples that are no Python, or not of this version
            continue
        lines, seen = source.split("\n"), dict[str, int]()
        for name, node in _defined(tree, ""):
            seen[name] = seen.get(name, 0) + 1  # a property's getter and setter have one name
            function = _Function(f"{file.name}:{name}" + f"#{seen[name]}" * (seen[name] > 1), node, lines)
            if len(function.source()) <= _LONGEST:
                yield function


def _defined(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from _defined(child, f"{prefix}{child.name}.")
        elif isinstance(child, (ast.stmt, ast.ExceptHandler)):
            yield from _defined(child, prefix)


def _documented() -> Iterator[tuple[_Function, str, str]]:
    """Functions with a docstring, their source without it, and its first line."""
    for function in _functions(standard_library_files()):
        text = ast.get_docstring(function.node) or ""
        first_line = text.strip().partition("\n")[0].strip()
        taken = function.node.body[0]
        begin, end = taken.lineno, taken.end_lineno or taken.lineno
        before = function.lines[begin - 1].encode()[: taken.col_offset]
        behind = function.lines[end - 1].encode()[taken.end_col_offset or 0 :].strip()
        alone = not before.strip() and (not behind or behind.startswith(b"#"))  # on its lines
        if len(first_line) >= _SHORTEST_DOCSTRING and alone:
            yield function, function.source(without=range(begin, end + 1)), first_line


def _docstrings() -> Iterator[Row]:
    for function, source, first_line in _documented():
        yield Row(function.name, function.place, {"prompt": source, "completion": first_line})


def _chats() -> Iterator[Row]:
    for function, source, first_line in _documented():
        turns = [
            ("user", f"What is this function called?\n\n{source}"), ("assistant", f"{function.node.name}."),
            ("user", "Which parameters does it take?"), ("assistant", _parameters(function.node.args)),
            ("user", "What does it do?"), ("assistant", first_line),
        ]  # fmt: skip
        yield Row(function.name, function.place, {"messages": [{"role": role, "content": content} for role, content in turns]})


def _parameters(arguments: ast.arguments) -> str:
    """Their names in a sentence, without the object itself."""
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if a.arg not in ("self", "cls")]
    names += [f"{stars}{a.arg}" for stars, a in (("*", arguments.vararg), ("**", arguments.kwarg)) if a is not None]
    if not names:
        return "It takes none."
    return f"{', '.join(names[:-1])} and {names[-1]}." if len(names) > 1 else f"{names[0]}."


def _packages() -> Iterator[Row]:
    files = standard_library_files()
    for package in PACKAGES:
        functions = list(_functions(f for f in files if f.name.startswith(f"{package}/")))
        for function in _spread(functions):
            yield Row(function.name, function.place, {"text": function.source(), "label": package})


def _spread(of_a_class: list[T]) -> Iterator[T]:
    """PER_CLASS of them, evenly from the first to the last."""
    count = min(PER_CLASS, len(of_a_class))
    return (of_a_class[i * len(of_a_class) // count] for i in range(count))


def _exceptions() -> Iterator[Row]:
    rows: dict[str, list[Row]] = {name: [] for name in EXCEPTIONS}
    texts = set[str]()
    for function in _functions(standard_library_files()):
        for number, exception in enumerate(_raised_or_caught(function.node)):
            text = function.before(exception.lineno, exception.col_offset)
            if len(text) > _LONGEST_BEFORE:
                text = text[-_LONGEST_BEFORE:].partition("\n")[2]
            if text.endswith(("raise", "except")) and text not in texts:  # the same code in two packages would be on both sides
                texts.add(text)
                values = {"text": text, "label": exception.id}
                rows[exception.id].append(Row(f"{function.name}@{number}", f"{function.place}@{number}", values))
    for of_a_class in rows.values():
        yield from _spread(of_a_class)


def _raised_or_caught(function: ast.AST) -> list[ast.Name]:
    """Where one of EXCEPTIONS is named alone behind `raise` or `except`, from top to bottom."""
    found = []
    for node in ast.walk(function):
        named = node.exc if isinstance(node, ast.Raise) else node.type if isinstance(node, ast.ExceptHandler) else None
        named = named.func if isinstance(named, ast.Call) else named
        if isinstance(named, ast.Name) and named.id in EXCEPTIONS:
            found.append(named)
    return sorted(found, key=lambda name: (name.lineno, name.col_offset))


def _tokens() -> Iterator[Row]:
    for function in _functions(standard_library_files()):
        pairs = list(_tagged(function.source()))
        values = {"tokens": [token for token, _ in pairs], "tags": [tag for _, tag in pairs]}
        yield Row(function.name, function.place, values)


def _tagged(source: str) -> Iterator[tuple[str, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "NAME":
            yield token.string, "keyword" if keyword.iskeyword(token.string) else "name"
        elif kind in ("NUMBER", "COMMENT"):
            yield token.string, kind.lower()
        elif kind == "OP":
            yield token.string, "operator"
        elif "STRING" in kind and token.string.strip():  # from Python 3.12 on the parts of an f-string are tokens of their own, spaces too
            yield token.string, "string"


def _topics() -> Iterator[Row]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions pack it apart
        raise UserError("data=stdlib_topics: this Python has no pydoc_data; install all of its standard library") from error
    for name, text in sorted(topics.items()):
        yield Row(f"pydoc_data/topics.py:{name}", f"pydoc_data.topics, {name!r}", {"text": text})


_MAKERS: dict[str, Callable[[], Iterator[Row]]] = {
    "stdlib_docstrings": _docstrings, "stdlib_chats": _chats,
    "stdlib_packages": _packages, "stdlib_exceptions": _exceptions, "stdlib_tokens": _tokens, "stdlib_topics": _topics,
}  # fmt: skip
