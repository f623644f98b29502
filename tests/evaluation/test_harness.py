"""The adapter against the harness's own model for transformers, HFLM, on the exported model; all offline."""

import importlib.util
import json
import logging
import math
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from gpt.commands import EvaluateConfig
from gpt.data.hub import hub_answers, quiet_hub
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_training import byte_tokenizer
from gpt.errors import UserError
from gpt.evaluation.command import evaluate
from gpt.evaluation.harness import adapter, find_tasks, loglikelihoods, run_tasks
from gpt.inference.loading import load_model
from gpt.model.transformer import GPT
from tests.evaluation.conftest import CONTEXT, make_model

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

DOCUMENTS = [
    {
        "question": "what " * (n % 7) + f"is {n}?",
        "choices": [" yes", " no", f" {n}", " a long answer"],
        "answer": n % 4,
        "letter": [" a", " b", " c"],
        "text": f"text {n} " * n + "é.",
    }
    for n in range(9)
]
TASKS = {
    "many_tokens": 'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
    'target_delimiter: ""\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n',
    "one_token": 'output_type: multiple_choice\ndoc_to_text: "{{question}} "\ndoc_to_choice: "{{letter}}"\ndoc_to_target: 1\n'
    'target_delimiter: ""\nmetric_list: [{metric: acc}]\n',
    "no_question": 'output_type: loglikelihood\ndoc_to_text: ""\ndoc_to_target: "{{question[:20]}}"\ntarget_delimiter: ""\n'
    "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}, {metric: acc}]\n",
    "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n",
    "writing": 'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "x"\n'
    'generation_kwargs: {until: ["e", "\\n\\n"], max_gen_toks: 9}\nmetric_list: [{metric: exact_match}]\n',
    "writing_on": 'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "x"\n'
    "generation_kwargs: {until: [], max_gen_toks: 7, do_sample: false}\nmetric_list: [{metric: exact_match}]\n",
    "sampling": 'output_type: generate_until\ndoc_to_text: "is"\ndoc_to_target: "x"\nrepeats: 3\n'
    "generation_kwargs: {until: [], max_gen_toks: 12, do_sample: true, temperature: 0.9}\nmetric_list: [{metric: exact_match}]\n",
    "greedy_of_the_context": 'output_type: generate_until\ndoc_to_text: "is"\ndoc_to_target: "x"\n'
    "generation_kwargs: {until: [], num_beams: 4}\nmetric_list: [{metric: exact_match}]\n",
    "broken": 'output_type: multiple_choice\ndoc_to_text: "{{nothing}}"\ndoc_to_choice: "{{nothing}}"\ndoc_to_target: nothing\n',
}


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("\n".join(json.dumps(document) for document in DOCUMENTS))
    for name, text in TASKS.items():
        source = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'data.jsonl'}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(source + text)
    (folder / "some.yaml").write_text("group: some\ntask: [many_tokens, one_token]\naggregate_metric_list: [{metric: acc}]\n")
    return folder


@pytest.fixture(scope="module")
def manager(tasks_dir):
    """Of our tasks alone; the thousands that come with the harness take seconds to list."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=str(tasks_dir), include_defaults=False)


def answers(lm, manager, names):
    from lm_eval import evaluator

    return evaluator.simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True)


# Numbers


def that_begins_texts() -> Tokenizer:
    """A tokenizer that itself puts a token before every text, as Llama's does."""
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.backend.add_special_tokens(["<s>"])
    tokenizer.backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    tokenizer.special_tokens = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return tokenizer


@needs_harness
@pytest.mark.parametrize("begins", [False, True])
def test_the_same_as_the_harness_s_own_model(shape, manager, tmp_path, begins):
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path / "model"
    make_model(shape, 258).save_pretrained(folder, tokenizer=that_begins_texts() if begins else byte_tokenizer())
    names = ["many_tokens", "one_token", "no_question", "rolling", "writing", "writing_on"]
    ours = answers(adapter(load_model(str(folder)), CONTEXT, 4), manager, names)
    theirs = answers(HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2), manager, names)
    for name in names:
        assert len(ours["samples"][name]) == len(DOCUMENTS)
        for mine, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert mine["arguments"] == other["arguments"]
            if "writing" in name:
                assert mine["resps"] == other["resps"]
            elif name == "rolling":
                assert mine["resps"][0][0] == pytest.approx(other["resps"][0][0], abs=1e-4 * len(mine["doc"]["text"]))
            else:
                for (mine_nats, mine_greedy), (other_nats, other_greedy) in zip(
                    (r[0] for r in mine["resps"]), (r[0] for r in other["resps"]), strict=True
                ):
                    assert mine_nats == pytest.approx(other_nats, abs=1e-4)
                    assert mine_greedy == other_greedy
        figures = {k: v for k, v in theirs["results"][name].items() if "," in k and isinstance(v, float)}
        assert figures
        for metric, value in figures.items():
            assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4)
    written = [sample["resps"][0][0] for sample in ours["samples"]["writing_on"]]
    assert len(set(written)) > 1
    assert all(written)


@needs_harness
def test_the_metrics_of_the_table_are_the_harness_s(folder, tasks_dir, manager, tmp_path, capsys, monkeypatch):
    """Through the command, with worked examples and a limit."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr("gpt.evaluation.command.find_tasks", lambda names, where: manager)
    output = tmp_path / "figures.json"
    config = EvaluateConfig(
        model=str(folder), device="cpu", precision="fp32", tasks=["some", "rolling"], tasks_dir=str(tasks_dir), num_fewshot=1,
        limit=5, batch=3, output=str(output),
    )  # fmt: skip
    config.validate()
    assert evaluate(config) == 0
    found = json.loads(output.read_text())
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    expected = evaluator.simple_evaluate(model, tasks=["some", "rolling"], task_manager=manager, num_fewshot=1, limit=5)
    assert found["results"].keys() == expected["results"].keys() == {"many_tokens", "one_token", "some", "rolling"}
    assert found["n-shot"]["many_tokens"] == 1
    assert found["task_versions"]["many_tokens"] == expected["versions"]["many_tokens"]
    assert "lm_eval" in found["versions"]
    printed = capsys.readouterr().out
    for name, figures in expected["results"].items():
        for metric, value in figures.items():
            if isinstance(value, float) and not math.isnan(value):
                assert found["results"][name][metric] == pytest.approx(value, rel=1e-3), (name, metric)
                if "_stderr" not in metric:
                    rows = [line.split() for line in printed.splitlines() if line.startswith(f"{name} ")]
                    assert any(metric.split(",")[0] in row and f"{found['results'][name][metric]:.4f}" in row for row in rows)


@needs_harness
def test_sampling_differs_from_repeat_to_repeat_and_can_be_repeated(folder, manager):
    model = adapter(load_model(str(folder)), CONTEXT, 4)
    first, second = (answers(model, manager, ["sampling"])["samples"]["sampling"] for _ in range(2))
    assert [s["resps"] for s in first] == [s["resps"] for s in second]
    assert len(set(first[0]["resps"][0])) == 3


@needs_harness
def test_what_cannot_be_done_as_asked_is_said_once(folder, manager, capsys):
    answers(adapter(load_model(str(folder)), CONTEXT, 4), manager, ["greedy_of_the_context"])
    err = capsys.readouterr().err
    assert err.count(f"answers are written up to {CONTEXT // 2} tokens, not 256: the context is {CONTEXT}") == 1
    assert err.count("num_beams=4 is not used") == 1


@needs_harness
def test_an_answer_that_merges_with_its_question_has_tokens(folder):
    from lm_eval.api.instance import Instance

    loaded = load_model(str(folder))
    lm = adapter(loaded, CONTEXT, 4)
    encode = loaded.tokenizer.encode_prompt
    loaded.tokenizer.encode_prompt = lambda text: encode(text.replace("()", "("))  # as a merge of the two would be
    requests = [Instance("loglikelihood", {}, ("f(", ")"), 0), Instance("loglikelihood", {}, ("  ", "x"), 1)]
    (merged, _), (blank, _) = lm.loglikelihood(requests)
    pairs = [(encode("f("), encode(")")), ([loaded.tokenizer.end_of_text], encode("  x"))]
    assert [merged, blank] == pytest.approx([nats for nats, _ in loglikelihoods(loaded.model, pairs, CONTEXT, 1)])


# Scoring


def slow(model: GPT, context: list[int], continuation: list[int], length: int) -> tuple[float, bool]:
    wide = GPT(model.config).double()
    wide.load_state_dict(model.state_dict())
    ids = (context + continuation)[-(length + 1) :]
    with torch.no_grad():
        logits = wide.eval()(torch.tensor([ids[:-1]]))[0, -len(continuation) :].log_softmax(-1)
    nats = sum(row[i].item() for row, i in zip(logits, continuation, strict=True))
    return nats, logits.argmax(-1).tolist() == continuation


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_loglikelihoods(shape, batch):
    model = make_model(shape)
    random = torch.Generator().manual_seed(1)
    sizes = [(1, 1), (3, 2), (CONTEXT, 1), (40, 3), (2, CONTEXT), (1, CONTEXT - 1), (5, 5)]
    pairs = [tuple(torch.randint(257, (n,), generator=random).tolist() for n in size) for size in sizes]
    pairs += [(pairs[1][0], [*pairs[1][1][:-1], last]) for last in range(5)]  # the same is read for these
    likeliest = model(torch.tensor([pairs[6][0]]))[0, -1].argmax().item()
    pairs.append((pairs[6][0], [likeliest]))
    done: list[int] = []
    found = loglikelihoods(model, pairs, CONTEXT, batch, done.append)
    expected = [slow(model, *pair, CONTEXT) for pair in pairs]
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[-1][1]
    assert sum(done) == len(pairs)


def test_what_is_read_twice_is_read_once_and_only_what_counts_gets_logits():
    model, rows, logits = make_model("gpt2"), [], []
    model.final_norm.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    model.head.register_forward_hook(lambda module, inputs, output: logits.append(output.shape[0]))
    loglikelihoods(model, [([1, 2, 3], [n]) for n in range(6)] + [([1, 2], [3, 4])], CONTEXT, 8)
    assert rows == [1]  # [1, 2, 3] stands before all of them
    assert logits == [8]


def test_an_answer_longer_than_the_context():
    with pytest.raises(UserError, match=rf"an answer of {CONTEXT + 1} tokens; the model reads at most {CONTEXT}"):
        loglikelihoods(make_model("gpt2"), [([1], [2] * (CONTEXT + 1))], CONTEXT, 1)


def test_nothing_to_score():
    assert loglikelihoods(make_model("gpt2"), [], CONTEXT, 4) == []
    assert loglikelihoods(make_model("gpt2"), [([1], [])], CONTEXT, 4) == [(0.0, True)]


# Slips


def test_without_the_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"^tasks=hellaswag needs lm-evaluation-harness: pip install 'gpt-trainer\[eval\]'"):
        find_tasks(["hellaswag"], None)


@needs_harness
def test_an_unknown_task(tasks_dir):
    with pytest.raises(UserError, match=r"^tasks=hellaswg: no such task\. Did you mean hellaswag"):
        find_tasks(["rolling", "many_*", "hellaswg"], str(tasks_dir))
    with pytest.raises(UserError, match=r"^tasks_dir=.*nowhere: there is no such folder$"):
        find_tasks(["rolling"], str(tasks_dir / "nowhere"))


@needs_harness
def test_a_task_that_cannot_be_set_up(folder, manager, tasks_dir):
    config = EvaluateConfig(model=str(folder), tasks=["broken"])
    with pytest.raises(UserError, match=r"^tasks=broken: the harness cannot set them up: \w+: .*nothing"):
        run_tasks(manager, load_model(str(folder)), CONTEXT, config)


@needs_harness
def test_a_task_of_the_hub_without_the_hub_is_refused_at_once(folder, tmp_path, monkeypatch, capfd):
    from huggingface_hub import constants
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    (tmp_path / "task.yaml").write_text(TASKS["one_token"] + "task: of_the_hub\ndataset_path: nobody/nothing\ntest_split: test\n")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    config, started = EvaluateConfig(model=str(folder), tasks=["of_the_hub"]), time.perf_counter()
    with pytest.raises(UserError, match=r"^tasks=of_the_hub: .*nobody/nothing.*, and it was not downloaded before; is there a network"):
        run_tasks(manager, load_model(str(folder)), CONTEXT, config)
    assert time.perf_counter() - started < 5
    assert "Retrying" not in capfd.readouterr().err


@needs_harness
def test_whether_thehub_answers(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert hub_answers(), "an error is an answer too"
    assert not hub_answers()


@needs_harness
@pytest.mark.parametrize("debug", ["", "1"])
def test_the_hub_s_own_lines_are_for_debugging(debug, monkeypatch):
    from datasets import config

    monkeypatch.setenv("GPT_DEBUG", debug)
    logger = logging.getLogger("huggingface_hub.utils._http")
    before = (logger.isEnabledFor(logging.WARNING), config.HF_HUB_OFFLINE)
    with quiet_hub(True):
        assert logger.isEnabledFor(logging.WARNING) == bool(debug)
        assert config.HF_HUB_OFFLINE
    assert before == (logger.isEnabledFor(logging.WARNING), config.HF_HUB_OFFLINE)


@needs_harness
def test_a_tokenizer_without_a_first_token(folder):
    loaded = load_model(str(folder))
    loaded.tokenizer.end_of_text = None
    loaded.tokenizer.special_tokens.clear()
    with pytest.raises(UserError, match="no token that can stand before a text"):
        adapter(loaded, CONTEXT, 1)
