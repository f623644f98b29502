"""The command line in processes of its own: how fast it answers, what it says to a slip, and that text arrives word for word."""

import contextlib
import io
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from bad_input import BAD_INPUT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gpt import GPT, GPTConfig, cli
from gpt.cli import main
from gpt.commands import COMMANDS, GenerateConfig, PrepareConfig
from gpt.compose import compose_run, compose_use
from gpt.config import RunConfig
from gpt.data.tokenizer_training import byte_tokenizer
from gpt.errors import UserError
from gpt.help import EXAMPLES
from gpt.typed import from_dict, schema_keys

CONSOLE_SCRIPT = Path(sys.executable).with_name("gpt")  # of an installed package
MODULE = [sys.executable, "-m", "gpt"]
HELPS = [["--help"], *([command, "--help"] for command in COMMANDS)]

ODD_TEXTS = [
    "import ", "  two spaces  ", "a\nb\n", "\ttab", "it's", '"quoted"', "'quoted'", "'", '"', "\\", "\\'", "\\\\'", "C:\\new\\", "a=b", "=",
    "x == {1: [2, 3]}", "[1, 2]", "[", "]", "{", "(", "$HOME", "${seed}", "${nope", "\\${seed}", "\\\\${seed}", "$", "# not a comment",
    "a,b", "null", "true", "1e3", "é", "🤖🤖", "東京", "e\u0301", "\u200b", "\x85", "\u2028", "~", "*.py", "%s", "-1", "--help",
    "key: value", "- item", "&a", "!tag", "|", ">", "@", "`", "\x07",
]  # fmt: skip


def run(*arguments: str | bytes, cwd: Path, command: list[str] = MODULE, **environment: str) -> subprocess.CompletedProcess[bytes]:
    names = {k: v for k, v in os.environ.items() if k != "GPT_DEBUG"} | environment
    return subprocess.run([*command, *arguments], capture_output=True, timeout=60, cwd=cwd, env=names)


def answers_within(limit: float, arguments: list[str], cwd: Path) -> bool:
    """Seconds of a processor, once in five times: what it needs, not what else the machine was doing. It waits for nothing else."""
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(*arguments, cwd=cwd)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < limit:
            return True
    return False


def call(*arguments: str) -> tuple[int, str, str]:
    """`main` in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        return main(arguments), out.getvalue(), err.getvalue()


# Speed


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help_answers_within_half_a_second(arguments, tmp_path):
    assert answers_within(0.5, arguments, tmp_path)


@pytest.mark.parametrize(
    "arguments",
    ["pretrain model.n_hed=3", "pretrain model.n_layer=three", "pretrain model=gpt3", "pretrain model.d_model=190", "pretrain data=text"],
)
def test_a_config_error_comes_within_a_second(arguments, tmp_path):
    assert answers_within(1, arguments.split(), tmp_path)


def test_neither_help_nor_config_errors_import_torch(tmp_path):
    commands = [*HELPS, *(line.split() for line in BAD_INPUT), ["pretrain", "--cfg"], ["generate", "model=x", "--cfg"]]
    script = (
        "import contextlib, io, json, sys\n"
        "from gpt.cli import main\n"
        "from tests.compositions import compose_once\n"
        "compose_once()\n"
        "for arguments in json.loads(sys.stdin.read()):\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "        main(arguments)\n"
        "    heavy = {'torch', 'transformers', 'tokenizers', 'numpy'} & sys.modules.keys()\n"
        "    assert not heavy, (arguments, heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(commands), capture_output=True, text=True, timeout=100, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# Help


@pytest.mark.parametrize("command", [MODULE, [str(CONSOLE_SCRIPT)]], ids=["python -m gpt", "gpt"])
def test_help_of_both_entry_points(command, tmp_path):
    if command != MODULE and not CONSOLE_SCRIPT.exists():
        pytest.skip("the package is not installed with its console script")
    done = run("--help", cwd=tmp_path, command=command)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"pretrain" in done.stdout
    assert b"generate" in done.stdout
    done = run("pretain", cwd=tmp_path, command=command)
    assert (done.returncode, done.stdout) == (2, b"")
    assert run("--version", cwd=tmp_path, command=command).stdout.startswith(b"gpt 0.")


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]], ids=str)
def test_without_a_command_there_is_an_overview(arguments):
    assert call(*arguments) == call("--help")
    assert call(*arguments)[0] == 0


@pytest.mark.parametrize(
    "arguments", ["pretrain --help", "pretrain -h", "--help pretrain", "help pretrain", "pretrain model.n_layer=x --help"]
)
def test_help_of_a_command_lists_every_group_option_and_key(arguments):
    code, out, err = call(*arguments.split())
    assert (code, err) == (0, "")
    for key, hint in schema_keys(RunConfig).items():
        if key != "command" and not hasattr(hint, "__dataclass_fields__"):
            assert f"\n  {key}=" in out, key
    for option in ("nano", "gpt2-xl", "transformer-2017", "stdlib", "muon", "wsd", "quick", "overfit", "pretrained"):
        assert option in out
    assert max(map(len, out.splitlines())) <= 120
    assert "model.n_layer=4 " in out  # the default preset's, not the dataclass's


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_keys_of_every_command(command):
    code, out, _ = call(*command.split(), "--help")
    assert code == 0
    keys = schema_keys(COMMANDS[command].config)
    for key, hint in keys.items():
        assert (f"\n  {key}=" in out) == (key != "command" and not hasattr(hint, "__dataclass_fields__")), key
    for key in re.findall(r"^  ([\w.]+)=", out.partition("keys (key=default):")[2], re.MULTILINE):
        assert key in keys
    assert max(map(len, out.splitlines())) <= 120
    assert f"gpt {command}" in out.partition("examples:")[2]


@pytest.mark.parametrize("line", [example for examples in EXAMPLES.values() for example, _ in examples])
def test_every_example_of_the_help_is_understood(line):
    code, out, err = call(*shlex.split(line)[1:], "--cfg")
    if code == 0:
        assert out
    else:
        assert "<" in err, "nothing is wrong but what <id> or <folder> stands for"


# Bad input


@pytest.mark.parametrize("line", BAD_INPUT)
def test_a_slip_gets_one_line_that_names_it(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPT_DEBUG", raising=False)
    code, out, message = call(*line.split(" "))
    assert (code, out) == (2, ""), message
    assert message.startswith("gpt: ")
    assert message.count("\n") == 1
    assert message.endswith("\n")
    for part in BAD_INPUT[line]:
        assert part in message
    for jargon in ("Traceback", "Hydra", "hydra.cc", "override", "OmegaConf", "DictConfig", "object_type"):
        assert jargon not in message
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


@pytest.mark.parametrize("argument", [b"run.dir=\xff", b"model=\xff", b"\xff=1", b"data.paths=[\xff]"])
def test_bytes_that_are_not_utf8_are_refused(argument, tmp_path):
    done = run("pretrain", argument, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)
    assert b"not valid UTF-8" in done.stderr


@pytest.mark.parametrize("argument", ["run.id=a\nb", "promt=a\nb", "model=a\r\nb", "model.n_layer=\x1b[31m"])
def test_line_breaks_and_control_characters_in_a_value_do_not_break_the_line(argument):
    code, out, err = call("pretrain", argument)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err[:-1].isprintable()


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """The folder of five runs, started one after the other, in the folder where we are."""
    for age, name in enumerate(("deep", "first", "last", "new", "other")):
        config = tmp_path / "runs" / name / "config.yaml"
        config.parent.mkdir(parents=True)
        config.write_text("")
        os.utime(config, (age, age))
    (tmp_path / "book.txt").write_text("")
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.mark.parametrize("settings", ["generate model", "evaluate model", "export run", "finetune init", "pretrain resume"])
def test_a_run_that_is_not_there_gets_the_nearest_or_the_newest(settings, runs):
    command, key = settings.split()
    newest = "the newest first: runs/other, runs/new, runs/last and 2 more\n"
    for path, said in (
        ("runs/frist", "there is no such directory. Did you mean runs/first?\n"),
        ("runs/zzz", f"there is no such directory. There are, {newest}"),
        ("runs/", f"this folder holds runs; name one of them, {newest}"),
        ("runs", f"this folder holds runs; name one of them, {newest}"),
    ):
        code, out, err = call(command, f"{key}={path}")
        assert (code, out) == (2, "")
        assert err.startswith(f"gpt: {key}={path}: {said}"), err


def test_a_run_to_resume_is_found_by_its_id_alone(runs):
    for name in ("first", "frist"):
        assert call("pretrain", f"resume={name}")[2] == f"gpt: resume={name}: there is no such directory. Did you mean runs/first?\n"
    assert "Did you mean auto?" in call("pretrain", "resume=atuo")[2]
    assert call("pretrain", f"resume={'x' * 5000}")[0] == 2, "longer than the name of a file can be"
    assert "no such directory; give auto, never or" in call("pretrain", "resume=~nobody-of-this-name/x")[2]


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("generate weights", "model=weights"), ("inspect weights", "model=weights"), ("export weights", "run=weights"),
        ("finetune weights", "init=weights"), ("finetune book.txt", "data=text data.paths=[book.txt]"),
        ("evaluate book.txt", "data=text data.paths=[book.txt]"), ("pretrain runs/new", "resume=runs/new"),
        ("pretrain weights", "data=text data.paths=[weights]"),
    ],
)  # fmt: skip
def test_a_path_without_a_key_gets_its_key(line, meant, runs):
    assert call(*line.split()) == (2, "", f"gpt: {line.split()[1]}: must be key=value. Did you mean {meant}?\n")


def test_an_export_that_cannot_be_written_says_what_to_do(tmp_path):
    GPT(GPTConfig(vocab_size=257, context_length=8, n_layer=1, n_head=1, d_model=8)).save_pretrained(tmp_path / "model", byte_tokenizer())
    (tmp_path / "file").write_text("")
    code, _, err = call("export", f"run={tmp_path / 'model'}", f"output={tmp_path / 'file' / 'x'}")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"gpt: output={tmp_path / 'file' / 'x'} could not be written (")
    assert err.endswith("); name a folder with room where you may write\n")


def test_a_long_value_is_cut(tmp_path):
    code, _, err = call("pretrain", f"model.n_layer={'9' * 5000}")
    assert code == 2
    assert "model.n_layer='999" in err
    assert len(err) < 400


def test_debug_shows_the_traceback(tmp_path):
    done = run("pretrain", "model.n_hed=3", cwd=tmp_path, GPT_DEBUG="1")
    assert done.returncode == 1
    assert b"Traceback" in done.stderr
    assert b"UserError: model.n_hed=3" in done.stderr


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    command=st.sampled_from(["pretrain", "generate", "prepare", "inspect"]),
    key=st.one_of(
        st.sampled_from([*schema_keys(RunConfig), *schema_keys(GenerateConfig), *schema_keys(PrepareConfig), "experiment"]), st.text()
    ),
    prefix=st.sampled_from(["", "", "", "+", "~", "-", "--"]),
    value=st.one_of(
        st.text(),
        st.text("[](){}'\"\\,:=$~ \n0e.-", max_size=8),
        st.sampled_from(["nano", "null", "nan", "-inf", "1e999", "-1", "0", "1", "1.5", "true", "[]", "{}", "[1,2]", "3steps", "2epochs"]),
        st.sampled_from(["[{}]", "[{source: text}, {source: stdlib}]", "[{a: {b: 1}}, [c]]", "{a: 1}", "[{source: [x]}, {1: ''}]"]),
    ),
)
@example("pretrain", "data.paths", "", "[" * 5000)
@example("pretrain", "model.n_layer", "", "9" * 5000)
@example("prepare", "data.parts", "", "[{'${x}': 1}]")
@example("prepare", "data.parts", "", "[{source: '${x}', paths: ['\\\\${']}]")
@example("pretrain", "model.norm_eps", "", "1" + "0" * 400)
@example("pretrain", "train.micro_batch", "", "1" + "0" * 400)
def test_no_argument_whatever_makes_a_traceback(command, key, prefix, value):
    code, out, err = call(command, f"{prefix}{key}={value}", "--cfg")
    if code == 0:
        assert out
        assert err == ""
    else:
        assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("arguments", [["--help"], ["pretrain", "--help"]], ids=" ".join)  # written at the end, and before it
def test_a_reader_that_leaves_is_no_error(arguments, tmp_path):
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    process = subprocess.Popen([*MODULE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, env=buffered)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait(30)) == (b"", 0)


# --cfg


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["model=gpt2", "tokenizer=byte", "seed=7", "compile=false", "train.micro_batch=2"],
        ["experiment=quick", "optimizer=adamw", "train.sample_prompts=['a b', '🤖', '']", "optimizer.eps=1e-12"],
        ["experiment=gpt2_from_scratch", "data.paths=['it\\'s', \"${x}\", '[a]']", "run.id=2024", "run.dir=true"],
        ["model=transformer-2017", "schedule.warmup=100"],
    ],
    ids=str,
)
def test_cfg_prints_yaml_that_loads_back_to_the_same_config(arguments, tmp_path):
    done = run("pretrain", *arguments, "--cfg", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert from_dict(RunConfig, yaml.safe_load(done.stdout)) == compose_run("pretrain", arguments)
    assert not list(tmp_path.iterdir())


def test_cfg_on_a_terminal_without_unicode(tmp_path):
    done = run("pretrain", "run.dir=🤖é", "--cfg", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")


# Text, word for word


@pytest.mark.parametrize("text", ["import ", "print('a\\n', \"b\")\n\t$HOME ${x} [1, {2: 3}] = 🤖 \\'"])
def test_text_arrives_word_for_word_through_a_process(text, tmp_path):
    done = run("generate", "model=runs/my run", f"prompt={text}", f"stop={text}", "--cfg", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    config = from_dict(GenerateConfig, yaml.safe_load(done.stdout))
    assert (config.model, config.prompt, config.stop) == ("runs/my run", text, [text])


@pytest.mark.parametrize("text", ODD_TEXTS, ids=repr)
def test_odd_texts_arrive_word_for_word(text):
    assert compose_use("generate", ["model=x", f"prompt={text}"]).prompt == text
    path = "x" if text.startswith("[") else text  # which makes it a list
    assert compose_use("generate", ["model=x", f"stop={path}"]).stop == [path]
    config = compose_run("pretrain", ["data=text", f"data.paths={path}", f"run.dir={text}"])
    assert (config.data.paths, config.run.dir) == ([path], text)
    code, out, _ = call("generate", "model=x", f"prompt={text}", "--cfg")
    assert code == 0
    if text != "\x85":  # PyYAML writes it plain and reads it as a space; of all characters this one alone
        assert yaml.safe_load(out)["prompt"] == text


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("stop=[a, b c]", ["a", "b c"]),
        ("stop=['a, b', \"it's\"]", ["a, b", "it's"]),
        ("stop=['[', ']', '=', '${x}', '\\n']", ["[", "]", "=", "${x}", "\\n"]),
        ("stop=['it\\'s']", ["it's"]),
        ("stop=['\n', ' ']", ["\n", " "]),
        ("stop=[1, 2.5]", ["1", "2.5"]),
        ("stop=[]", []),
        ("stop=", []),
    ],
)
def test_lists_of_texts(argument, expected):
    assert compose_use("generate", ["model=x", argument]).stop == expected


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_prompt_arrives_word_for_word(text):
    assert compose_use("generate", ["model=x", f"prompt={text}"]).prompt == text


@settings(max_examples=25, deadline=None)
@given(st.one_of(st.text(min_size=1), st.text("\\'\"${}[]a ", min_size=1, max_size=12)))
def test_any_path_arrives_word_for_word(text):
    path = "x" if text.startswith("[") else text
    config = compose_run("pretrain", ["data=text", f"data.paths={path}", f"run.dir={text}", f"data.cache_dir={text}"])
    assert (config.data.paths, config.run.dir, config.data.cache_dir) == ([path], text, text)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text("ab,=$[]{}() #:é🤖\n", min_size=1), min_size=1, max_size=4))
def test_any_quoted_list_of_paths_arrives_word_for_word(texts):
    quoted = ", ".join(f"'{text}'" for text in texts)
    assert compose_run("pretrain", ["data=text", f"data.paths=[{quoted}]"]).data.paths == texts


def test_the_parts_of_a_mixture_arrive_word_for_word():
    texts = ["a, b", "it's", "${x}", "\\${x}", "[", "é🤖", "{a: 1}"]
    quoted = ", ".join("'" + text.replace("'", "\\'") + "'" for text in texts)
    parts = f"[{{source: text, paths: [{quoted}], fields: {{text: 'my ${{text}}'}}, weight: 2}}, {{source: hf, name: org/set}}]"
    first, second = compose_use("prepare", ["data=mixture", f"data.parts={parts}"]).data.parts
    assert (first.source, first.paths, first.fields.text, first.weight) == ("text", texts, "my ${text}", 2.0)
    assert (second.source, second.name, second.weight) == ("hf", "org/set", 1.0)


# --config-dir


def overlay(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        file = folder / f"{name.replace('__', '/')}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["mine", "my configs", "it's", "[x]", "a=b,c", "é🤖"])
def test_an_overlay_adds_an_option(name, tmp_path):
    folder = overlay(tmp_path / name, model__tiny="n_layer: 7\nn_head: 2\nd_model: 64\nbias: false\n")
    done = run("pretrain", "--config-dir", str(folder), "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert b"tiny" in done.stdout
    done = run("pretrain", "model=tiny", f"--config-dir={folder}", "--cfg", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model = yaml.safe_load(done.stdout)["model"]
    assert (model["n_layer"], model["d_model"], model["head_dim"]) == (7, 64, 32)
    assert call("pretrain", "model=tiny")[0] == 2


def test_an_overlay_experiment_sees_the_command_line(tmp_path):
    text = "# @package _global_\ndefaults:\n  - override /model: gpt2\ntrain: {eval_every: '${train.log_every}', budget: 2epochs}\n"
    folder = overlay(tmp_path, experiment__mine=text)
    config = compose_run("pretrain", ["experiment=mine", "train.log_every=77"], folder)
    assert (config.train.eval_every, config.train.budget, config.model.n_layer) == (77, "2epochs", 12)


@pytest.mark.parametrize(
    ("option", "text", "said"),
    [
        ("model=bad", "n_layre: 3", "model.n_layre=3: no such key. Did you mean model.n_layer?"),
        ("model=bad", "n_layer: three", "model.n_layer=three: must be a whole number"),
        ("model=bad", "n_layer: {a: 1}", "model.n_layer={a: 1}: must be a whole number"),
        ("model=bad", "n_layer: [1\nx: {", "bad.yaml"),
        ("model=bad", "- 1", "model/bad"),
        ("experiment=bad", "# @package _global_\ntrain: {budgte: 3steps}", "train.budget?"),
        ("experiment=bad", "# @package _global_\ntrian: {budget: 3steps}", "train?"),
        ("experiment=bad", "# @package _global_\ntrain:", "train=null: must be a section"),
        ("experiment=bad", "train: {budget: 3steps}", "# @package _global_"),
        ("experiment=bad", "# @package _global_\ndefaults:\n  - override /model: gpt7", "model/gpt7"),
        ("experiment=bad", "# @package _global_\ndefaults:\n  - bad", "leads back"),
        ("experiment=bad", "# @package _global_\ntrain: {eval_every: '${nope}'}", "train.eval_every"),
        ("experiment=bad", "# @package _global_\nresume: /nowhere", "resume=/nowhere"),
        ("model=nano", "x: 1", "no such key"),
    ],
)
def test_a_slip_in_an_overlay_gets_one_line_too(option, text, said, tmp_path):
    group, _, name = option.partition("=")
    folder = overlay(tmp_path, **{f"{group}__{'bad' if name == 'bad' else 'other'}": text})
    code, out, err = call("pretrain", option if name == "bad" else "model=other", "--config-dir", str(folder), "--cfg")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert "object_type" not in err


def test_an_overlay_cannot_take_a_built_in_name(tmp_path):
    folder = overlay(tmp_path, model__gpt2="n_layer: 1")
    with pytest.raises(UserError, match=r"model/gpt2\.yaml has the name of a built-in option"):
        compose_run("pretrain", [], folder)


def test_a_warning_of_ours_is_one_line_and_others_keep_their_place():
    ours = cli._warning("careful", UserWarning, str(Path(cli.__file__).parent / "inference" / "x.py"), 1)
    assert ours == "gpt: warning: careful\n"
    for category, place in ((UserWarning, "elsewhere/x.py"), (DeprecationWarning, cli.__file__)):
        assert cli._warning("careful", category, place, 1).startswith(f"{place}:1: {category.__name__}: careful\n")
