"""Answers to held-out prompts: in batches as one by one, what of the rows is asked, and the command's figures."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gpt.compose import compose_use
from gpt.data.config import DataConfig, FieldNames, PartConfig
from gpt.data.sources import ReadReport, Row, open_source
from gpt.data.survey import name_hash, survey, texts_of
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_training import byte_tokenizer
from gpt.errors import UserError
from gpt.evaluation import questions as questions_module
from gpt.evaluation.answers import MOST_TOKENS, Answers, Writing, answer_tokens, measure_answers, write_answers
from gpt.evaluation.command import evaluate
from gpt.evaluation.questions import Question, read_questions
from gpt.inference.generate import generate_text, whole_texts
from gpt.inference.sampling import Sampling
from tests.evaluation.conftest import make_model
from tests.training.finetuning import CHATS, SUMS, save_small_model, write_rows

PROMPTS = ["one ", "a", "twelve plus", "the quick brown fox ", "", "zz", "one more", "größer als "]


def question(prompt: str, reference: str = "words", test: str = "") -> Question:
    return Question(prompt, None, [reference], test, "rows.jsonl, line 1")


def data_of(path: Path, **settings: Any) -> DataConfig:
    return DataConfig(source="jsonl", paths=[str(path)], **settings)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batches_write_what_each_prompt_would_get_alone(shape, temperature):
    model, tokenizer, done = make_model(shape, context_length=64), byte_tokenizer(), []
    questions = [question(prompt) for prompt in PROMPTS]
    sampling = Sampling(temperature=temperature, seed=5)
    alone = [whole_texts(generate_text(model, tokenizer, [prompt], 10, sampling), 1)[0] for prompt in PROMPTS]
    for batch in (1, 3, 8, 100):
        answers = write_answers(model, tokenizer, questions, frozenset(), Writing(64, 10, batch, temperature, 5), done.append)
        assert answers is not None
        assert answers.texts == alone
        assert (answers.max_tokens, answers.cut) == (10, 0)
    assert sum(done) == 4 * len(PROMPTS)
    assert len(set(alone)) > 4


def test_an_answer_ends_at_an_end_id_and_before_a_stop_text():
    model, tokenizer = make_model("qwen3", context_length=64), byte_tokenizer()
    whole = write_answers(model, tokenizer, [question("abc")], frozenset(), Writing(64, 12)).texts[0]
    last = next(c for c in whole[1:] if c != whole[0])
    cut = whole[: whole.index(last)]
    assert write_answers(model, tokenizer, [question("abc")], frozenset(tokenizer.encode(last)), Writing(64, 12)).texts[0] == cut
    assert write_answers(model, tokenizer, [question("abc")], frozenset(), Writing(64, 12, stop=(last,))).texts[0] == cut


def test_prompts_too_long_lose_their_beginning():
    model, tokenizer = make_model("gpt2", context_length=24), byte_tokenizer()
    questions = [question("x" * 30 + "tail of it"), question("tail of it")]
    answers = write_answers(model, tokenizer, questions, frozenset(), Writing(24, 14))
    assert (answers.max_tokens, answers.cut) == (12, 1)  # half the context
    kept, less = write_answers(model, tokenizer, [question("xxtail of it"), question("xtail of it")], frozenset(), Writing(24, 12)).texts
    assert answers.texts[0] == kept != less
    with pytest.raises(UserError, match="context_length=1"):
        write_answers(model, tokenizer, questions, frozenset(), Writing(1))


def test_writing_can_be_stopped():
    model, done = make_model("qwen3"), []
    questions = [question("ab")] * 5
    assert write_answers(model, byte_tokenizer(), questions, frozenset(), Writing(24, 2, 2), done.append, lambda: sum(done) >= 4) is None
    assert done == [2, 2]


def test_how_long_an_answer_may_be():
    tokenizer = byte_tokenizer()
    assert answer_tokens(tokenizer, [question("a", "x" * 20), question("a", "x")], Writing(1024)) == 40
    assert answer_tokens(tokenizer, [question("a", "x")], Writing(1024)) == 8
    assert answer_tokens(tokenizer, [question("a", "x" * 500)], Writing(1024)) == MOST_TOKENS
    assert answer_tokens(tokenizer, [question("a", "x" * 500)], Writing(100)) == 50
    assert answer_tokens(tokenizer, [question("a", "x" * 500)], Writing(1024, 7)) == 7


# What is asked


def test_what_of_rows_is_asked(tmp_path):
    rows = [
        {"prompt": "p ", "completion": " c", "answers": ["d", " "], "test": ["x = 1", "assert x"]},
        {"prompt": "p", "completion": "c", "answers": {"text": ["e", "f"], "answer_start": [0, 1]}, "test": "pass"},
        {"prompt": "p", "completion": "  "},
        {"prompt": [{"role": "user", "content": "u"}], "completion": [{"role": "assistant", "content": "a"}]},
    ]
    found = read_questions(data_of(write_rows(tmp_path / "rows.jsonl", rows)), byte_tokenizer(), held_out=False)
    first, second, chat = found.questions
    assert (first.prompt, first.ids, first.references, first.test) == ("p ", None, [" c", "d"], "x = 1\nassert x")
    assert (second.references, second.test) == (["c", "e", "f"], "pass")
    assert (chat.prompt, chat.references) == ("<|user|>\nu\n<|assistant|>\n", ["a"])
    assert chat.ids == byte_tokenizer().encode(chat.prompt)
    assert found.left_out == Counter(no_answer=1)


def test_the_last_thing_an_assistant_says_is_asked(tmp_path):
    turns = [("system", "s"), ("user", "u"), ("assistant", "first"), ("user", "v"), ("assistant", "last"), ("user", "bye")]
    rows = [
        {"messages": [{"role": role, "content": content} for role, content in turns]},
        {"messages": [{"role": "user", "content": "alone"}]},
        {"messages": [{"role": "assistant", "content": "nobody asked"}]},
    ]
    found = read_questions(data_of(write_rows(tmp_path / "rows.jsonl", rows)), byte_tokenizer(), held_out=False)
    assert [q.references for q in found.questions] == [["last"]]
    assert found.questions[0].prompt.endswith("<|assistant|>\nfirst<|endoftext|>\n<|user|>\nv\n<|assistant|>\n")
    assert byte_tokenizer().end_of_text in (found.questions[0].ids or [])  # the template's mark is a token, not characters
    assert found.end_ids == {byte_tokenizer().end_of_text}
    assert found.left_out == Counter(no_answer=1, no_prompt=1)


def test_an_answer_ends_where_the_template_ends_a_turn(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer = Tokenizer(tokenizer.backend)
    tokenizer.backend.add_special_tokens(["<|im_end|>"])
    tokenizer = Tokenizer(tokenizer.backend)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    found = read_questions(data_of(write_rows(tmp_path / "rows.jsonl", CHATS)), tokenizer, held_out=False, limit=3)
    assert found.end_ids == {tokenizer.backend.token_to_id("<|im_end|>")}


def test_what_is_held_out_is_what_a_run_holds_out(tmp_path):
    data = data_of(write_rows(tmp_path / "rows.jsonl", SUMS), holdout=0.3)
    source = open_source(data, "raise")
    hold_out = survey(source, 0.3, 0, examples=True).hold_out
    held = [row for row in source.rows(ReadReport()) if hold_out(row.name)]
    expected = [row.values["prompt"] for row in held]
    drawn = [row.values["prompt"] for row in sorted(held, key=lambda row: name_hash(row.name))]
    assert [q.prompt for q in read_questions(data, byte_tokenizer(), held_out=True).questions] == expected
    assert [q.prompt for q in read_questions(data, byte_tokenizer(), held_out=True, limit=7).questions] == drawn[:7] != expected[:7]
    assert len(read_questions(data, byte_tokenizer(), held_out=False).questions) == len(SUMS)


def test_sources_of_a_mixture_get_equal_shares(tmp_path):
    small, large = write_rows(tmp_path / "a.jsonl", SUMS[:3]), write_rows(tmp_path / "b.jsonl", CHATS)
    parts = [PartConfig(source="jsonl", paths=[str(path)]) for path in (small, large)]
    found = read_questions(DataConfig(source="mixture", parts=parts), byte_tokenizer(), held_out=False, limit=10)
    assert Counter(q.ids is None for q in found.questions) == {True: 3, False: 7}


def test_rows_are_filtered_as_for_training(tmp_path):
    rows = [{"prompt": "who is me@example.org?", "completion": "you@example.org"}, *SUMS[:2], SUMS[0], {"prompt": 3, "completion": "x"}]
    data = data_of(write_rows(tmp_path / "rows.jsonl", rows), redact=["email"], deduplicate="exact", on_error="skip")
    found = read_questions(data, byte_tokenizer(), held_out=False)
    assert [q.prompt for q in found.questions] == ["who is [EMAIL]?", SUMS[0]["prompt"], SUMS[1]["prompt"]]
    assert found.questions[0].references == ["[EMAIL]"]
    assert found.report.skipped_rows == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "no prompt"}, "metrics: rows of text have no prompts to answer"),
        ({"text": "a", "label": "b"}, "metrics: rows of text_label have no prompts to answer"),
        ({"prompt": "a", "completion": " "}, r"metrics: there are no prompts to answer in the data \(no_answer: 1\)"),
        ({"prompt": ["a"], "completion": "b"}, "rows.jsonl, line 1: prompt must be text"),
        ({"prompt": "a", "completion": 3}, "rows.jsonl, line 1: completion must be text"),
        ({"prompt": "a", "completion": "b", "answers": [3]}, r"line 1: answers must be a list of texts, or \{text: \[...\]\}, not \[3\]"),
        ({"prompt": "a", "completion": "b", "test": {}}, "line 1: test must be Python code"),
    ],
)
def test_rows_that_ask_nothing(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        read_questions(data_of(write_rows(tmp_path / "rows.jsonl", [row])), byte_tokenizer(), held_out=False)


# The command


@pytest.fixture
def figures(tmp_path):
    """Runs `gpt evaluate` on rows and returns its figures."""
    init = save_small_model(tmp_path / "init")

    def run(rows: list[dict[str, Any]], *arguments: str) -> dict[str, Any]:
        output, path = tmp_path / "figures.json", write_rows(tmp_path / "rows.jsonl", rows)
        data = [f"model={init}", "data=jsonl", f"data.paths=[{path}]", "precision=fp32", "device=cpu", f"output={output}"]
        assert evaluate(compose_use("evaluate", [*data, *arguments])) == 0
        return json.loads(output.read_text())

    return run


def answered(figures, **settings: Any) -> list[dict[str, str]]:
    """Rows whose completion is what the model answers, so that all figures are perfect."""
    found = figures([{**row, "completion": "longer text"} for row in SUMS[:10]], "metrics=[exact_match]", "answer_tokens=12")
    return [{"prompt": made["prompt"], "completion": made["answer"], **settings} for made in found["answers"]["examples"]]


def test_figures_of_a_perfect_model(figures, capsys):
    pytest.importorskip("sacrebleu")
    rows = answered(figures)
    found = figures(rows, "metrics=[exact_match,token_f1,chrf]", "answer_tokens=12")
    assert found["metrics"].keys() == {"exact_match", "token_f1", "chrf"}
    assert (found["metrics"]["exact_match"], found["metrics"]["chrf"]) == (100, 100)
    assert found["metrics_errors"]["exact_match"] == 0
    assert found["loss"] > 0
    assert (found["answers"]["count"], found["answers"]["max_tokens"], found["answers"]["cut_prompts"]) == (10, 12, 0)
    assert found["answers"]["examples"][0]["references"] == [rows[0]["completion"]]
    assert "exact match    100.00 ± 0.00 of 100" in capsys.readouterr().out
    wrong = figures([{**row, "completion": "longer text"} for row in rows], "metrics=[exact_match,chrf]", "limit=4", "part=held_out")
    assert wrong["metrics"]["exact_match"] == 0
    assert wrong["metrics"]["chrf"] < 50
    assert wrong["answers"]["count"] <= 4


def test_several_references_the_best_counts(figures):
    rows = [{**row, "completion": "longer text", "right": [row["completion"]]} for row in answered(figures)]
    assert figures(rows, "metrics=exact_match", "answer_tokens=12", "data.fields.answers=right")["metrics"] == {"exact_match": 100}


def test_what_a_sample_is(figures):
    def texts(*arguments: str) -> list[str]:
        found = figures(SUMS[:6], "metrics=[exact_match]", *arguments)
        return [made["answer"] for made in found["answers"]["examples"]]

    greedy, sampled = texts(), texts("temperature=2", "seed=3")
    assert greedy == texts("batch=1")
    assert sampled == texts("temperature=2", "seed=3", "batch=1") != greedy
    assert sampled != texts("temperature=2", "seed=4")


def test_chats_and_int8(figures):
    pytest.importorskip("torchao")
    found = figures(CHATS, "metrics=[exact_match]", "quantize=int8", "limit=6")
    assert found["answers"]["examples"][0]["prompt"].endswith("<|assistant|>\n")
    assert found["int8"]["answers"]["count"] == found["answers"]["count"] == 6


def test_prompts_that_were_cut_and_rows_left_out_are_said(figures, capsys):
    rows = [*SUMS[:3], {"prompt": "x" * 60, "completion": "yes"}, {"prompt": "p", "completion": ""}]
    found = figures(rows, "metrics=[exact_match]")
    out, err = capsys.readouterr()
    assert (found["answers"]["cut_prompts"], found["answers"]["left_out"]) == (1, {"no_answer": 1})
    assert "no answer: 1" in out
    assert "1 prompts were cut at their beginning" in err


def test_code_is_run_only_if_allowed(figures, tmp_path):
    marker = tmp_path / "it ran"
    rows = [{"prompt": "# ", "completion": "x", "test": f"open({str(marker)!r}, 'w').close()"}]
    with pytest.raises(UserError, match=r"metrics=\[pass\] runs Python code that the model wrote.*allow_execution=true"):
        figures(rows, "metrics=[pass]")
    assert not marker.exists()
    found = figures([*rows, {**rows[0], "test": "assert False, 'wrong'"}], "metrics=[pass]", "allow_execution=true", "answer_tokens=1")
    assert found["metrics"] == {"pass": 50}
    assert [made["metrics"]["pass"] for made in found["answers"]["examples"]] == [100, 0]
    assert [made["problem"] for made in found["answers"]["examples"]] == ["", "AssertionError: wrong"]
    assert marker.exists()
    with pytest.raises(UserError, match=r"rows.jsonl, line 1: metrics=\[pass\] needs the row's test"):
        figures(SUMS, "metrics=[pass]", "allow_execution=true")


def test_of_a_chat_the_blocks_of_code_are_run():
    code = "Sure:\n```python\ndef one():\n    return 1\n```\nand\n```\ntwo = 2\n```\nDone."
    chat = Question("asked", [1], ["x"], "assert one() + two == 3", "here")
    measured = measure_answers(["pass"], [chat, chat], Answers([code, "def one(): return 1\ntwo = 2"], 9, 0))
    assert measured.scores.figures == {"pass": 100}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["metrics=[exac_match]"], "Did you mean exact_match?"),
        (["metrics=[qa]"], r"metrics\[0\]=qa: must be one of exact_match, token_f1, rouge, chrf, bleu, pass"),
        (["metrics=[rouge]", "tasks=[a]"], "tasks have metrics of their own"),
        (["metrics=[rouge]", "examples=false"], r"metrics=\[rouge\]: are of answers .* these are read as text"),
        (["answer_tokens=3"], "answer_tokens=3 is of metrics; name some"),
        (["temperature=1"], "temperature=1 is of metrics"),
        (["allow_execution=true"], "allow_execution=true is of metrics"),
        (["metrics=[rouge]", "temperature=-1"], "temperature=-1 must be at least 0"),
        (["metrics=[rouge]", "execution_seconds=0"], "execution_seconds=0 must be greater than 0"),
        (["limit=3"], "limit=3 is of tasks"),
    ],
)
def test_settings_that_cannot_be(tmp_path, arguments, message):
    path = [] if "tasks=[a]" in arguments else [f"data.paths=[{write_rows(tmp_path / 'rows.jsonl', SUMS)}]", "data=jsonl"]
    with pytest.raises(UserError, match=message):
        compose_use("evaluate", ["model=x", *path, *arguments])


def test_text_asks_nothing():
    with pytest.raises(UserError, match="data=stdlib is text; name data with prompts and answers"):
        compose_use("evaluate", ["model=x", "data=stdlib", "metrics=[rouge]"])


def test_fields_for_metrics_are_not_learned():
    assert (FieldNames().answers, FieldNames().test) == ("answers", "test")
    assert texts_of(Row("a", "b", {"prompt": "p", "completion": "c", "answers": ["d"], "test": "t"})) == "p\nc"


def test_a_few_prompts_of_a_large_source_do_not_take_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(questions_module, "_DRAWN_FROM", 50)
    monkeypatch.setattr("gpt.data.encoding.BATCH_BYTES", 100)
    path = tmp_path / "rows.jsonl"
    write_rows(path, SUMS)
    path.write_text(path.read_text() + "no JSON\n")
    found = read_questions(data_of(path), byte_tokenizer(), held_out=False, limit=3)
    assert len(found.questions) == 3
    with pytest.raises(UserError, match="line 121: is not JSON"):
        read_questions(data_of(path), byte_tokenizer(), held_out=False)
