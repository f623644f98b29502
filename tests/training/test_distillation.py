"""Runs in which a student learns from a teacher: ours, or one that only transformers can run."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from gpt.compose import compose_run, load_run
from gpt.config import DeviceConfig, RunConfig
from gpt.data.batches import Batch
from gpt.data.tokenizer_training import byte_tokenizer
from gpt.errors import UserError
from gpt.finetuning.config import DistillConfig
from gpt.finetuning.distillation import ForeignTeacher, OwnTeacher, fingerprint, load_teacher
from gpt.model.config import GPTConfig
from gpt.model.transformer import GPT
from gpt.runtime.device import find_device
from gpt.training.metrics import read_metrics
from gpt.training.trainer import Trainer
from tests.training.finetuning import (
    CONTEXT,
    SUMS,
    finetune_config,
    stop_in_the_middle,
    write_rows,
)
from tests.training.test_processes import assert_same_losses, launch
from tests.training.test_trainer import assert_same_run, losses

TOKENS = 257
LIKELY = ["distill.top_k=8", "train.budget=3epochs", "train.batch_tokens=512", "freeze.cache=off"]


pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Larger than the student, of another shape, and with more ids than the tokenizer has."""
    torch.manual_seed(1)
    shape = GPTConfig(
        vocab_size=TOKENS + 7, context_length=96, n_layer=2, n_head=2, d_model=48, positions="rotary", norm="rmsnorm", activation="swiglu",
        bias=False, d_ff=80,
    )  # fmt: skip
    model = GPT(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() == 2 else 1)
    folder = tmp_path_factory.mktemp("teacher") / "model"
    model.save_pretrained(folder, tokenizer=byte_tokenizer())
    return folder


@pytest.fixture
def config_of(tmp_path, init, teacher):
    """Composes a run on sums whose student learns from the teacher; takes overrides."""
    rows = write_rows(tmp_path / "rows.jsonl", SUMS)

    def compose(*overrides: str) -> RunConfig:
        return finetune_config(tmp_path, init, rows, f"distill.teacher={teacher}", *overrides)

    return compose


def batch() -> Batch:
    """Two rows: documents of different lengths, the last of the second one with nothing to learn."""
    torch.manual_seed(0)
    tokens, targets = torch.randint(TOKENS, (2, 24)), torch.randint(TOKENS, (2, 24))
    documents = torch.tensor([[0] * 5 + [1] * 12 + [2] * 7, [0] * 17 + [1] * 7])
    targets[1, 17:] = -100
    targets[0, 3] = -100
    return Batch(tokens, targets, documents, torch.tensor([0, 1]))


def logits_one_by_one(model, rows: Batch) -> tuple[Tensor, Tensor]:
    """Of every document by itself, (n, TOKENS), and where they stand in the flat rows."""
    found, places = [], []
    for row in range(len(rows.tokens)):
        for document in rows.documents[row].unique():
            where = (rows.documents[row] == document).nonzero().flatten()
            if (rows.targets[row, where] != -100).any():
                with torch.no_grad():
                    found.append(model(rows.tokens[row, where][None]).logits[0, :, :TOKENS])
                places.append(where + row * rows.tokens.shape[1])
    return torch.cat(found), torch.cat(places)


# Teachers


def test_a_model_of_ours_says_the_same_in_transformers(init):
    ours = OwnTeacher(GPT.from_pretrained(init), TOKENS)
    theirs = ForeignTeacher(transformers.AutoModelForCausalLM.from_pretrained(init).eval(), TOKENS)
    assert "at once" not in theirs.kind
    for documents in (batch().documents, None):
        rows = Batch(batch().tokens, batch().targets, documents)
        learned = torch.ones(48, dtype=torch.bool) if documents is None else torch.arange(48) < 24 + 17
        with torch.no_grad():
            a, b = (t.head(t.states(rows))[learned, :TOKENS] for t in (ours, theirs))
        assert a.std() > 0.1
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


FOREIGN = {
    "opt": (transformers.OPTConfig, {"ffn_dim": 48, "max_position_embeddings": 96, "word_embed_proj_dim": 32}),
    "gemma2": (transformers.Gemma2Config, {"intermediate_size": 48, "head_dim": 16, "num_key_value_heads": 2, "sliding_window": 8}),
}


def save_foreign(name: str, folder: Path) -> transformers.PreTrainedModel:
    kind, more = FOREIGN[name]
    shape = {"vocab_size": TOKENS + 3, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
    torch.manual_seed(2)
    model = transformers.AutoModelForCausalLM.from_config(kind(**shape, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() == 2 else 1)
    model.save_pretrained(folder)
    byte_tokenizer().to_transformers(CONTEXT).save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", FOREIGN)
def test_a_model_of_another_family_is_asked_document_by_document(name, tmp_path):
    model = save_foreign(name, tmp_path / "model")
    device = find_device(DeviceConfig(name="cpu"), "fp32")
    found = load_teacher(DistillConfig(teacher=str(tmp_path / "model")), byte_tokenizer(), 24, device)
    assert isinstance(found, ForeignTeacher)
    assert ("all its logits at once" in found.kind) == (name == "gemma2"), "Gemma 2 caps its logits"
    assert not any(p.requires_grad for p in found.module.parameters())
    expected, places = logits_one_by_one(model, batch())
    with torch.no_grad():
        ours = found.head(found.states(batch()))[places, :TOKENS]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    nothing = Batch(batch().tokens, torch.full((2, 24), -100), batch().documents)
    assert len(found.states(nothing)) == 48


def test_a_run_learns_from_a_model_of_another_family(tmp_path, config_of):
    save_foreign("opt", tmp_path / "opt")
    run = Trainer(config_of(f"distill.teacher={tmp_path / 'opt'}")).fit().run_directory
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert len(lines) == 3
    assert all(line["distill_kl"] > 0.01 for line in lines)


# Runs


def test_a_student_comes_close_to_its_teacher_which_stays_as_it_is(tmp_path, config_of, teacher, capsys):
    before = fingerprint(GPT.from_pretrained(teacher))
    trainer = Trainer(config_of("distill.weight=1", "distill.temperature=1", "train.budget=40steps", "optimizer=muon", "optimizer.lr=0.01"))
    run = trainer.fit().run_directory
    divergences = [line["distill_kl"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert divergences[-1] < 0.5 * divergences[0]
    asked = trainer.givers.teacher.teacher.module
    assert fingerprint(asked) == before
    assert all(p.grad is None and not p.requires_grad for p in asked.parameters())
    said = capsys.readouterr().err
    assert re.search(r"teacher: .*0\.0\dM parameters in float32, Llama shape; all its probabilities, temperature 1, weight 1", said)
    assert "answers: not kept (all probabilities are too many to keep; set distill.top_k)" in said
    own = losses(run)
    assert [own[step + 1] for step in range(40)] == pytest.approx(divergences, rel=1e-4), (
        "with weight 1 and temperature 1 the loss is the KL"
    )


def test_the_loss_of_a_step_is_that_of_all_tokens_by_hand(config_of, init, teacher):
    trainer = Trainer(config_of("train.budget=1steps", "distill.temperature=3", "distill.weight=0.7", "train.micro_batch=2"))
    run = trainer.fit().run_directory
    rows = trainer.data.batches.batch(0)
    student, other = GPT.from_pretrained(init).double(), GPT.from_pretrained(teacher).double()
    with torch.no_grad():
        own = student(rows.tokens, documents=rows.documents)
        asked = other(rows.tokens, documents=rows.documents)[..., :TOKENS]
    learned = rows.targets != -100
    own, asked, targets = own[learned], asked[learned], rows.targets[learned]
    divergence = torch.nn.functional.kl_div((own / 3).log_softmax(-1), (asked / 3).softmax(-1), reduction="batchmean")
    expected = 0.7 * 9 * divergence + 0.3 * torch.nn.functional.cross_entropy(own, targets)
    assert losses(run)[1] == pytest.approx(expected.item(), rel=1e-5)


def test_what_is_kept_of_the_likeliest_tokens_changes_nothing(tmp_path, config_of, capsys, monkeypatch):
    runs = {}
    asked = []
    states = OwnTeacher.states
    monkeypatch.setattr(OwnTeacher, "states", lambda self, rows: asked.append(len(rows.tokens)) or states(self, rows))
    for name, *more in (("off", "distill.cache=off"), ("first",), ("second",)):
        before = len(asked)
        runs[name] = Trainer(config_of(*LIKELY, *more, f"run.id={name}")).fit().run_directory
        runs[name, "asked"] = sum(asked[before:])
    assert_same_run(runs["off"], runs["first"])
    assert_same_run(runs["off"], runs["second"])
    assert runs["off", "asked"] > runs["first", "asked"] > runs["second", "asked"] == 0
    said = capsys.readouterr().err
    assert "not kept (distill.cache=off)" in said
    assert re.search(
        r"kept \(\S+ GB at most, 0 of (\d+) rows are there\).*kept \(\S+ GB at most, \1 of \1 rows are there\)", said, re.DOTALL
    )


@pytest.mark.parametrize("how", [["distill.temperature=2"], LIKELY])
def test_a_run_that_was_stopped_goes_on_exactly(config_of, init, how):
    how = [*how, "train.budget=8steps", "train.micro_batch=1", "model.dropout=0.1"]
    whole = Trainer(config_of(*how, "run.id=whole")).fit().run_directory
    stopped = stop_in_the_middle(Trainer(config_of(*how, "run.id=stopped")), 5)
    assert stopped.exit_code
    assert_same_run(whole, Trainer(config_of(*how, "run.id=stopped")).fit().run_directory)
    for change in ("distill.weight=0.8", "distill.top_k=3", f"distill.teacher={init}"):
        with pytest.raises(UserError, match=r"distill\..* was started with distill\."):
            Trainer(config_of(*how, "run.id=stopped", change)).fit()


def test_it_goes_together_with_frozen_layers_and_their_cache(config_of, tmp_path):
    frozen = [*LIKELY[:-1], "freeze=first_n", "freeze.first_n_blocks=1", "freeze.embeddings=true", "freeze.head=true"]
    cached = Trainer(config_of(*frozen, "run.id=cached"))
    run = cached.fit().run_directory
    assert cached.givers.prefix is not None
    assert_same_run(run, Trainer(config_of(*frozen, "run.id=plain", "freeze.cache=off", "distill.cache=off")).fit().run_directory)


def test_a_stage_that_begins_asks_the_same_teacher(config_of, monkeypatch):
    loaded = []
    load = load_teacher
    monkeypatch.setattr("gpt.finetuning.distillation.load_teacher", lambda *given: loaded.append(given) or load(*given))
    stages = ["freeze=first_n", "freeze.first_n_blocks=1", "freeze.embeddings=true", "freeze.head=true", "unfreeze=[{at: 2, all: true}]"]
    run = Trainer(config_of(*stages, "train.budget=5steps")).fit().run_directory
    assert len(loaded) == 1
    assert all("distill_kl" in line for line in read_metrics(run / "metrics.jsonl") if "loss" in line)


def test_a_fresh_student_takes_its_teachers_tokenizer_and_is_measured_by_cross_entropy(tiny_config, teacher):
    config = tiny_config(f"distill.teacher={teacher}", "train.budget=4steps", "distill.top_k=4")
    assert (config.tokenizer.name, config.tokenizer.path) == ("pretrained", str(teacher))
    trainer = Trainer(config)
    result = trainer.fit()
    plain = tiny_config(f"init={result.run_directory}", "train.budget=1steps", "optimizer.lr=1e-12", "optimizer.adam_lr=1e-12")
    assert result.held_out.loss == pytest.approx(Trainer(plain).fit().held_out.loss, abs=1e-4)
    assert trainer.givers.teacher.store is None, "windows of text are cut anew in each epoch"


@pytest.mark.slow
def test_every_layout_learns_the_same(tmp_path, config_of):
    configs = {}
    for name, *layout in (("one",), ("ddp", "parallel=ddp"), ("fsdp", "parallel=fsdp"), ("tensor", "parallel=ddp", "parallel.tensor=2")):
        shape = ["train.budget=5steps", "train.batch_tokens=512", "train.micro_batch=2", "data.packing=none", "train.log_every=1"]
        configs[name] = config_of(*shape, *layout)
        configs[f"{name}-likely"] = config_of(*shape, "distill.top_k=8", "train.budget=2epochs", *layout)
    launch({name: config for name, config in configs.items() if name.startswith("one")}, tmp_path / "single", 1)
    launch({name: config for name, config in configs.items() if not name.startswith("one")}, tmp_path / "many", 2)
    for name in configs:
        reference = tmp_path / "runs" / ("one-likely" if name.endswith("likely") else "one")
        run = tmp_path / "runs" / name
        assert_same_losses(run, reference, len(losses(reference)))
        kl = [[line["distill_kl"] for line in read_metrics(r / "metrics.jsonl") if "distill_kl" in line] for r in (run, reference)]
        assert kl[0] == pytest.approx(kl[1], abs=1e-5)


# What is refused


def test_an_impossible_teacher_is_refused(tmp_path, config_of, teacher):
    other = tmp_path / "other"
    other_tokenizer = byte_tokenizer(["<|im_start|>"])
    GPT(GPTConfig(vocab_size=258, context_length=CONTEXT, n_layer=1, n_head=1, d_model=8)).save_pretrained(other, tokenizer=other_tokenizer)
    short = tmp_path / "short"
    GPT(GPTConfig(vocab_size=TOKENS, context_length=16, n_layer=1, n_head=1, d_model=8)).save_pretrained(short, tokenizer=byte_tokenizer())
    few = tmp_path / "few"
    GPT(GPTConfig(vocab_size=200, context_length=CONTEXT, n_layer=1, n_head=1, d_model=8)).save_pretrained(few)
    byte_tokenizer().save(few / "tokenizer.json")
    nameless = tmp_path / "nameless"
    GPT(GPTConfig(vocab_size=TOKENS, context_length=CONTEXT, n_layer=1, n_head=1, d_model=8)).save_pretrained(nameless)
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text(json.dumps({"model_type": "no-such-model", "architectures": ["NoSuchForCausalLM"]}))
    byte_tokenizer().save(unknown / "tokenizer.json")
    for path, said in (
        (other, r"has another tokenizer: id \d+ is .* to the student"),
        (short, r"reads 16 tokens, and rows have 64; set train.sequence_length=16"),
        (few, r"knows 200 tokens, and the tokenizer has 257"),
        (nameless, r"whether its ids mean what the student's do is not to be seen: no tokenizer at"),
        (unknown, r"neither GPT \(.*no-such-model.*\) nor transformers can load it"),
        (tmp_path / "nowhere", r"there is no such directory"),
    ):
        with pytest.raises(UserError, match=f"distill.teacher={re.escape(str(path))}.*{said}"):
            Trainer(config_of(f"distill.teacher={path}", f"run.id={path.name}")).fit()


def test_weights_that_are_not_whole_are_refused(tmp_path):
    model = save_foreign("opt", tmp_path / "opt")
    weights = {name: tensor for name, tensor in model.state_dict().items() if "fc1" not in name and name != "lm_head.weight"}
    model.save_pretrained(tmp_path / "opt", state_dict=weights)
    with pytest.raises(UserError, match=r"its files lack model\.decoder\.layers\.0\.fc1\.bias"):
        load_teacher(DistillConfig(teacher=str(tmp_path / "opt")), byte_tokenizer(), 24, find_device(DeviceConfig(name="cpu"), "fp32"))


def test_a_full_disk_is_said_once_and_the_run_goes_on(config_of, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpt.finetuning.row_store._write", full)
    run = Trainer(config_of(*LIKELY)).fit().run_directory
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert len(losses(run)) > 3
    monkeypatch.undo()


def test_a_limit_that_is_too_small_turns_the_cache_off(config_of, capsys):
    Trainer(config_of(*LIKELY, "distill.cache_gb=1e-6")).fit()
    assert "answers: not kept (it would take" in capsys.readouterr().err


def test_settings_without_a_teacher_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"distill.temperature=3: nothing is learned from without a teacher; add distill.teacher="):
        compose_run("pretrain", ["distill.temperature=3"])


def test_the_resolved_config_names_the_teacher(config_of, teacher):
    run = Trainer(config_of("train.budget=1steps")).fit().run_directory
    assert load_run(run).distill.teacher == str(teacher)
