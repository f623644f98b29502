"""The schema and the values: everything under configs/ composes, every key exists, every type is checked."""

import ast
import dataclasses
import inspect
import itertools
import sys
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.arguments import config_directory, groups
from gpt.commands import COMMANDS, GenerateConfig, ModelUse
from gpt.compose import compose_run, compose_use, load_run
from gpt.config import RunConfig, Span, TrainConfig, parse_span
from gpt.data.config import (
    EXAMPLE_SOURCES,
    DataConfig,
    FieldNames,
    PartConfig,
    SourceConfig,
    holds_examples,
    validate_examples,
    validate_text,
)
from gpt.errors import UserError
from gpt.model.config import GPTConfig
from gpt.typed import from_dict, plain, schema_keys
from tests.training.finetuning import save_small_model

CONFIGS = config_directory()
OPTIONS = [(group, option) for group, options in groups().items() for option in options]
NEEDS = {  # what an option cannot do without
    ("launch", "sagemaker"): ["launch.role=arn:aws:iam::123456789012:role/training", "launch.output=s3://bucket/prefix"],
    ("data", "text"): ["data.paths=[book.txt]"],
    ("data", "jsonl"): ["data.paths=[rows.jsonl]"],
    ("data", "parquet"): ["data.paths=[rows.parquet]"],
    ("data", "hf"): ["data.name=org/set"],
    ("data", "mixture"): ["data.parts=[{source: text, paths: [a.txt], weight: 2}, {source: stdlib}]"],
    ("tokenizer", "pretrained"): ["tokenizer.path=gpt2"],
    ("experiment", "gpt2_from_scratch"): ["data.paths=[book.txt]"],
    ("experiment", "char_fast"): ["data.paths=[book.txt]"],
    ("experiment", "finetune_preference"): ["data.paths=[pairs.jsonl]"],
}
NOT_TEXT = {("data", source) for source in EXAMPLE_SOURCES}  # what gpt pretrain cannot take
FROM_WEIGHTS = [name for name in groups()["experiment"] if name.startswith("finetune")]  # experiments of gpt finetune
FROM_NOTHING = [name for name in groups()["experiment"] if name not in FROM_WEIGHTS]


def compose(*arguments: str) -> RunConfig:
    return compose_run("pretrain", arguments)


@pytest.fixture(scope="module")
def init(tmp_path_factory) -> Path:
    """Weights to start from."""
    return save_small_model(tmp_path_factory.mktemp("init") / "model")


# configs/


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=["=".join(pair) for pair in OPTIONS])
def test_every_option_composes_and_validates(group, option, request):
    arguments = [f"{group}={option}", *NEEDS.get((group, option), [])]
    if (group, option) in NOT_TEXT:
        config = compose_use("inspect", arguments)
    elif (group, option) == ("experiment", "finetune_distill"):  # its student's shape is that of gpt pretrain
        config = compose(*arguments, f"distill.teacher={request.getfixturevalue('init')}")
    elif group == "experiment" and option in FROM_WEIGHTS:
        model = request.getfixturevalue("init")
        teacher = [f"distill.teacher={model}"] if option == "finetune_distill" else []
        config = compose_run("finetune", [*arguments, f"init={model}", *teacher])
    else:
        config = compose(*arguments)
    text = (CONFIGS / group / f"{option}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    values.pop("defaults", None)
    composed = plain(config)
    for key, value in leaves(values if text.startswith("# @package _global_") else {group.partition("/")[0]: values}):  # each value arrives
        section = composed
        for part in key.split("."):
            section = section[part]
        if isinstance(section, list) and any(isinstance(item, dict) for item in section):  # of sections, each says a part
            section = [{k: whole[k] for k in said} for whole, said in zip(section, value, strict=True)]
        assert section == value or (key.startswith("model.") and value == 0), key
    assert from_dict(type(config), plain(config)) == config


def test_experiments_and_debug_modes_go_together_with_every_model():
    for experiment, model in itertools.product(FROM_NOTHING, groups()["model"]):
        config = compose(f"experiment={experiment}", f"model={model}", *NEEDS.get(("experiment", experiment), []))
        assert config.model.positions == compose(f"model={model}").model.positions
    for experiment, debug in itertools.product(FROM_NOTHING, groups()["debug"]):
        config = compose(
            f"experiment={experiment}", f"debug={debug}", "tokenizer.path=null", "data=text", "data.paths=[x]", "tokenizer=bpe"
        )
        assert config.train.batch_tokens == 512


def test_the_default_run_is_small_and_needs_nothing():
    config = compose()
    assert config.model.stock_architecture() == "Qwen3"
    assert parse_span("train.budget", config.train.budget).unit == "tokens", "its quality must not depend on the machine"
    assert config.data.source == "stdlib"
    assert config.command == "pretrain"


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_key_of_every_file_exists(file):
    text = file.read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    defaults = values.pop("defaults", [])
    is_global = text.startswith("# @package _global_\n") or file.parent == CONFIGS
    prefix = "" if is_global else f"{file.relative_to(CONFIGS).parts[0]}."
    keys = schema_keys(RunConfig)
    for key, _ in leaves(values):
        assert prefix + key in keys
    for entry in defaults:
        for group, option in entry.items() if isinstance(entry, dict) else ():
            assert option is None or option in groups()[group.removeprefix("override /")]
    assert any(line.startswith("# ") and "@package" not in line for line in text.splitlines()), "say what it is for"


def test_groups_are_the_sections_that_have_files_and_four_more():
    sections = {name for name, hint in schema_keys(RunConfig).items() if dataclasses.is_dataclass(hint) and "." not in name}
    assert set(groups()) == sections - {"run", "lora", "distill", "dpo"} | {"experiment", "debug", "launch/instance", "launch/security"}


def test_a_file_with_a_bad_key_is_refused(tmp_path):
    for file in sorted((CONFIGS / "model").glob("*.yaml")):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "bad.yaml").write_text(file.read_text(encoding="utf-8") + "\nrope_thta: 1.0\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"model\.rope_thta=1: no such key\. Did you mean model\.rope_theta\?"):
            compose_run("pretrain", ["model=bad"], tmp_path)


def leaves(values: dict, prefix: str = "") -> list[tuple[str, object]]:
    found = []
    for key, value in values.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found


# Precedence


def test_the_command_line_beats_the_experiment_beats_the_group():
    assert compose().model.n_layer == 4
    assert compose("experiment=quick").model.n_layer == 2
    assert compose("experiment=quick", "model.n_layer=5").model.n_layer == 5
    assert compose("model.n_layer=5", "experiment=quick").model.n_layer == 5
    config = compose("experiment=quick", "model=gpt2")
    assert (config.model.n_layer, config.model.d_model, config.model.vocab_size) == (2, 128, 50257)
    assert compose("experiment=gpt2_from_scratch", "model=nano", "data.paths=[x]").model.norm == "rmsnorm"
    assert compose("experiment=gpt2_from_scratch", "data.paths=[x]").model.d_model == 768


@pytest.mark.parametrize("arguments", [("model=gpt2", "model.n_layer=2"), ("model.n_layer=2", "model=gpt2")])
def test_a_key_beats_its_group_in_either_order(arguments):
    config = compose(*arguments)
    assert (config.model.n_layer, config.model.d_model) == (2, 768)


def test_the_last_of_two_settings_counts():
    assert compose("seed=1", "seed=2").seed == 2
    assert compose("model=gpt2", "model=nano").model.d_model == 192
    assert compose("experiment=quick", "experiment=null") == compose()


def test_composing_twice_is_composing_once():
    first, second = compose(), compose()
    assert first == second
    first.train.sample_prompts.append("x")
    assert second.train.sample_prompts == compose().train.sample_prompts != first.train.sample_prompts


# Resuming


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "runs" / "mine"
    directory.mkdir(parents=True)
    config = compose("model=transformer-2017", "seed=5", "run.id=other", "data=text", "data.paths=['it\\'s ${x}']")
    (directory / "config.yaml").write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    return directory


def test_a_run_directory_is_continued_with_its_own_config(run_directory):
    config = compose(f"resume={run_directory}", "train.budget=9Mtokens", "device.name=cpu")
    assert (config.seed, config.model.d_model, config.data.paths) == (5, 512, ["it's ${x}"])
    assert (config.run.id, Path(config.run.dir)) == ("mine", run_directory.parent)
    assert (config.train.budget, config.device.name, config.resume) == ("9Mtokens", "cpu", str(run_directory))
    assert load_run(run_directory).run.id == "other"


def test_a_run_directory_is_found_by_any_name(run_directory, monkeypatch):
    (run_directory.parent / "latest").symlink_to("mine")
    monkeypatch.chdir(run_directory)
    monkeypatch.setenv("HOME", str(run_directory.parent))
    for name in (".", "../mine", "../mine/", "../latest", "../../runs/mine", str(run_directory), "~/mine"):
        run = compose(f"resume={name}").run
        assert (Path(run.dir) / run.id).resolve() == run_directory, name
        assert run.id == "mine"


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("model=nano", r"^model=nano: a run is continued with the groups it has; change single keys, such as model\.vocab_size="),
        ("parallel=ddp", r"such as parallel\.name="),
        ("experiment=quick", r"such as train\.budget="),
        ("run.id=b", r"^run\.id=b: .*own directory"),
        ("run.dir=b", r"^run\.dir=b: .*own directory"),
        ("seed=x", r"^seed=x: must be a whole number"),
        ("train.batch_tokens=3", r"^train\.batch_tokens=3 is not a multiple"),
    ],
)
def test_what_cannot_change_in_a_run(argument, said, run_directory):
    with pytest.raises(UserError, match=said):
        compose(f"resume={run_directory}", argument)


def test_a_run_goes_on_on_another_device(run_directory):
    before = compose(f"resume={run_directory}")
    after = compose(f"resume={run_directory}", "device=neuron_sim", "device.chip=trn3")
    assert (after.device.name, after.device.chip) == ("neuron_sim", "trn3")
    after.device = before.device
    assert after == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"model: {n_layre: 3}", r"config\.yaml: model\.n_layre=3: no such key\. Did you mean model\.n_layer\?"),
        (b"model: {n_layer: [1]}", r"config\.yaml: model\.n_layer=\[1\]: must be a whole number"),
        (b"model: 3", r"config\.yaml: model=3: must be a section"),
        (b"", r"config\.yaml: config=null: must be a section"),
        (b"- 1", r"config\.yaml: config=\[1\]: must be a section"),
        (b"model: [", r"config\.yaml cannot be read"),
        (b"seed: \xff", r"config\.yaml cannot be read"),
    ],
)
def test_a_spoilt_config_file_of_a_run_is_named(text, said, tmp_path):
    (tmp_path / "config.yaml").write_bytes(text)
    with pytest.raises(UserError, match=said) as caught:
        load_run(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_run_directory_without_a_config_file(tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
        load_run(tmp_path)


# The schema


def schema_classes() -> list[type]:
    """Every dataclass that a command's settings are made of, with what it inherits from."""
    found: list[type] = []
    waiting: list[object] = [command.config for command in COMMANDS.values()]
    while waiting:
        hint = waiting.pop()
        if isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint not in found:
            found.append(hint)
            waiting += [*hint.__bases__, *typing.get_type_hints(hint).values()]
        waiting += typing.get_args(hint)
    return sorted(found, key=lambda cls: cls.__name__)


def test_the_schema_is_found():
    assert {RunConfig, TrainConfig, GPTConfig, ModelUse, GenerateConfig, SourceConfig, PartConfig, FieldNames} <= {*schema_classes()}


@pytest.mark.parametrize("cls", schema_classes(), ids=lambda cls: cls.__name__)
def test_every_field_has_a_docstring(cls):
    (body,) = [
        node.body
        for node in ast.parse(inspect.getsource(sys.modules[cls.__module__])).body
        if isinstance(node, ast.ClassDef) and node.name == cls.__name__
    ]
    documented = {
        field.target.id
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and str(text.value.value).strip().endswith((".", "?"))
    }
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}("), "dataclass writes that by itself"
    hints = typing.get_type_hints(cls)
    sections = {name for name in inspect.get_annotations(cls) if dataclasses.is_dataclass(hints[name])}  # which their own classes describe
    assert documented | sections == {*inspect.get_annotations(cls)}


def test_no_two_configs_share_a_list():
    a, b = RunConfig(), RunConfig()
    a.data.paths.append("x")
    assert b.data.paths == []


@pytest.mark.parametrize("setting", [{"document_mask": True}, {"streaming": True}])
def test_settings_that_only_text_has(setting):
    validate_text(DataConfig(**setting))
    with pytest.raises(UserError, match=rf"^data\.{next(iter(setting))}=true is of text: .*; leave it out$"):
        validate_examples(DataConfig(**setting))


@pytest.mark.parametrize(
    ("sources", "pretraining", "finetuning"),
    [
        (["stdlib"], False, False), (["text"], False, False), (["jsonl"], False, True), (["hf"], False, True),
        (["stdlib_docstrings"], True, True), (["text", "stdlib"], False, False), (["jsonl", "parquet"], False, True),
        (["jsonl", "stdlib_tokens"], None, True), (["text", "jsonl"], False, None),
    ],
)  # fmt: skip
def test_which_sources_hold_examples(sources, pretraining, finetuning):
    data = DataConfig(source=sources[0]) if len(sources) == 1 else DataConfig("mixture", parts=[PartConfig(source=s) for s in sources])
    for expected, is_finetuning in ((pretraining, False), (finetuning, True)):
        if expected is None:
            with pytest.raises(UserError, match=r"^data\.parts: \w+ holds examples and \w+ text; mix only one kind$"):
                holds_examples(data, is_finetuning)
        else:
            assert holds_examples(data, is_finetuning) is expected


def test_what_a_dict_leaves_out_keeps_its_default():
    assert from_dict(RunConfig, {}) == RunConfig()
    assert from_dict(TrainConfig, {"log_every": 3}) == TrainConfig(log_every=3)


@settings(max_examples=100, deadline=None)
@given(
    st.builds(
        GenerateConfig,
        model=st.text(),
        prompt=st.text(),
        stop=st.lists(st.text()),
        temperature=st.floats(0, 1e9),
        seed=st.none() | st.integers(),
    )
)
def test_to_dict_and_back(config):
    assert from_dict(GenerateConfig, plain(config)) == config


# Lengths of time


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500", Span("steps", 500)), ("500steps", Span("steps", 500)), ("1step", Span("steps", 1)), ("2ksteps", Span("steps", 2000)),
        ("10Mtokens", Span("tokens", 1e7)), ("4700ktokens", Span("tokens", 4.7e6)), ("1.5Btokens", Span("tokens", 1.5e9)),
        ("2Gtokens", Span("tokens", 2e9)), ("1Ttokens", Span("tokens", 1e12)), ("1_000_000tokens", Span("tokens", 1e6)),
        ("1e6tokens", Span("tokens", 1e6)), ("1token", Span("tokens", 1)), ("2epochs", Span("epochs", 2)),
        ("0.5epochs", Span("epochs", 0.5)),
        ("1epoch", Span("epochs", 1)), ("90s", Span("seconds", 90)), ("90sec", Span("seconds", 90)), ("3min", Span("seconds", 180)),
        ("0.5min", Span("seconds", 30)), ("2h", Span("seconds", 7200)), (" 3 min ", Span("seconds", 180)),
        ("3 Mtokens", Span("tokens", 3e6)), ("10minutes", Span("seconds", 600)), ("10mins", Span("seconds", 600)),
        ("1minute", Span("seconds", 60)), ("10 seconds", Span("seconds", 10)), ("1second", Span("seconds", 1)),
        ("9secs", Span("seconds", 9)), ("2hours", Span("seconds", 7200)), ("1hour", Span("seconds", 3600)),
        ("1.5hr", Span("seconds", 5400)), ("2hrs", Span("seconds", 7200)), ("500 steps", Span("steps", 500)),
        ("10Min", Span("seconds", 600)), ("10 Tokens", Span("tokens", 10)), ("2 EPOCHS", Span("epochs", 2)), ("3M", Span("steps", 3e6)),
    ],
)  # fmt: skip
def test_spans(text, expected):
    assert parse_span("train.budget", text) == expected


@pytest.mark.parametrize(
    "text",
    ["", " ", "0", "0steps", "0.0tokens", "0h", "-5steps", "steps", "min", "5 days", "1e999steps", "1e400h", "0.5steps", "0.1",
     "nan", "inf", "null", "3M min tokens", "1,000steps", "5steps 3min", "٣steps", "5steps;", "--5", "1e3e3steps"],
)  # fmt: skip
def test_lengths_that_are_none(text):
    with pytest.raises(UserError) as caught:
        parse_span("train.budget", text)
    assert str(caught.value) == f"train.budget={text}: must be a length such as 500steps, 10Mtokens, 2epochs, 90s or 3min"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("5stepps", "5steps"), ("3m", "3min"), ("10mintes", "10minutes"), ("10Mtokns", "10Mtokens"), ("10Mtok", "10Mtokens"),
        ("1_000 stps", "1_000steps"), ("2epcohs", "2epochs"), ("90scs", "90secs"), ("2huors", "2hours"),
    ],
)  # fmt: skip
def test_the_nearest_unit(text, meant):
    with pytest.raises(UserError) as caught:
        parse_span("train.budget", text)
    assert str(caught.value).endswith(f" or 3min. Did you mean {meant}?")
    assert parse_span("train.budget", meant)


def test_a_length_in_a_unit_that_does_not_count_here():
    assert parse_span("checkpoint.every", "3min", ("steps", "seconds")).amount == 180
    with pytest.raises(UserError, match=r"^checkpoint\.every=3epochs: must be a length such as 500steps, 90s or 3min$"):
        parse_span("checkpoint.every", "3epochs", ("steps", "seconds"))
    with pytest.raises(UserError, match=r" or 3min\. Did you mean 3steps\?$"):
        parse_span("checkpoint.every", "3stepps", ("steps", "seconds"))
    with pytest.raises(UserError, match=r" or 3min$"):
        parse_span("checkpoint.every", "3epohcs", ("steps", "seconds"))
