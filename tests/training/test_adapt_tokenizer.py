"""Runs of `gpt finetune adapt_tokenizer=...`."""

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt.compose import compose_run
from gpt.data.tokenizer import load_tokenizer
from gpt.data.tokenizer_training import char_tokenizer, train_bpe
from gpt.errors import UserError
from gpt.finetuning.vocabulary import Origins, find_origins
from gpt.model.transformer import GPT
from gpt.training.checkpoint import list_checkpoints
from gpt.training.trainer import Trainer
from tests.training.finetuning import SMALL, stop_in_the_middle, write_rows
from tests.training.test_trainer import assert_same_run, losses

TRAIN = ["adapt_tokenizer=train", "tokenizer=bpe", "tokenizer.vocab_size=320"]


pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def config_of(tmp_path, corpus, init):
    """Composes a run on the text of the corpus; takes overrides."""

    def compose(*overrides, init=init):
        places = [f"data.cache_dir={tmp_path / 'cache'}", f"run.dir={tmp_path / 'runs'}"]
        evaluation = ["train.eval_tokens=1024", "train.final_eval_tokens=1024"]
        return compose_run("finetune", [*SMALL, "data=text", f"data.paths=[{corpus}]", f"init={init}", *places, *evaluation, *overrides])

    return compose


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_new_tokenizer_goes_along_with_the_model(config_of, tmp_path, capsys):
    run = Trainer(config_of(*TRAIN, "run.id=first")).fit().run_directory
    said = r"tokenizer: byte-level BPE, 320 ids, .*, in place of bytes, 257 ids; of its 320 tokens: 257 are .*, 63 start from"
    assert re.search(said, capsys.readouterr().err)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    assert len(tokenizer) == model.config.vocab_size == 320
    assert tokenizer("import os").input_ids == load_tokenizer(run).encode("import os")
    assert len(tokenizer("import os").input_ids) < len("import os")
    shutil.rmtree(tmp_path / "cache")
    second = Trainer(config_of(init=run)).fit().run_directory  # it is the start of another run, with its tokenizer
    assert load_tokenizer(second).fingerprint() == load_tokenizer(run).fingerprint()
    third = Trainer(config_of("adapt_tokenizer=train", "tokenizer=char", init=run)).fit().run_directory
    assert "char" in load_tokenizer(third).describe()


def test_the_first_step_sees_the_adapted_rows(config_of, init):
    """Of the rest of the model nothing changes, and the rows are those that `find_origins` says."""
    trainer = Trainer(config_of(*TRAIN, "optimizer.lr=1e-12", "train.budget=1steps"))
    run = trainer.fit().run_directory
    before, after = GPT.from_pretrained(init), GPT.from_pretrained(run / "model")
    origins = find_origins(load_tokenizer(init), load_tokenizer(run))
    assert torch.allclose(after.head.weight, origins.take(before.head.weight), atol=1e-6)
    assert not torch.equal(after.head.weight[:257], before.head.weight), "ids have moved"
    for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True):
        assert name == "embeddings.tokens.weight" or torch.allclose(p, q, atol=1e-6), name


@pytest.mark.parametrize("untie", ["true", "false"])
def test_the_same_tokenizer_changes_nothing(config_of, init, untie):
    plain = Trainer(config_of(f"freeze.untie={untie}", "run.id=plain")).fit().run_directory
    config = config_of(f"adapt_tokenizer={init}", f"freeze.untie={untie}", "run.id=adapted")
    assert config.tokenizer.path == str(init)
    adapted = Trainer(config).fit().run_directory
    assert losses(plain) == losses(adapted)
    found, expected = weights(adapted / "model"), weights(plain / "model")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("made", ["file", "folder"])
def test_a_tokenizer_that_exists(config_of, tmp_path, made):
    folder = tmp_path / "other"
    folder.mkdir()
    char_tokenizer(["abcdefghijklmnopqrstuvwxyz \n"]).save(folder / "tokenizer.json")
    run = Trainer(config_of(f"adapt_tokenizer={folder / 'tokenizer.json' if made == 'file' else folder}", "run.id=r")).fit().run_directory
    assert load_tokenizer(run / "tokenizer.json").fingerprint() == load_tokenizer(folder).fingerprint()
    shutil.rmtree(folder)  # the run has its own copy
    assert Trainer(compose_run("finetune", [f"resume={run}", "train.budget=4steps"])).fit().state.step == 4


def test_rows_to_spare(config_of):
    run = Trainer(config_of(*TRAIN, "model.vocab_size=384", "train.budget=1steps")).fit().run_directory
    assert GPT.from_pretrained(run / "model").config.vocab_size == 384


def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(config_of, tmp_path):
    settings = [*TRAIN, "freeze=embeddings_first", "train.budget=8steps", "train.micro_batch=1", "optimizer.lr=0.01"]
    Trainer(config_of(*settings, "run.id=whole")).fit()
    result = stop_in_the_middle(Trainer(config_of(*settings, "run.id=stopped")), 1)
    assert (result.exit_code, result.state.step) == (143, 1)
    with pytest.raises(UserError, match=r"adapt_tokenizer=null: the run in .* was started with adapt_tokenizer=train; set it so"):
        Trainer(compose_run("finetune", [f"resume={result.run_directory}", "adapt_tokenizer=null"])).fit()
    with pytest.raises(UserError, match=r"tokenizer.vocab_size=300: the run in .* was started with tokenizer.vocab_size=320"):
        Trainer(compose_run("finetune", [f"resume={result.run_directory}", "tokenizer.vocab_size=300"])).fit()
    assert Trainer(config_of(*settings, "run.id=stopped")).fit().exit_code == 0  # the same command goes on
    assert_same_run(tmp_path / "runs/whole", tmp_path / "runs/stopped")


def test_embeddings_first_then_everything(config_of, init):
    settings = [*TRAIN, "freeze=embeddings_first", "train.budget=20steps", "checkpoint.every=1steps", "checkpoint.keep_last=20"]
    run = Trainer(config_of(*settings)).fit().run_directory
    start = GPT.from_pretrained(init).state_dict()
    steps = {step: weights(folder) for step, folder in list_checkpoints(run / "checkpoints")}
    blocks = [name for name in start if name.startswith(("blocks.", "final_norm."))]
    for name in blocks:
        assert torch.equal(steps[2][name], start[name]), name
    assert not torch.equal(steps[2]["embeddings.tokens.weight"], steps[1]["embeddings.tokens.weight"])
    assert all(not torch.equal(steps[3][name], start[name]) for name in blocks if name.endswith("weight"))


def test_pieces_are_a_better_start_than_random_rows(config_of, tmp_path, corpus, monkeypatch):
    """Of a model that knows the bytes of the text, by the bits that a byte of held-out text takes after as short a run."""
    base = [*SMALL, "data=text", f"data.paths=[{corpus}]", f"data.cache_dir={tmp_path / 'cache'}", f"run.dir={tmp_path / 'runs'}"]
    config = compose_run("pretrain", [*base, "run.id=base", "train.budget=150steps", "train.log_every=50"])
    run = Trainer(config).fit().run_directory

    def bits(name: str) -> float:
        held_out = Trainer(config_of(*TRAIN, f"run.id={name}", "train.budget=5steps", "optimizer.lr=1e-3", init=run)).fit().held_out
        assert held_out is not None
        return held_out.bits_per_byte

    pieces = bits("pieces")
    take = Origins.take

    def random(self: Origins, weight: torch.Tensor) -> torch.Tensor:
        taken, new = take(self, weight), torch.tensor([len(ids) > 1 for ids in self.rows])
        taken[new] = torch.randn(taken[new].shape, generator=torch.Generator().manual_seed(0)) * weight.std()
        return taken

    monkeypatch.setattr(Origins, "take", random)
    assert pieces < bits("random") - 0.1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokenizer=byte"], r"tokenizer: init=.* leave it out, or go on with another: adapt_tokenizer=<folder, run or hub id>"),
        (["tokenizer.vocab_size=300"], r"tokenizer\.vocab_size: init=.* brings its own shape and tokenizer.*adapt_tokenizer=train"),
        (
            ["adapt_tokenizer=INIT", "tokenizer=char"],
            r"tokenizer: adapt_tokenizer=.* is a tokenizer that exists; leave it out, or give adapt",
        ),
        (
            ["adapt_tokenizer=train", "tokenizer=pretrained"],
            r"tokenizer=pretrained: adapt_tokenizer=train makes .* give adapt_tokenizer its",
        ),
        (["adapt_tokenizer=char"], r"adapt_tokenizer=char is no tokenizer that exists; .*adapt_tokenizer=train tokenizer=char"),
        (["adapt_tokenizer=train", "lora.rank=2"], r"lora\.rank=2: adapters leave the embeddings frozen, .* in a run of its own"),
        (["adapt_tokenizer=./nowhere"], r"adapt_tokenizer=\./nowhere: no tokenizer at .*nowhere"),
        (["adapt_tokenizer=trian"], r"adapt_tokenizer=trian: no tokenizer\.json .* Did you mean train\?"),
        (["adapt_tokenizer=train", "model.n_layer=3"], r"model\.n_layer: .* \(model\.dropout and model\.vocab_size may be set\)"),
        (["model.vocab_size=300"], r"model\.vocab_size: .* \(model\.dropout may be set\)"),
        (
            ["adapt_tokenizer=train", "tokenizer=bpe", "model.vocab_size=300"],
            r"model\.vocab_size=300 is smaller than tokenizer\.vocab_size=",
        ),
    ],
)
def test_settings_that_cannot_be(config_of, init, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        config_of(*(text.replace("INIT", str(init)) for text in overrides))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("adapt", [[], TRAIN])
def test_weights_of_another_tokenizer(config_of, init, tmp_path, adapt):
    mixed = shutil.copytree(init, tmp_path / "mixed")
    train_bpe(["the other theatre "] * 20, 265).save(mixed / "tokenizer.json")
    message = r"init=.*mixed: its weights know 257 tokens and the tokenizer beside them has 265, so they are not of one model; put"
    with pytest.raises(UserError, match=message):
        config_of(*adapt, init=mixed)


def test_weights_without_a_tokenizer(config_of, init, tmp_path):
    bare = shutil.copytree(init, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer at .*bare"):
        config_of(*TRAIN, init=bare)


def test_parity_compares_weights_as_they_are(config_of):
    from gpt.training.parity import parity

    with pytest.raises(UserError, match="adapt_tokenizer=train: gpt parity compares the weights of init= as they are"):
        parity(config_of(*TRAIN))


def test_preferences_are_held_to_the_adapted_weights(config_of, tmp_path):
    """Before the first step the model is what it is held to, so that no pair has a margin."""
    rows = [{"prompt": f"{n} and ", "chosen": "the other", "rejected": "none"} for n in range(60)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    tokenizer = [*TRAIN[:2], "tokenizer.vocab_size=260"]
    run = Trainer(config_of(*tokenizer, "data=jsonl", f"data.paths=[{file}]", "train.budget=1steps")).fit().run_directory
    assert losses(run)[1] == pytest.approx(math.log(2), abs=1e-6)
