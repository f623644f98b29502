"""The rules of the house, held by reading the sources: who may import whom, how long a file may be, what stays out of it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "gpt").rglob("*.py"))

# What each part may import of ours, at the top of a file or inside a function. A longer name counts before its prefix.
MAY_IMPORT = {
    "gpt": {"gpt.model", "gpt.training"},  # GPT, GPTConfig and Trainer, when first asked for
    "gpt.__main__": {"gpt.cli"},
    "gpt.cli": {
        "gpt", "gpt.errors", "gpt.typed", "gpt.arguments", "gpt.commands", "gpt.compose", "gpt.config", "gpt.help",
        "gpt.launch", "gpt.inference.command", "gpt.evaluation.command", "gpt.training.export", "gpt.data.command",
        "gpt.inspection.command", "gpt.runs.command", "gpt.doctor.command", "gpt.aws.command", "gpt.sweep", "gpt.plan_search",
        "gpt.runtime.environment",
    },
    "gpt.sweep": {
        "gpt.aws.records", "gpt.aws.sweeping", "gpt.arguments", "gpt.compose", "gpt.config", "gpt.errors", "gpt.typed",
        "gpt.runtime.signals", "gpt.runs",
    },
    "gpt.plan_search": {
        "gpt.compose", "gpt.config", "gpt.errors", "gpt.finetuning", "gpt.runs", "gpt.sweep", "gpt.typed",
        "gpt.training.trainer",  # inside a function: it says what is wrong with a plan
    },
    "gpt.arguments": {"gpt.config", "gpt.errors", "gpt.typed"},
    "gpt.help": {"gpt.arguments", "gpt.commands", "gpt.config", "gpt.model.config", "gpt.typed"},
    "gpt.compose": {
        "gpt.arguments", "gpt.commands", "gpt.config", "gpt.data.config", "gpt.errors", "gpt.typed",
        "gpt.runtime.environment", "gpt.inference.loading",  # for init=
    },
    "gpt.commands": {"gpt.aws.jobs_config", "gpt.config", "gpt.data.config", "gpt.errors", "gpt.typed"},
    "gpt.config": {
        "gpt.aws.config", "gpt.data.config", "gpt.errors", "gpt.finetuning.config", "gpt.typed", "gpt.model.config", "gpt.validation",
    },
    "gpt.validation": {"gpt.aws.validation", "gpt.config", "gpt.data.config", "gpt.errors", "gpt.finetuning.config", "gpt.typed"},
    "gpt.typed": {"gpt.errors"},
    "gpt.errors": set(),
    "gpt.launch": {"gpt.aws.jobs", "gpt.aws.emulator", "gpt.compose", "gpt.config", "gpt.errors", "gpt.runtime", "gpt.training"},
    "gpt.aws": {
        "gpt", "gpt.arguments", "gpt.compose", "gpt.config", "gpt.data.config", "gpt.errors", "gpt.runtime.environment",
        "gpt.runtime.signals", "gpt.typed",
    },
    "gpt.aws.inputs": {"gpt.arguments", "gpt.aws", "gpt.config", "gpt.data.config", "gpt.data.files", "gpt.errors", "gpt.typed"},
    "gpt.aws.config": set(),
    "gpt.aws.jobs_config": {"gpt.errors"},
    "gpt.aws.container": set(),  # runs before anything of ours is installed
    "gpt.aws.emulated_namespace": set(),  # a program of its own
    "gpt.training": {
        "gpt", "gpt.aws.records", "gpt.commands", "gpt.compose", "gpt.config", "gpt.errors", "gpt.typed",
        "gpt.data", "gpt.evaluation", "gpt.finetuning", "gpt.inference", "gpt.model", "gpt.runtime",
    },
    "gpt.finetuning": {"gpt.config", "gpt.errors", "gpt.typed", "gpt.data", "gpt.inference.loading", "gpt.model", "gpt.runtime"},
    "gpt.evaluation": {
        "gpt", "gpt.commands", "gpt.errors", "gpt.typed", "gpt.data", "gpt.model", "gpt.runtime",
        "gpt.inference.generate", "gpt.inference.loading", "gpt.inference.quantize", "gpt.inference.sampling",
    },
    "gpt.inference": {"gpt.errors", "gpt.data.tokenizer", "gpt.model", "gpt.runtime"},
    "gpt.inference.loading": {
        "gpt.arguments", "gpt.compose", "gpt.data.tokenizer", "gpt.errors", "gpt.model", "gpt.typed",
        "gpt.training.checkpoint",  # inside a function: a run that has not finished has only checkpoints
    },
    "gpt.inference.command": {"gpt.commands", "gpt.errors", "gpt.inference", "gpt.model.heads", "gpt.runtime"},
    "gpt.runtime": {"gpt.config", "gpt.errors", "gpt.model"},
    "gpt.inspection": {"gpt.commands", "gpt.errors", "gpt.data", "gpt.model", "gpt.inference.loading"},
    "gpt.runs": {
        "gpt.commands", "gpt.config", "gpt.errors", "gpt.finetuning.search", "gpt.finetuning.trainable", "gpt.typed",
        "gpt.training.charts", "gpt.training.freezing_figure", "gpt.training.metrics", "gpt.training.page", "gpt.training.run_record",
    },
    "gpt.doctor": {"gpt", "gpt.aws.session", "gpt.commands", "gpt.config", "gpt.runtime"},
    "gpt.data": {"gpt.errors", "gpt.typed"},
    "gpt.model": set(),
}  # fmt: skip
# At the top of a file, `cli -> compose/config/help` only: what is heavy is imported when its command runs.
ONLY_IN_FUNCTIONS = {
    "gpt.launch", "gpt.inference.command", "gpt.evaluation.command", "gpt.training.export", "gpt.training.checkpoint",
    "gpt.data.command", "gpt.inspection.command", "gpt.runs.command", "gpt.doctor.command", "gpt.aws.command",
}  # fmt: skip
MODEL_LIBRARIES = {"torch", "safetensors"}
MODEL_LIBRARIES_IN_FUNCTIONS = {"huggingface_hub", "transformers"}
LIGHT = (
    "gpt.arguments",
    "gpt.aws.command",
    "gpt.aws.config",
    "gpt.aws.records",
    "gpt.aws.sweeping",
    "gpt.aws.training_job",
    "gpt.aws.dry_run",
    "gpt.cli",
    "gpt.commands",
    "gpt.compose",
    "gpt.config",
    "gpt.help",
    "gpt.sweep",
    "gpt.plan_search",
    "gpt.finetuning.search",
    "gpt.typed",
    "gpt.errors",
    "gpt.data.config",
    "gpt.finetuning.config",
    "gpt.model.config",
    "gpt.validation",
    "gpt.runs.command",
    "gpt.doctor.command",
    "gpt.training.report",
)
HEAVY = {
    "torch",
    "numpy",
    "transformers",
    "tokenizers",
    "tiktoken",
    "datasets",
    "matplotlib",
    "rich",
    "hydra",
    "omegaconf",
    "boto3",
    "botocore",
    "sagemaker",
}


@dataclass(frozen=True)
class Import:
    """One imported module, as `gpt.part.module` or the name of a library."""

    of: str
    by: str
    line: int
    in_function: bool

    def __str__(self) -> str:
        return f"{self.by}:{self.line} imports {self.of}"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(module: str) -> tuple[Import, ...]:
    """Everything that a module imports, but for types alone."""
    return tuple(_imports(parsed(MODULES[module]), module, False))


def _imports(node: ast.AST, module: str, in_function: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, module, child.lineno, in_function)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}:{child.lineno}: imports are absolute"
            assert child.module
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                yield Import(inner if inner in MODULES else child.module, module, child.lineno, in_function)
        else:
            yield from _imports(child, module, in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))


def part_of(module: str) -> str:
    """The entry of MAY_IMPORT that speaks for a module."""
    names = [name for name in MAY_IMPORT if module == name or (name != "gpt" and module.startswith(f"{name}."))]
    assert names, f"say in MAY_IMPORT what {module} may import"
    return max(names, key=len)


def allows(may: set[str], imported: str) -> bool:
    return any(imported == name or (name != "gpt" and imported.startswith(f"{name}.")) for name in may)


def test_there_is_something_to_read():
    assert {"gpt", *LIGHT, "gpt.launch", "gpt.training.trainer", "gpt.model.transformer"} <= MODULES.keys()
    assert any(i.of == "gpt.training.trainer" and i.in_function for i in imports("gpt.launch"))
    assert any(i.of == "gpt.model.transformer" and not i.in_function for i in imports("gpt.training.trainer"))
    assert all(i.in_function for i in imports("gpt.sweep") if i.of == "gpt.runs.listing"), "what is for types alone does not count"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    part = part_of(module)
    ours = [i for i in imports(module) if i.of == "gpt" or i.of.startswith("gpt.")]
    wrong = [str(i) for i in ours if not allows(MAY_IMPORT[part] | ({part} if part in ONE_ROOF else set()), i.of)]
    assert not wrong, wrong
    early = [str(i) for i in ours if i.of in ONLY_IN_FUNCTIONS and part_of(i.of) != part and not i.in_function]
    assert not early, early


ONE_ROOF = {name for name in MAY_IMPORT if name != "gpt" and (ROOT / name.replace(".", "/")).is_dir()}  # folders import their own files


@pytest.mark.parametrize(
    "module",
    [m for m in MODULES if m.startswith(("gpt.data", "gpt.runtime", "gpt.inference", "gpt.model", "gpt.evaluation", "gpt.finetuning"))],
)
def test_only_one_room_knows_of_training_and_only_inside_a_function(module):
    known = [i for i in imports(module) if i.of.startswith("gpt.training")]
    assert not known or (module == "gpt.inference.loading" and all(i.in_function for i in known)), known


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("gpt.model")])
def test_the_model_knows_only_torch(module):
    for found in imports(module):
        library = found.of.partition(".")[0]
        if library == "gpt":
            assert found.of.startswith("gpt.model"), str(found)
        elif library not in sys.stdlib_module_names:
            assert library in MODEL_LIBRARIES or (found.in_function and library in MODEL_LIBRARIES_IN_FUNCTIONS), str(found)


def test_there_are_no_circles():
    graph = {module: {i.of for i in imports(module) if i.of in MODULES and not i.in_function} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())
    assert done == MODULES.keys()


@pytest.mark.parametrize("module", LIGHT)
def test_what_answers_at_once_imports_nothing_heavy(module):
    reached, waiting = set(), [module, "gpt"]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        parents = [name.rpartition(".")[0]] if "." in name else []
        now = [i for i in imports(name) if not i.in_function]
        heavy = [str(i) for i in now if i.of.partition(".")[0] in HEAVY]
        assert not heavy, heavy
        waiting += [m for m in [*parents, *(i.of for i in now)] if m in MODULES]
    assert module in reached
    loaded = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT,
    ).stdout.split()
    assert module in loaded
    assert not HEAVY & set(loaded)


# Files


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_longer_than_500_lines_or_named_for_nothing(module):
    path = MODULES[module]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
    assert not {*module.split(".")} & {"util", "utils", "helper", "helpers", "common", "misc", "shared"}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module):
    assert ast.get_docstring(parsed(MODULES[module]))


def test_the_readme_is_short():
    readme = ROOT / "README.md"
    assert not readme.exists() or len(readme.read_text(encoding="utf-8").splitlines()) < 250


# Strings


def strings(path: Path) -> Iterator[ast.Constant]:
    """String literals of a file, without docstrings and without the choices of a Literal."""
    yield from _strings(parsed(path))


def _strings(node: ast.AST) -> Iterator[ast.Constant]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        if isinstance(child, ast.Subscript) and ast.unparse(child.value).rpartition(".")[2] == "Literal":
            continue
        if isinstance(node, ast.JoinedStr) and isinstance(child, ast.Constant) and child is not node.values[0]:
            continue  # what follows a value within a text is no text of its own
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child
        yield from _strings(child)


# What knows one device from another: their own files, the model's table of kernels, AWS's machines, the doctor, and the spelling aid (gpu
# means cuda).
KNOWS_DEVICES = re.compile(
    r"gpt\.runtime\.(device|cpu|cuda|mps|neuron\w*|environment)|gpt\.model\.kernels|gpt\.aws\.instances|gpt\.doctor(\.\w+)?|gpt\.typed"
)


@pytest.mark.parametrize("module", [m for m in MODULES if not KNOWS_DEVICES.fullmatch(m)])
def test_nothing_else_names_a_device(module):
    path = MODULES[module]
    named = [f"{module}:{s.lineno}" for s in strings(path) if re.fullmatch(r"(cuda|mps|neuron|neuron_sim)(:\d+)?", s.value)]
    assert not named, named
    tree = list(ast.walk(parsed(path)))
    asked = [f"{module}:{n.lineno}" for n in tree if isinstance(n, ast.Compare) and '"cpu"' in ast.unparse(n).replace("'", '"')]
    used = [
        f"{module}:{n.lineno}" for n in tree if isinstance(n, ast.Attribute) and re.search(r"torch\.(cuda|mps)$|\.is_cuda$", ast.unparse(n))
    ]
    assert not asked + used, asked + used


@pytest.mark.parametrize("module", MODULES)
def test_no_path_of_one_machine(module):
    # The same on every machine of its kind, or what one says in a chat.
    system = ("/proc", "/sys", "/dev", "/opt/ml", "/opt/aws", "/aws/sagemaker", "/tmp/gpt", "/etc/hosts", "/exit", "/reset")
    found = [s.value for s in strings(MODULES[module]) if re.match(r"/[A-Za-z]\w*(/|$)", s.value) and not s.value.startswith(system)]
    assert not found, found


def test_nothing_refers_to_files_outside_the_repository():
    kept = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True, check=False, cwd=ROOT
    ).stdout.decode()
    files = [ROOT / name for name in kept.split("\0") if name] or [*SOURCES, *(ROOT / "configs").rglob("*.yaml")]
    outside = re.compile(r"\bshared[/]|/work[/]main|/root[/]|/home[/]\w")
    for path in files:
        if path.is_file() and path.suffix not in (".png", ".jpg", ".safetensors", ".bin"):
            found = outside.search(path.read_text(encoding="utf-8", errors="replace"))
            assert not found, f"{path.relative_to(ROOT)}: {found}"
