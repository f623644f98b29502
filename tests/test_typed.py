"""Plain values become the types of a schema, or get one line that names the nearest right name."""

import dataclasses
import math
import typing

import pytest
import yaml

from gpt.config import RunConfig
from gpt.data.config import (
    PartConfig,
    TokenizerConfig,
)
from gpt.errors import UserError
from gpt.model.config import GPTConfig
from gpt.typed import from_dict, nearest, nearest_key, schema_keys, shown


def check(hint: object, value: object) -> object:
    """`value` through `from_dict` of a dataclass whose one field has this type."""
    cls = dataclasses.make_dataclass("Section", [("key", hint)])
    return from_dict(cls, {"key": value}, "section.").key


L = typing.Literal["auto", True, False]


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, 3, 3), (int, 1e3, 1000), (int, -2.0, -2), (float, 3, 3.0), (float, 1e-9, 1e-9), (bool, True, True),
        (bool, False, False), (str, "x", "x"), (str, "", ""), (str, 500, "500"), (str, 1.5, "1.5"), (str | None, None, None),
        (str | None, "x", "x"), (int | None, None, None), (int | None, 3, 3), (L, "auto", "auto"), (L, True, True), (L, False, False),
        (typing.Literal["auto"] | int, "auto", "auto"), (typing.Literal["auto"] | int, 4, 4), (list[str], ["a", "b"], ["a", "b"]),
        (list[str], "a", ["a"]), (list[str], [], []), (list[str], [1, "b"], ["1", "b"]), (list[int], [1, 2.0], [1, 2]),
    ],
)  # fmt: skip
def test_values_that_fit(hint, value, expected):
    found = check(hint, value)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("hint", "value", "said"),
    [
        (int, True, "section.key=true: must be a whole number"),
        (int, 2.5, "section.key=2.5: must be a whole number"),
        (int, "3", "section.key='3': must be a whole number"),
        (int, "three", "section.key=three: must be a whole number"),
        (int, None, "section.key=null: must be a whole number"),
        (int, math.inf, "section.key=inf: must be a whole number"),
        (int, math.nan, "section.key=nan: must be a whole number"),
        (int, [3], "section.key=[3]: must be a whole number"),
        (float, True, "section.key=true: must be a number"),
        (float, "0.1", "section.key='0.1': must be a number"),
        (float, math.nan, "section.key=nan: must be a finite number"),
        (float, -math.inf, "section.key=-inf: must be a finite number"),
        (float, None, "section.key=null: must be a number"),
        (bool, 1, "section.key=1: must be true or false"),
        (bool, 0.0, "section.key=0: must be true or false"),
        (bool, "true", "section.key=true: must be true or false"),
        (str, True, "section.key=true: must be text"),
        (str, None, "section.key=null: must be text"),
        (str, ["x"], "section.key=[x]: must be text"),
        (str | None, False, "section.key=false: must be text or null"),
        (int | None, "x", "section.key=x: must be a whole number or null"),
        (L, 1, "section.key=1: must be one of auto, true, false"),
        (L, 0, "section.key=0: must be one of auto, true, false"),
        (L, "atuo", "section.key=atuo: must be one of auto, true, false. Did you mean auto?"),
        (L, None, "section.key=null: must be one of auto, true, false"),
        (typing.Literal["one"], "two", "section.key=two: must be one"),
        (typing.Literal["auto"] | int, "aut", "section.key=aut: must be auto or a whole number. Did you mean auto?"),
        (list[str], None, "section.key=null: must be a list such as [a, b]"),
        (list[str], 3, "section.key=3: must be a list such as [a, b]"),
        (list[str], ["a", None], "section.key[1]=null: must be text"),
        (list[str], ["a", ["b"]], "section.key[1]=[b]: must be text"),
        (list[int], ["a"], "section.key[0]=a: must be a whole number"),
        (list[int], None, "section.key=null: must be a list such as [1, 2]"),
        (list[PartConfig], None, "section.key=null: must be a list of sections, [{source: ...}, ...]"),
        (list[PartConfig], {"source": "text"}, "section.key={source: text}: must be a list of sections, [{source: ...}, ...]"),
        (
            list[PartConfig],
            ["text"],
            "section.key[0]=text: must be a section with keys (source, paths, name, config ...), not a single value",
        ),
        (list[PartConfig], [{}, {"wieght": 2}], "section.key[1].wieght=2: no such key. Did you mean section.key[1].weight?"),
        (
            list[PartConfig],
            [{"fields": {"txt": "x"}}],
            "section.key[0].fields.txt=x: no such key. Did you mean section.key[0].fields.text?",
        ),
        (TokenizerConfig, None, "section.key=null: must be a section with keys (name, vocab_size, path, split ...), not a single value"),
        (TokenizerConfig, "bpe", "section.key=bpe: must be a section with keys (name, vocab_size, path, split ...), not a single value"),
        (TokenizerConfig, {"name": "bep"}, "section.key.name=bep: must be one of bpe, char, byte, pretrained. Did you mean bpe?"),
        (TokenizerConfig, {"vocab": 3}, "section.key.vocab=3: no such key. Did you mean section.key.vocab_size?"),
        (GPTConfig, {"n_layer": 0}, "section.key.n_layer=0 must be at least 1"),
    ],
)
def test_values_that_do_not_fit(hint, value, said):
    with pytest.raises(UserError) as caught:
        check(hint, value)
    assert str(caught.value) == said


def test_an_unknown_key_deep_in_a_file():
    values = yaml.safe_load("train: {budget: 3steps}\nmodel:\n  n_layer: 2\n  n_haed: 2\n")
    with pytest.raises(UserError, match=r"^model\.n_haed=2: no such key\. Did you mean model\.n_head\?$"):
        from_dict(RunConfig, values)
    with pytest.raises(UserError, match=r"^trian=.*no such key\. Did you mean train\?$"):
        from_dict(RunConfig, {"trian": {"budget": "3steps"}})


# The nearest right name


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("n_layer", "model.n_layer"), ("n_hed", "model.n_head"), ("model.n_hed", "model.n_head"), ("modl.n_head", "model.n_head"),
        ("lr", "optimizer.lr"), ("train.lr", "optimizer.lr"), ("train.warmup", "schedule.warmup"), ("warmup", "schedule.warmup"),
        ("model.vocab", "model.vocab_size"), ("tokenizer.vocab", "tokenizer.vocab_size"), ("sed", "seed"), ("trian", "train"),
        ("optimiser.lr", "optimizer.lr"), ("train.batch_token", "train.batch_tokens"), ("run.dirr", "run.dir"), ("paths", "data.paths"),
        ("data.field.text", "data.fields.text"), ("data.text", "data.fields.text"), ("fields.text", "data.fields.text"),
        ("data.part", "data.parts"), ("data.nme", "data.name"), ("name", None),
        ("cluster.size", None), ("beams", None), ("temperature", "distill.temperature"), ("", None), ("🤖", None),
    ],
)  # fmt: skip
def test_the_nearest_key(typed, meant):
    assert nearest_key(typed, schema_keys(RunConfig)) == (f". Did you mean {meant}?" if meant else "")


def test_the_nearest_name():
    assert nearest("gpt3", ["nano", "gpt2", "gpt2-xl"]) == ". Did you mean gpt2?"
    assert nearest("gpu", ["auto", "cpu", "cuda"]) == ". Did you mean cuda?"
    assert nearest("book.tx", ["aaa.txt", "book.txt"]) == ". Did you mean book.txt?"  # the ending alone is no likeness
    assert nearest("zzz", ["nano", "gpt2"]) == ""
    assert nearest("gpt3", iter(["gpt2"])) == ". Did you mean gpt2?"


def test_values_are_shown_as_they_are_typed():
    values = [None, True, False, 1, 1.0, 1e-5, "a b", ["a", None, [1.5]], {"a": 1}]
    assert [shown(v) for v in values] == ["null", "true", "false", "1", "1", "1e-05", "a b", "[a, null, [1.5]]", "{a: 1}"]
    assert len(shown("x" * 10_000)) < 300
