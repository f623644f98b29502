"""The Dockerfiles, without a container engine: read instruction by instruction, and the CPU image's steps run in fresh environments."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FILES = {name: ROOT / "docker" / f"{name}.Dockerfile" for name in ("cpu", "cuda", "neuron")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(n): v for n, _, v in (line.partition("==") for line in lines if line and not line.startswith("#"))}


# A reader of Dockerfiles: what ours use, and no more


@dataclass(frozen=True)
class Instruction:
    """One instruction, as `RUN`, its `--flags` and the rest as it is written, continued lines joined."""

    keyword: str
    flags: tuple[str, ...]
    rest: str


@dataclass
class Stage:
    """From one FROM to the next. `base` has its variables filled in."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def of(self, *keywords: str) -> list[Instruction]:
        return [i for i in self.instructions if i.keyword in keywords]

    def last(self, keyword: str) -> str:
        return self.of(keyword)[-1].rest


def read(text: str) -> list[Instruction]:
    """The instructions of a Dockerfile. Comments end nothing, not even inside a continued line; here-documents are not understood."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found = []
    for joined in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if joined.strip():
            keyword, _, rest = joined.strip().partition(" ")
            flags = []
            while match := re.match(r"\s*(--\S+)(?:\s+|$)", rest):
                flags.append(match[1])
                rest = rest[match.end() :]
            assert "<<" not in rest, "here-documents are not understood"
            found.append(Instruction(keyword.upper(), tuple(flags), rest.strip()))
    return found


def arguments(instructions: list[Instruction]) -> dict[str, str]:
    return dict(i.rest.partition("=")[::2] for i in instructions if i.keyword == "ARG")


def stages(text: str) -> list[Stage]:
    """The stages of a Dockerfile; an instruction before the first FROM is an ARG."""
    instructions = read(text)
    first = next(i for i, instruction in enumerate(instructions) if instruction.keyword == "FROM")
    assert all(i.keyword == "ARG" for i in instructions[:first])
    values, found = arguments(instructions[:first]), []
    for instruction in instructions[first:]:
        if instruction.keyword == "FROM":
            base, *name = re.split(r"\s+as\s+", instruction.rest, flags=re.IGNORECASE)
            found.append(Stage(re.sub(r"\$\{(\w+)\}", lambda m: values[m[1]], base), *(name or [""])))
        else:
            found[-1].instructions.append(instruction)
    return found


def options(flag: str) -> dict[str, str]:
    """`--mount=type=bind,source=a,target=/b` as a dict."""
    return dict(part.partition("=")[::2] for part in flag.partition("=")[2].split(","))


def mounts(instruction: Instruction) -> list[dict[str, str]]:
    return [options(flag) for flag in instruction.flags if flag.startswith("--mount=")]


def commands(script: str) -> list[str]:
    """What a RUN does one after the other."""
    return re.split(r"\s*&&\s*", script)


def pip_installs(stage: Stage) -> list[tuple[Instruction, str]]:
    """Each `pip install ...` of a stage, with the RUN that has it."""
    found = [(run, c) for run in stage.of("RUN") for c in commands(run.rest) if "pip install" in c]
    return [(run, c[c.index("pip install") :]) for run, c in found]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a file or folder from the build: the last pattern that names it or a folder above it decides."""
    parts = path.split("/")
    names = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    answer = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            anywhere = pattern.startswith("**/")
            if any(fnmatch.fnmatchcase(n.rpartition("/")[2] if anywhere else n, pattern.removeprefix("**/")) for n in names):
                answer = not line.startswith("!")
    return answer


@pytest.fixture(params=FILES)
def text(request: pytest.FixtureRequest) -> str:
    return FILES[request.param].read_text(encoding="utf-8")


def test_the_reader():
    first, second = stages(
        "# a comment\nARG PYTHON=python:3.12\n\nFROM ${PYTHON} AS wheel\nCOPY a b /c/\n"
        'FROM ubuntu\nRUN --mount=type=bind,from=wheel,source=/c,target=/d \\\n    echo "a" \\\n    # inside\n    && b --flag\n'
    )
    assert (first.base, first.name, second.base, second.name) == ("python:3.12", "wheel", "ubuntu", "")
    assert first.instructions == [Instruction("COPY", (), "a b /c/")]
    (run,) = second.instructions
    assert mounts(run) == [{"type": "bind", "from": "wheel", "source": "/c", "target": "/d"}]
    assert [shlex.split(c) for c in commands(run.rest)] == [["echo", "a"], ["b", "--flag"]]


def test_all_dockerfiles_are_looked_at():
    assert sorted(FILES.values()) == sorted((ROOT / "docker").glob("*Dockerfile*"))


# What goes in


def test_what_is_copied_is_there_and_not_ignored(text):
    seen: set[str] = set()
    for number, stage in enumerate(stages(text)):
        earlier = {s.name for s in stages(text)[:number]}
        for instruction in stage.of("COPY", "ADD", "RUN"):
            sources = [(m["source"], m.get("from")) for m in mounts(instruction) if m["type"] == "bind"]
            if instruction.keyword != "RUN":
                origin = next((f.partition("=")[2] for f in instruction.flags if f.startswith("--from=")), None)
                sources += [(s, origin) for s in instruction.rest.split()[:-1] if not s.startswith("https://")]
            for source, origin in sources:
                if origin is None:
                    assert (ROOT / source).exists(), source
                    assert not ignored(source), source
                    seen.add(source)
                else:
                    assert origin in earlier, origin
    assert {"pyproject.toml", "constraints.txt", "gpt", "configs"} <= seen


OUTSIDE = (
    ".git/config",
    ".venv/bin/python",
    "runs/r/config.yaml",
    ".env",
    "docker/cpu.Dockerfile",
    "tests/conftest.py",
    "gpt/__pycache__/x.pyc",
)


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_else_is_sent_to_the_engine(path):
    assert ignored(path)


def test_a_new_folder_is_not_sent_unless_a_dockerfile_asks_for_it():
    copied = {s for path in FILES.values() for stage in stages(path.read_text()) for i in stage.of("COPY") for s in i.rest.split()[:-1]}
    sent = {path.name for path in ROOT.iterdir() if not ignored(path.name)}
    assert sent == copied | {"constraints.txt"}


def test_no_secret_and_no_host_but_the_public_ones(text):
    assert not re.search(r"(?i)(token|secret|passw|credential|access_key|api_key)", text)
    hosts = set(re.findall(r"https?://([^/\s\"]+)", text))
    assert hosts <= {"download.pytorch.org", "pip.repos.neuron.amazonaws.com", "apt.repos.neuron.amazonaws.com"}


# Versions


def test_bases_are_pinned_by_tag_and_digest(text):
    names = {stage.name for stage in stages(text)} - {""}
    for stage in stages(text):
        assert stage.base in names or re.fullmatch(r"docker\.io/library/\w+:\d+\.\d+[\w.-]*@sha256:[0-9a-f]{64}", stage.base), stage.base
    assert "latest" not in text


def test_one_python_for_all_that_build_the_wheel():
    python = {stages(path.read_text())[0].base for path in FILES.values()}
    assert len(python) == 1
    version = re.search(r"python:(\d+\.\d+\.\d+)-", python.pop())
    assert version
    assert version[1] in SpecifierSet(PROJECT["requires-python"])


def test_each_package_is_pinned(text):
    pinned, installs = constraints(), [(run, c) for stage in stages(text) for run, c in pip_installs(stage)]
    assert len(installs) >= 4
    for run, command in installs:
        words = shlex.split(command)[2:]
        if "--no-index" in words:
            assert words[-1].endswith(".whl")  # ours, built above
            continue
        constraint = words[words.index("--constraint") + 1]
        assert {"type": "bind", "source": "constraints.txt", "target": constraint} in mounts(run)
        takes_value = {"--constraint", "--requirement", "--index-url", "--extra-index-url"}
        named = [w for before, w in zip(["", *words], words, strict=False) if before not in takes_value and not w.startswith("--")]
        for requirement in map(Requirement, named):
            exact = [s.operator for s in requirement.specifier] == ["=="]
            assert exact or (not requirement.specifier and canonicalize_name(requirement.name) in pinned), str(requirement)


def test_every_dependency_of_the_project_is_pinned():
    pinned = constraints()
    for requirement in map(Requirement, PROJECT["dependencies"]):
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, str(requirement)


def test_torch_neuronx_is_the_native_one_and_of_torch_s_minor_version():
    text = FILES["neuron"].read_text()
    (found,) = re.findall(r'"(torch-neuronx==[^"]+)"', text)
    (specifier,) = Requirement(found).specifier
    version = specifier.version.removesuffix(".*")
    assert version.split(".")[:2] == constraints()["torch"].split(".")[:2]
    (extra,) = map(Requirement, PROJECT["optional-dependencies"]["neuron"])
    assert version in extra.specifier
    installed = " ".join(command for stage in stages(text) for _, command in pip_installs(stage))
    assert not re.search(r"torch[-_]xla", installed)


# How it is built


def test_each_run_is_valid_shell(text):
    for stage in stages(text):
        shell = json.loads(stage.last("SHELL"))[0] if stage.of("SHELL") else "/bin/sh"
        for run in stage.of("RUN"):
            checked = subprocess.run([shell, "-n", "-c", run.rest], capture_output=True, text=True, check=False)
            assert checked.returncode == 0, f"{run.rest}\n{checked.stderr}"


def test_caches_stay_out_of_the_layers(text):
    for stage in stages(text):
        cache = {"type": "cache", "target": arguments(stage.instructions)["PIP_CACHE_DIR"]}
        for run, command in pip_installs(stage):
            assert "--no-cache-dir" in command or cache in mounts(run), command
        for run in stage.of("RUN"):
            if "apt-get" in run.rest:
                assert "--no-install-recommends" in run.rest
                assert "rm -rf /var/lib/apt/lists/*" in commands(run.rest)


def test_code_is_the_last_thing_installed(text):
    """So that a change of it makes a small layer only."""
    final = stages(text)[-1]
    assert "*.whl" in pip_installs(final)[-1][1]
    assert sum("from" in m for run in final.of("RUN") for m in mounts(run)) == 1


def test_the_wheel_and_what_it_needs_are_installed_in_the_same_way_everywhere():
    """So that the run of the CPU image's steps, below, speaks for the others too."""
    wheel, *others = (stages(path.read_text())[0] for path in FILES.values())
    assert wheel.name == "wheel"
    assert others == [wheel, wheel]
    last, *rest = ([run for run, _ in pip_installs(stages(path.read_text())[-1])][-2:] for path in FILES.values())
    assert rest == [last, last]


@pytest.mark.parametrize(("name", "user"), [("cpu", "gpt"), ("cuda", "gpt"), ("neuron", "root")])
def test_who_runs_it(name, user):
    final = stages(FILES[name].read_text())[-1]
    assert final.last("USER") == "${RUN_AS}"
    assert arguments(final.instructions)["RUN_AS"] == user
    added = any(c.startswith("useradd ") and c.endswith(f" {user}") for run in final.of("RUN") for c in commands(run.rest))
    assert added == (user != "root")


def test_the_last_thing_a_build_does_is_to_try_it_as_that_user(text):
    *_, user, smoke, entry, command = stages(text)[-1].instructions
    assert (user.keyword, smoke.keyword) == ("USER", "RUN")
    assert commands(smoke.rest)[0] in ("gpt doctor", "gpt doctor device=cpu")
    assert (entry.keyword, json.loads(entry.rest)) == ("ENTRYPOINT", ["gpt"])
    assert (command.keyword, json.loads(command.rest)) == ("CMD", ["--help"])


@pytest.mark.parametrize("name", FILES)
def test_make_builds_it_and_says_so_when_there_is_no_engine(name):
    make = ["make", "--no-print-directory", "-C", ROOT, f"docker-{name}"]
    built = subprocess.run([*make, "DOCKER=echo engine:", "ARGS=--pull"], capture_output=True, text=True, check=True)
    assert f"engine: build --file docker/{name}.Dockerfile --tag gpt:{name} --pull ." in built.stdout.splitlines()
    refused = subprocess.run([*make, "DOCKER=false"], capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert refused.stdout.startswith("No container engine answers 'false info'")


# The CPU image's steps, run


ELSEWHERE = ("apt-get ", "rm ", "useradd ", "install ")  # need root, and a machine that is thrown away


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_cpu_image_s_steps_install_and_run(tmp_path):
    """Each RUN that builds and installs, in order, in a fresh virtual environment for each stage, from the files that the engine is sent.

    Three things differ from a build. torch comes from this environment's own package index: PyTorch's, which the file names, need not be
    reachable from a test. Python is the one that runs the tests. What needs root (`ELSEWHERE`) is left out.
    """
    kept = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, kept.stdout.decode().split("\0")):
        if not ignored(name) and (ROOT / name).is_file():
            (tmp_path / "context" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "context" / name)

    done = []
    for stage in stages(FILES["cpu"].read_text()):
        done += run_stage(stage, tmp_path)
    assert sum("pip install" in c for c in done) == 4
    assert done[-1] == "gpt doctor"

    gpt = tmp_path / "final-environment" / "bin" / "gpt"
    version = subprocess.run([gpt, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True, env=clean_environment())
    assert version.stdout.strip() == "gpt " + re.findall(r'__version__ = "(.+)"', (ROOT / "gpt" / "__init__.py").read_text())[0]
    frozen = subprocess.run([gpt.with_name("pip"), "freeze", "--all"], capture_output=True, text=True, check=True).stdout.split("\n")
    installed = {canonicalize_name(n): v.partition("+")[0] for n, _, v in (line.partition("==") for line in frozen) if v}
    installed.pop("pip")
    assert "torch" in installed
    assert installed.items() <= constraints().items(), installed.items() - constraints().items()


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run_stage(stage: Stage, folder: Path) -> list[str]:
    """Run what can be run of a stage; folders of the image stand below `folder`. Returns the commands that were run."""
    venv = folder / f"{stage.name or 'final'}-environment"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    environment = clean_environment() | {"PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(venv)}
    there = {"/dist": folder / "dist", "/src": folder / "src", "/workspace": folder / "work", "/gpt": folder / "home"}
    for path in there.values():
        path.mkdir(exist_ok=True)
    where, done = folder, []

    def placed(script: str, paths: dict[str, Path]) -> str:
        return re.sub(rf"(?<![\w/])({'|'.join(paths)})(?=[/\s\"']|$)", lambda m: str(paths[m[1]]), script)

    for instruction in stage.instructions:
        if instruction.keyword == "WORKDIR":
            where = there[instruction.rest]
        elif instruction.keyword == "ENV":
            settings = dict(word.partition("=")[::2] for word in shlex.split(instruction.rest))
            environment |= {name: placed(value, there) for name, value in settings.items()}
        elif instruction.keyword == "COPY":
            *sources, target = instruction.rest.split()
            for source in sources:
                origin = folder / "context" / source
                if origin.is_dir():
                    shutil.copytree(origin, where / target)
                else:
                    shutil.copy(origin, where / target)
        elif instruction.keyword == "RUN":
            bound = {}
            for mount in mounts(instruction):
                if mount["type"] == "bind":
                    bound[mount["target"]] = there[mount["source"]] if "from" in mount else folder / "context" / mount["source"]
            for command in commands(instruction.rest):
                if command.startswith(ELSEWHERE):
                    continue
                assert command.startswith(("pip ", "python ", "gpt ")), command
                script = placed(command.replace('--index-url "${TORCH_INDEX}"', ""), there | bound)
                assert "${" not in script
                run = subprocess.run(
                    ["/bin/bash", "-o", "pipefail", "-c", script], cwd=where, env=environment, capture_output=True, text=True, check=False
                )
                assert run.returncode == 0, f"{script}\n{run.stdout}\n{run.stderr}"
                done.append(command)
    return done
