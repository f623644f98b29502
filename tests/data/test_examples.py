"""Rows become examples: the format recognised, exactly what is to be learned, long ones cut and counted, bad ones named."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer

from gpt.data.encoded import IGNORE_LABEL, Encoded
from gpt.data.examples import ExampleEncoder, ExampleSettings, collect_classes, recognise_format
from gpt.data.sources import Row
from gpt.data.tokenizer import Tokenizer, load_tokenizer
from gpt.data.tokenizer_training import train_bpe
from gpt.errors import UserError

PROMPT, COMPLETION = "def add(a, b):\n    return", " a + b  # é🙂\n"


@pytest.fixture(scope="module")
def folder(stdlib_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    train_bpe([p.read_text(encoding="utf-8")[:20_000] for p in stdlib_files[:8]], 512).save(made / "tokenizer.json")
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def with_begin(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that puts a token of its own before every text, as Llama's does, and ends texts with another than <|endoftext|>."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    backend = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<|begin|>", "<|end|>"])
    single = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", backend.token_to_id("<|begin|>"))])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), single])
    made = tmp_path_factory.mktemp("with_begin")
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>").save_pretrained(made)
    return made


def row(number: int = 1, /, **values: Any) -> Row:
    return Row(f"rows.jsonl:{number}", f"/x/rows.jsonl, line {number}", values)


def encode(folder: Path, *rows: Row, format: str = "", classes: tuple[str, ...] = (), **settings: Any) -> list[Encoded]:
    settings = {"context_length": 256} | settings
    found = format or recognise_format(rows, "auto")
    return ExampleEncoder(str(folder), ExampleSettings(**settings), found, list(classes))(rows)


def learned(example: Encoded) -> np.ndarray:
    """(N,) bool, of an example for language modelling."""
    assert example.labels is not None
    found = example.labels != IGNORE_LABEL
    assert example.ids.dtype == np.uint32
    assert example.labels.dtype == np.int32
    assert (example.labels[found] == example.ids[found]).all()
    return found


def counts(examples: list[Encoded]) -> dict[str, int]:
    total: dict[str, int] = {}
    for example in examples:
        total |= {name: total.get(name, 0) + n for name, n in example.counts.items()}
    return total


class TestFormats:
    @pytest.mark.parametrize(
        ("values", "format"),
        [
            ({"text": "x"}, "text"),
            ({"text": "x", "label": None}, "text"),
            ({"text": "x", "label": 0}, "text_label"),
            ({"tokens": ["x"], "tags": ["y"]}, "tokens_tags"),
            ({"tokens": ["x"], "tags": ["y"], "text": "x"}, "tokens_tags"),
            ({"prompt": "", "completion": "y"}, "prompt_completion"),
            ({"messages": [], "prompt": "x"}, "messages"),
        ],
    )
    def test_is_recognised_by_the_fields(self, values, format):
        assert recognise_format([row(**values), row(2, **values)], "auto") == format

    @pytest.mark.parametrize(
        ("rows", "forced", "said"),
        [
            ([row(label=1)], "auto", r"1: a row with label fits no format; there are: prompt_completion \(prompt and completion\).*"),
            ([row()], "auto", r"1: a row with none of the known fields fits no format; .*data.fields.*"),
            ([row(prompt="x", completion="y", messages=[])], "auto", r"1: a row .* fits prompt_completion and messages; say which with .*"),
            ([row(text="x"), row(7, text="x", label=1)], "auto", r"7: a row of text_label \(text, label\) among rows of text; .*"),
            ([row(text="x"), row(7, text=None)], "auto", r"7: rows of text need text, and this one has text \(null\); .*"),
            ([row(prompt="x")], "prompt_completion", r"1: rows of prompt_completion need .*, and this one has prompt; .*"),
        ],
    )  # fmt: skip
    def test_none_or_several_are_one_sentence(self, rows, forced, said):
        with pytest.raises(UserError, match=f"^/x/rows.jsonl, line {said}$"):
            recognise_format(rows, forced)

    def test_of_no_rows_none_is_recognised(self):
        assert recognise_format([], "text") == "text"
        with pytest.raises(UserError, match=r"^data: there are no rows "):
            recognise_format([], "auto")

    def test_a_forced_one_may_have_other_fields_too(self, folder):
        both = row(text="x y", label=1, prompt="x", completion=" y")
        for format in ("text", "prompt_completion", "text_label"):
            assert recognise_format([both], format) == format
            (example,) = ExampleEncoder(str(folder), ExampleSettings(format=format), format, ["a", "b"])([both])
            assert example.labels is not None
            assert (example.labels == 1).any() == (format == "text_label")

    def test_a_later_row_of_another_is_named(self, folder):
        rows = [row(text="x"), row(8, prompt="x", completion="y")]
        with pytest.raises(
            UserError, match=r"^/x/rows.jsonl, line 8: a row of prompt_completion \(prompt, completion\) among rows of text; .* own$"
        ):
            encode(folder, *rows, format="text")
        with pytest.raises(
            UserError, match=r"^/x/rows.jsonl, line 9: a row of text_label \(text, label\) among rows of text; .*data.format=text$"
        ):
            encode(folder, rows[0], row(9, text="x", label=1), format="text")


class TestWhatIsLearned:
    def test_the_completion_and_its_end(self, folder, tokenizer):
        (example,) = encode(folder, row(prompt=PROMPT, completion=COMPLETION))
        mask = learned(example)
        assert example.ids.tolist() == [*tokenizer.encode(PROMPT + COMPLETION), tokenizer.end_of_text]
        assert tokenizer.decode(example.ids[mask]) == COMPLETION + "<|endoftext|>"
        assert example.bytes == len(COMPLETION.encode())
        assert (example.name, example.held_out_key, example.counts) == ("rows.jsonl:1", "rows.jsonl:1", {})

    def test_a_token_over_the_border_is_learned_and_the_same_as_in_the_whole_text(self, folder, tokenizer):
        whole = tokenizer.encode("x self.x")
        assert whole != tokenizer.encode("x sel") + tokenizer.encode("f.x")
        (example,) = encode(folder, row(prompt="x sel", completion="f.x"))
        assert example.ids.tolist()[:-1] == whole
        assert tokenizer.decode(example.ids[learned(example)]) == " self.x<|endoftext|>"

    @pytest.mark.parametrize("text", ["a b", "é🙂", "x <|endoftext|> y"])
    def test_of_a_text_everything_but_the_first_token(self, folder, tokenizer, text):
        (example,) = encode(folder, row(text=text))
        assert learned(example).tolist() == [False] + [True] * (len(example.ids) - 1)
        assert example.ids.tolist() == [*tokenizer.encode(text), tokenizer.end_of_text]
        assert example.bytes == len(text.encode()) - len(tokenizer.pieces([example.ids[0]])[0])
        (same,) = encode(folder, row(prompt=text[:1], completion=text[1:]), loss_on="all")
        assert same.ids.tolist() == example.ids.tolist()
        assert learned(same).tolist() == learned(example).tolist()

    def test_behind_what_the_tokenizer_puts_before_a_text_and_with_its_own_end(self, with_begin):
        tokenizer = load_tokenizer(with_begin)
        begin, end = (tokenizer.backend.token_to_id(token) for token in ("<|begin|>", "<|end|>"))
        rows = (row(text="a b"), row(prompt="a", completion=" b"), row(prompt="", completion="a b"), row(text="a b", label="no"))
        texts = [encode(with_begin, r, classes=("no", "yes"))[0] for r in rows]
        words = tokenizer.encode("a b")
        assert [e.ids.tolist() for e in texts] == [[begin, *words, end]] * 3 + [[begin, *words]]
        assert [learned(e).tolist() for e in texts[:3]] == [
            [False, True, True, True],
            [False, False, True, True],
            [False, True, True, True],
        ]

    def test_sentencepiece(self, sentencepiece_tokenizer, tmp_path):
        sentencepiece_tokenizer.save(tmp_path / "tokenizer.json")
        (example,) = encode(tmp_path, row(prompt="b", completion="aé ba"))
        pieces = [sentencepiece_tokenizer.backend.id_to_token(i) for i in example.ids.tolist()]
        assert pieces == ["▁ba", "<0xC3>", "<0xA9>", "▁ba", "</s>"]
        assert learned(example).tolist() == [False, True, True, True, True]  # the first holds a learned "a", and nothing stands before it

    def test_loss_on_what_a_format_does_not_have(self, folder):
        for format, loss_on, there in (
            ("prompt_completion", "assistant", "auto, completion, all"), ("messages", "completion", "auto, assistant, all"),
            ("text", "completion", "auto, all"), ("text_label", "assistant", "auto, all"), ("tokens_tags", "assistant", "auto"),
        ):  # fmt: skip
            with pytest.raises(UserError, match=f"^loss_on={loss_on} is not for rows of {format}; there are: {there}$"):
                ExampleEncoder(str(folder), ExampleSettings(loss_on=loss_on), format, [])

    @pytest.mark.parametrize(
        "values",
        [
            {"prompt": "x", "completion": ""}, {"prompt": "x", "completion": " \n"}, {"text": ""}, {"text": "\t"},
            {"messages": [{"role": "user", "content": "x"}]},
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]},
            {"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": ""}]},
            {"text": "", "label": "no"}, {"tokens": [], "tags": []},
        ],
    )  # fmt: skip
    def test_nothing_to_learn_from_is_dropped_and_counted(self, folder, values):
        (example,) = encode(folder, row(**values), classes=("no", "yes"))
        assert example.counts == {"dropped_no_target": 1}
        assert not len(example.ids)
        assert example.name == "rows.jsonl:1"

    def test_of_everything_an_empty_completion_leaves_the_prompt(self, folder):
        (example,) = encode(folder, row(prompt="a b c", completion=""), loss_on="all")
        assert learned(example).sum() == len(example.ids) - 1 > 0


class TestTooLong:
    SHORT = row(prompt="a", completion=" b")

    def test_the_end_is_cut(self, folder, tokenizer):
        whole, short = encode(folder, row(prompt=PROMPT, completion=COMPLETION), self.SHORT)
        length = len(whole.ids) - 3
        cut, same = encode(folder, row(prompt=PROMPT, completion=COMPLETION), self.SHORT, context_length=length)
        assert cut.ids.tolist() == whole.ids[:length].tolist()
        assert learned(cut).tolist() == learned(whole)[:length].tolist()
        assert cut.bytes == sum(map(len, tokenizer.pieces(cut.ids[learned(cut)])))
        assert (cut.counts, same.counts) == ({"truncated": 1}, {})
        assert same.ids.tolist() == short.ids.tolist()

    def test_a_target_that_would_be_cut_off_whole_stays_and_the_prompt_is_cut_from_its_start(self, folder, tokenizer):
        (whole,) = encode(folder, row(prompt=PROMPT * 5, completion=COMPLETION), context_length=1000)
        length = 2 * int(learned(whole).sum())
        (cut,) = encode(folder, row(prompt=PROMPT * 5, completion=COMPLETION), context_length=length)
        assert cut.ids.tolist() == whole.ids[-length:].tolist()
        assert learned(cut).tolist() == learned(whole)[-length:].tolist()
        assert cut.counts == {"truncated": 1}

    def test_of_a_target_longer_than_the_context_its_beginning_stays(self, folder, tokenizer):
        long = row(prompt=PROMPT * 5, completion=COMPLETION * 5)
        (whole,), (cut,) = encode(folder, long, context_length=1000), encode(folder, long, context_length=10)
        assert len(cut.ids) == 10
        assert learned(cut).tolist() == [False] + [True] * 9  # one token of the prompt, from which the first is told
        assert cut.ids[1:].tolist() == whole.ids[learned(whole)][:9].tolist()

    def test_of_a_long_conversation_the_first_answer_stays(self, folder, tokenizer):
        said = [("user", "x " * 60), ("assistant", "yes"), ("user", "why? " * 50), ("assistant", "no")]
        messages = [{"role": role, "content": content} for role, content in said]
        (cut,) = encode(folder, row(messages=messages), context_length=40)
        assert len(cut.ids) == 40
        assert tokenizer.decode(cut.ids[learned(cut)]) == "yes<|endoftext|>\n"
        assert tokenizer.decode(cut.ids).endswith("x \n<|assistant|>\nyes<|endoftext|>\n")

    def test_whatever_the_length_it_holds_and_the_target_is_not_lost(self, folder, with_begin):
        for where in (folder, with_begin):
            (whole,) = encode(where, row(prompt=PROMPT, completion=COMPLETION))
            for length in range(1, len(whole.ids) + 2):
                (cut,) = encode(where, row(prompt=PROMPT, completion=COMPLETION), context_length=length)
                assert len(cut.ids) <= length
                assert learned(cut).any() == (length > 1)  # one to learn, and one before it
                assert cut.counts == ({"dropped_no_target": 1} if length == 1 else {"truncated": 1} if length < len(whole.ids) else {})

    def test_or_they_are_dropped_and_counted(self, folder):
        found = encode(folder, row(prompt=PROMPT, completion=COMPLETION), self.SHORT, context_length=10, too_long="drop")
        assert [len(e.ids) > 0 for e in found] == [False, True]
        assert counts(found) == {"dropped_too_long": 1}

    def test_of_a_conversation_whose_first_token_alone_is_learned_in_time_a_later_answer_stays(self, folder, tmp_path):
        (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
        messages = [
            {"role": role, "content": content} for role, content in (("assistant", "x"), ("user", "\ny" * 20), ("assistant", "\nx"))
        ]
        (cut,) = encode(tmp_path, row(messages=messages), context_length=10)
        assert load_tokenizer(tmp_path).decode(cut.ids[learned(cut)]) == "\nx"

    @pytest.mark.parametrize("length", [2, 3, 10, 41, 500])
    def test_a_split_text_has_every_token_learned_once(self, folder, with_begin, length):
        text = PROMPT + COMPLETION + PROMPT
        for where in (folder, with_begin):
            pieces = encode(where, row(text=text), context_length=length, too_long="split")
            (whole,) = encode(where, row(text=text), context_length=500)
            assert all(0 < len(p.ids) <= length for p in pieces)
            assert np.concatenate([p.ids[learned(p)] for p in pieces]).tolist() == whole.ids[learned(whole)].tolist()
            assert sum(p.bytes for p in pieces) == whole.bytes
            assert counts(pieces) == ({"split": 1} if len(whole.ids) > length else {})
            assert {p.held_out_key for p in pieces} == {"rows.jsonl:1"}

    def test_what_answers_something_is_not_split(self, folder):
        for format in ("prompt_completion", "messages", "text_label", "tokens_tags"):
            with pytest.raises(UserError, match=f"^data.too_long=split is for rows of text; rows of {format} .* set truncate or drop$"):
                ExampleEncoder(str(folder), ExampleSettings(too_long="split"), format, [])


class TestLabels:
    def test_a_texts_class_stands_on_its_last_token(self, folder, tokenizer):
        whole, cut = (encode(folder, row(text=PROMPT, label="yes"), classes=("no", "yes"), context_length=n)[0] for n in (100, 5))
        assert whole.ids.tolist() == tokenizer.encode(PROMPT)
        assert whole.labels is not None
        assert cut.labels is not None
        assert whole.labels.tolist() == [IGNORE_LABEL] * (len(whole.ids) - 1) + [1]
        assert cut.labels.tolist() == [IGNORE_LABEL] * 4 + [1]
        assert cut.counts == {"truncated": 1}
        (dropped,) = encode(folder, row(text=PROMPT, label="yes"), classes=("no", "yes"), context_length=5, too_long="drop")
        assert dropped.counts == {"dropped_too_long": 1}

    @pytest.mark.parametrize(
        ("labels", "classes"),
        [(["b", "a", "b"], ["a", "b"]), ([10, 9, -1], ["-1", "9", "10"]), (["10", "9"], ["9", "10"]), ([True, False], ["false", "true"]),
         ([1, "x", 2.5, None, ""], ["1", "x"])],
    )  # fmt: skip
    def test_classes_are_those_that_occur(self, labels, classes):
        assert collect_classes([row(text="x", label=label) for label in labels], "text_label", []) == classes
        assert collect_classes([row(tokens=[], tags=labels), row(tokens=[], tags="no")], "tokens_tags", []) == classes

    def test_classes_that_are_given_stay_in_order_and_one_is_none(self):
        assert collect_classes([], "text_label", ["b", "a"]) == ["b", "a"]
        assert collect_classes([row(text="x")], "text", []) == []
        with pytest.raises(UserError, match=r"^data.labels: all rows have the same class, x; "):
            collect_classes([row(text="x", label="x")], "text_label", [])
        with pytest.raises(UserError, match=r"^data.labels: no row has a class; "):
            collect_classes([], "tokens_tags", [])
        with pytest.raises(UserError, match=r"^data.labels: \[x\] is one class; "):
            collect_classes([], "text_label", ["x"])

    @pytest.mark.parametrize(
        ("classes", "label", "number"),
        [
            (("no", "yes"), "yes", 1), (("no", "yes"), 1, 1), (("-1", "9"), 9, 1), (("-1", "9"), "-1", 0), (("false", "true"), True, 1),
            (("a", "1"), 1, 1),
        ],
    )  # fmt: skip
    def test_a_label_is_a_name_or_a_number(self, folder, classes, label, number):
        (example,) = encode(folder, row(text="x", label=label), classes=classes)
        assert example.labels is not None
        assert example.labels[-1] == number

    @pytest.mark.parametrize(
        ("classes", "label", "said"),
        [
            (("no", "yes"), 2, "label=2 is out of range; there are 0 to 1, which are no, yes"),
            (("no", "yes"), -1, "label=-1 is out of range; .*"),
            (("no", "yes"), "yse", r"label=yse is none of the classes. Did you mean yes\? There are: no, yes"),
            (("1", "2"), 0, r"label=0 is none of the classes. There are: 1, 2"),
            (("no", "yes"), True, "label=true is none of the classes.*"),
            (("no", "yes"), 1.0, "label must be the name or the number of a class, not 1"),
            (("no", "yes"), ["no"], r"label must be the name or the number of a class, not \[no\]"),
            (tuple(f"c{n}" for n in range(30)), "x", r"label=x is none .*c19 and 10 more"),
        ],
    )
    def test_one_that_is_no_class_is_named_with_those_there_are(self, folder, classes, label, said):
        with pytest.raises(UserError, match=f"^/x/rows.jsonl, line 1: {said}$"):
            encode(folder, row(text="x", label=label), classes=classes)

    def test_tags_stand_on_the_first_piece_of_each_word(self, folder, tokenizer):
        words, tags = ["def", "itertools_é🙂", "(", "New York", " ", "x"], ["k", "n", "o", "n", "s", "n"]
        (example,) = encode(folder, row(tokens=words, tags=tags), classes=("k", "n", "o", "s"))
        assert example.ids.tolist() == tokenizer.encode(" ".join(words))
        assert example.labels is not None
        _, offsets = tokenizer.encode_with_offsets(" ".join(words))
        expected = [IGNORE_LABEL] * len(offsets)
        for i, tag in reversed([*enumerate(tags)]):
            begins = sum(len(word) + 1 for word in words[:i])
            expected[next(n for n, (start, end) in enumerate(offsets) if start <= begins < end)] = "knos".index(tag)
        assert example.labels.tolist() == expected
        assert 5 <= len(expected) - expected.count(IGNORE_LABEL) < len(expected) - 5
        (cut,) = encode(folder, row(tokens=words, tags=tags), classes=("k", "n", "o", "s"), context_length=6)
        assert cut.labels is not None
        assert cut.labels.tolist() == expected[:6]
        assert cut.counts == {"truncated": 1}

    def test_of_words_in_one_token_the_first_counts_and_words_without_a_token_have_none(self, tmp_path):
        from tokenizers import models, pre_tokenizers

        for model, pre_tokenizer, words, labels in (
            (models.BPE({"a": 0, "b": 1, "Ġ": 2, "aĠ": 3, "aĠb": 4}, [("a", "Ġ"), ("aĠ", "b")]),
             pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), ["a", "b", "a"], [0, IGNORE_LABEL, 2]),
            (models.WordLevel({"a": 0, "b": 1}, unk_token="a"), pre_tokenizers.WhitespaceSplit(), ["a", " ", "b"], [0, 2]),
            (models.WordLevel({"a": 0, "b": 1}, unk_token="a"), pre_tokenizers.WhitespaceSplit(), ["b", "a", " "], [0, 1]),
        ):  # fmt: skip
            backend = HFTokenizer(model)
            backend.pre_tokenizer = pre_tokenizer
            backend.save(str(tmp_path / "tokenizer.json"))
            (example,) = encode(tmp_path, row(tokens=words, tags=["0", "1", "2"]), classes=("0", "1", "2"))
            assert example.labels is not None
            assert example.labels.tolist() == labels

    @pytest.mark.parametrize(
        ("tokens", "tags", "said"),
        [
            (["a", "b"], ["x"], "2 tokens and 1 tags; each token has one"),
            ("a b", ["x"], "tokens must be a list, not a b"),
            (["a"], {"x": 1}, "tags must be a list, not .*"),
            (["a", ""], ["x", "y"], r"tokens\[1\] must be text with a character in it, not an empty one"),
            (["a", 3], ["x", "y"], r"tokens\[1\] must be text with a character in it, not 3"),
            (["a", "b"], ["x", "z"], r"tags\[1\]=z is none of the classes. There are: x, y"),
        ],
    )
    def test_words_and_tags_that_do_not_go_together(self, folder, tokens, tags, said):
        with pytest.raises(UserError, match=f"^/x/rows.jsonl, line 1: {said}$"):
            encode(folder, row(tokens=tokens, tags=tags), classes=("x", "y"))


class TestBadRows:
    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"text": 3}, "text must be text, not 3"),
            ({"prompt": "x", "completion": {"a": 1}}, r"completion must be text \(or a list of messages, .*\), not .*"),
            ({"prompt": [{"role": "user", "content": "x"}], "completion": "y"}, r"prompt must be text \(or a list of .*"),
            ({"prompt": [], "completion": [{"role": "assistant", "content": "x"}]}, r"prompt must be a list of {role, content} with .*"),
            ({"messages": [{"role": "bot", "content": "x"}]}, r"messages\[0\] has the role bot; there are: .*"),
        ],
    )
    def test_are_one_sentence_with_their_place(self, folder, values, said):
        with pytest.raises(UserError, match=f"^/x/rows.jsonl, line 4: {said}$"):
            encode(folder, row(4, **values), classes=("no", "yes"))

    def test_of_the_first_rows_the_bad_ones_can_be_left_out(self):
        good, bad, other = row(1, text="x"), row(2, text=3), row(3, prompt="x", completion="y")
        with pytest.raises(UserError, match="line 3: a row of prompt_completion"):
            recognise_format([good, bad, other], "auto")
        with pytest.raises(UserError, match="line 3: rows of text need text"):
            recognise_format([good, bad, other], "text")
        assert recognise_format([row(0), good, bad, other], "auto", skip_bad_rows=True) == "text"
        assert recognise_format([row(0), good], "text", skip_bad_rows=True) == "text"
        with pytest.raises(UserError, match="fits no format"):
            recognise_format([row(0), row(1)], "auto", skip_bad_rows=True)

    JSON = st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text()
        | st.sampled_from(["user", "assistant", "x<|endoftext|>", "\ud800"]),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "a"]), inner, max_size=3)
        ),
        max_leaves=8,
    )
    MESSAGE = st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text()},
        optional={"tool_calls": JSON, "name": JSON},
    )
    VALUE = JSON | st.lists(MESSAGE, max_size=4) | st.lists(st.text(min_size=1), max_size=4) | st.text()

    @given(
        st.dictionaries(st.sampled_from(["text", "prompt", "completion", "messages", "label", "tokens", "tags"]), VALUE, max_size=4),
        st.integers(1, 30), st.sampled_from(["truncate", "drop"]),
    )  # fmt: skip
    def test_any_json_is_an_answer_or_a_sentence(self, folder, values, length, too_long):
        said = ""
        try:
            examples = encode(folder, row(**values), classes=("a", "b"), context_length=length, too_long=too_long)
        except UserError as error:
            said = str(error)
        if said:
            assert re.fullmatch(r"/x/rows.jsonl, line 1: [^\n]{10,1000}", said)
            return
        (example,) = examples
        assert example.labels is not None
        assert len(example.labels) == len(example.ids) <= length
        assert (example.labels != IGNORE_LABEL).any() == (len(example.ids) > 0)
        assert example.bytes >= 0


class TestInWorkers:
    def test_it_travels_used_or_not_and_gives_the_same(self, folder):
        encoder = ExampleEncoder(str(folder), ExampleSettings(context_length=64), "prompt_completion", [])
        rows = [row(prompt=PROMPT, completion=COMPLETION)]
        before = pickle.dumps(encoder)
        (here,) = encoder(rows)
        assert len(pickle.dumps(encoder)) == len(before)  # without the tokenizer
        (there,) = pickle.loads(before)(rows)
        assert here.ids.tolist() == there.ids.tolist()

    def test_it_loads_no_torch_and_transformers_only_for_conversations(self, folder):
        code = f"""
import sys
from gpt.data.examples import ExampleEncoder, ExampleSettings
from gpt.data.sources import Row
ExampleEncoder({str(folder)!r}, ExampleSettings(), "text", [])([Row("r", "r", {{"text": "x"}})])
assert not {{"torch", "transformers", "datasets"}} & set(sys.modules)
messages = [{{"role": "assistant", "content": "x"}}]
ExampleEncoder({str(folder)!r}, ExampleSettings(), "messages", [])([Row("r", "r", {{"messages": messages}})])
assert "torch" not in sys.modules
"""
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
