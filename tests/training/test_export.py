"""`gpt export`, the model card, and training that starts from weights."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt import GPT, GPTConfig, Trainer
from gpt.commands import ExportConfig
from gpt.compose import compose_run, compose_use
from gpt.data.tokenizer import load_tokenizer
from gpt.data.tokenizer_training import byte_tokenizer
from gpt.errors import UserError
from gpt.training.export import export

SMALL = [
    "tokenizer=byte", "model.n_layer=2", "model.d_model=32", "model.n_head=2", "model.d_ff=64", "model.context_length=32",
    "train.batch_tokens=256", "train.eval_tokens=1024", "train.final_eval_tokens=1024", "train.sample_tokens=5",
    "train.eval_every=3", "checkpoint.every=3steps", "checkpoint.keep_last=5", "device=cpu", "precision=fp32", "compile=false",
]  # fmt: skip
NOT_OF_THE_SHAPE = [key for key in SMALL if not key.startswith(("model", "tokenizer"))]


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus, cache_dir) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    data = ["data=text", f"data.paths=['{corpus}']", f"data.cache_dir={cache_dir}"]
    config = compose_run("pretrain", [*SMALL, *data, f"run.dir={folder}", "run.id=small", "train.budget=6steps"])
    assert Trainer(config).fit().exit_code == 0
    return folder / "small"


def call(*settings: str) -> int:
    return export(compose_use("export", settings))


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def logits(folder: Path) -> torch.Tensor:
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits


def test_the_best_weights_go_into_the_run_by_default(run, capsys):
    assert call(f"run={run}") == 0
    out = capsys.readouterr().out
    assert str(run / "export") in out
    assert "Qwen3ForCausalLM" in out
    assert torch.equal(logits(run / "export"), logits(run / "model"))
    assert AutoTokenizer.from_pretrained(run / "export")("héllo").input_ids == byte_tokenizer().encode("héllo")
    assert (run / "export" / "README.md").read_text() == (run / "model" / "README.md").read_text()
    with pytest.raises(UserError, match="not empty; choose another, or overwrite=true"):
        call(f"run={run}")
    assert call(f"run={run}", "overwrite=true") == 0


def test_a_checkpoint_in_bfloat16(run, tmp_path):
    assert call(f"run={run}/checkpoints/step-00000003", "dtype=bfloat16", f"output={tmp_path / 'out'}") == 0
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["dtype"] == "bfloat16"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    ours = GPT.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not torch.equal(ours(torch.arange(20)[None]), logits(run / "model")), "step 3 is not the last step"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "small, step 3" in card
    assert "3 steps" in card
    assert "bits per byte" not in card, "what was not measured is not in it"


def test_the_card_of_a_run(run, corpus):
    card = (run / "model" / "README.md").read_text()
    metrics = front_matter(card)["model-index"][0]["results"][0]["metrics"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min(line["val_loss"] for line in lines if "val_loss" in line)
    assert metrics[0]["type"] == "bits_per_byte"
    assert 1 < metrics[0]["value"] < 8.5
    assert f"| {best:.3f} |" in card
    assert any(f"| {metrics[0]['value'] + rounding:.3f} |" in card for rounding in (-1e-4, 0, 1e-4))
    assert corpus.name in card
    assert str(corpus) not in card, "a card is given away: no paths of this machine"
    assert "trained from scratch" in card
    for shown in ("6 steps", "2 blocks of width 32", "muon", "seed | 1337"):
        assert shown in card


def test_a_card_that_was_removed_is_made_again(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "model" / "README.md").unlink()
    assert call(f"run={copy}", f"output={tmp_path / 'out'}") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert f"| {min(line['val_loss'] for line in lines if 'val_loss' in line):.3f} |" in card
    assert "in 6 steps" in card


def test_a_hugging_face_directory_keeps_its_generation_settings(tmp_path, monkeypatch):
    source = tmp_path / "theirs"
    GPT(GPTConfig(vocab_size=257, context_length=16, n_layer=1, n_head=2, d_model=16)).save_pretrained(source, byte_tokenizer())
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5], "temperature": 0.6}))
    monkeypatch.chdir(tmp_path)
    assert call(f"run={source}") == 0
    assert json.loads((tmp_path / "theirs-export" / "generation_config.json").read_text())["eos_token_id"] == [0, 5]


def test_float16_is_refused_for_what_it_cannot_hold(tmp_path):
    model = GPT(GPTConfig(vocab_size=257, context_length=16, n_layer=1, n_head=2, d_model=16))
    model.blocks[0].feedforward.up.weight.data[0, 0] = 70000.0
    model.save_pretrained(tmp_path / "big", byte_tokenizer())
    with pytest.raises(UserError, match=r"dtype=float16: blocks\.0\.feedforward\.up\.weight"):
        call(f"run={tmp_path / 'big'}", "dtype=float16", f"output={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [(["run=runs/nowhere"], "no such directory"), (["run=.", "output=x"], "config.json")],
)
def test_what_is_not_there(settings, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        call(*settings)
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_file(run, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        call(f"run={run}", f"output={tmp_path / 'file'}")


def test_the_command(run, tmp_path):
    command = [sys.executable, "-m", "gpt", "export", f"run={run}", f"output={tmp_path / 'out'}", "dtype=float16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "float16" in done.stdout
    assert ExportConfig(run="x").format == "hf"


# init=


def start(run: Path, init: str, tmp_path: Path, *settings: str, budget: str = "3steps") -> Trainer:
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    named = ["data=text", f"data.paths=['{data['paths'][0]}']", f"data.cache_dir={data['cache_dir']}", f"run.dir={tmp_path}", "run.id=next"]
    return Trainer(compose_run("pretrain", [*NOT_OF_THE_SHAPE, *named, f"init={init}", f"train.budget={budget}", *settings]))


@pytest.mark.parametrize("part", ["", "model", "checkpoints/step-00000006"])
def test_training_goes_on_from_weights(run, tmp_path, part):
    trainer = start(run, str(run / part), tmp_path, "optimizer.lr=1e-9", "optimizer.adam_lr=1e-9", "optimizer.weight_decay=0")
    assert trainer.config.model.d_model == 32
    assert trainer.config.tokenizer.name == "pretrained"
    trainer.fit()
    before, after = GPT.from_pretrained(run / "model"), GPT.from_pretrained(tmp_path / "next" / "model")
    for (name, p), (_, q) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert (p - q).abs().max() < 1e-6, name
    assert load_tokenizer(tmp_path / "next" / "model").fingerprint() == load_tokenizer(run / "model").fingerprint()
    assert "trained further from the weights" in (tmp_path / "next" / "model" / "README.md").read_text()


def test_the_weights_are_copied_not_written_to(run, tmp_path):
    before = logits(run / "model")
    start(run, str(run), tmp_path).fit()
    assert torch.equal(logits(run / "model"), before)
    assert not torch.equal(logits(tmp_path / "next" / "model"), before)


def test_a_run_from_weights_resumes_from_its_own(run, tmp_path):
    start(run, str(run), tmp_path, budget="3steps").fit()
    resumed = compose_run("pretrain", [f"resume={tmp_path / 'next'}", "train.budget=5steps"])
    assert resumed.init == str(run)
    assert Trainer(resumed).fit().state.step == 5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model=gpt2"], "^model: init=.* brings its own shape"),
        (["model.n_layer=3"], r"^model\.n_layer: init="),
        (["tokenizer=byte"], "^tokenizer: init="),
    ],
)
def test_a_shape_of_ones_own_is_refused(run, tmp_path, settings, said):
    with pytest.raises(UserError, match=said):
        start(run, str(run), tmp_path, *settings)


def test_dropout_may_be_set(run, tmp_path):
    assert start(run, str(run), tmp_path, "model.dropout=0.1").config.model.dropout == 0.1


def test_init_that_is_not_there(run, tmp_path):
    with pytest.raises(UserError, match=r"^init=.*no such directory"):
        start(run, str(run.parent / "smal"), tmp_path)
