"""What we write: `transformers` computes it alike, we read the same bits back, and a save that fails harms nothing."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stock_models import HF_LLAMA3, OURS, TOLERANCE, edit, load_stock, logits, make_ours, tokens_for
from torch import nn

from gpt import GPT
from gpt.model import huggingface


@pytest.mark.parametrize("name", OURS)
def test_transformers_computes_what_we_wrote(name, tmp_path):
    model = make_ours(OURS[name]).eval()
    model.save_pretrained(tmp_path)
    stock = load_stock(tmp_path, dtype=torch.float32, attn_implementation="eager" if len(name) % 2 else "sdpa")
    tokens = tokens_for(model.config.vocab_size, model.config.context_length)
    want = logits(model, tokens)
    assert want.std() > 0.1  # the comparison means something
    assert (logits(stock, tokens) - want).abs().max() <= TOLERANCE

    tied = model.config.tie_embeddings and model.config.embedding_scale == 1
    head = "embed_out.weight" if name.startswith("neox") else "lm_head.weight"
    assert (head in load_file(tmp_path / "model.safetensors")) == (not tied)
    assert stock.config.tie_word_embeddings == tied
    assert (stock.get_input_embeddings().weight is stock.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("name", OURS)
def test_our_own_reload_computes_the_same_bits(name, tmp_path):
    model = make_ours(OURS[name]).eval()
    model.save_pretrained(tmp_path / "once")
    reloaded = GPT.from_pretrained(tmp_path / "once")
    tokens = tokens_for(model.config.vocab_size, model.config.context_length)
    want, got = logits(model, tokens), logits(reloaded, tokens)
    if reloaded.config.bias != model.config.bias:
        assert (want - got).abs().max() <= TOLERANCE  # added zeros may take another kernel
    else:
        assert torch.equal(want, got)
    assert not reloaded.training
    assert reloaded.config.stock_architecture() == model.config.stock_architecture()
    assert reloaded.config.dropout == model.config.dropout

    reloaded.save_pretrained(tmp_path / "twice")
    once, twice = (load_file(tmp_path / n / "model.safetensors") for n in ("once", "twice"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[key], twice[key]) for key in once)
    assert (tmp_path / "once/config.json").read_text() == (tmp_path / "twice/config.json").read_text()


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "neox-partial"])
def test_the_config_comes_back_whole(name, saved):
    config = make_ours(OURS[name]).config
    assert GPT.from_pretrained(saved[name]).config == config


def test_positions_are_not_scaled_with_the_embedding(tmp_path):
    model = make_ours(OURS["gpt2-learned-scaled"])
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors["transformer.wte.weight"], model.embeddings.tokens.weight * 3.3)
    assert torch.equal(tensors["transformer.wpe.weight"], model.get_parameter("embeddings.positions.weight"))
    assert torch.equal(tensors["lm_head.weight"], model.head.weight)


def test_older_readers_find_their_keys(saved):
    config = {name: json.loads((directory / "config.json").read_text()) for name, directory in saved.items()}
    assert config["gpt2"]["n_ctx"] == 24
    assert config["gpt2"]["n_inner"] == 128
    assert config["gpt2"]["activation_function"] == "gelu_new"
    for name in ("llama", "qwen2", "qwen3"):
        theta = OURS[name].get("rope_theta", 10000.0)
        assert config[name]["rope_theta"] == config[name]["rope_parameters"]["rope_theta"] == theta
    assert config["neox-partial"]["rotary_pct"] == config["neox-partial"]["rope_parameters"]["partial_rotary_factor"] == 0.5
    for values in config.values():
        assert values["dtype"] == values["torch_dtype"] == "float32"
        assert values["eos_token_id"] is None  # else the stock class would stop at an id of its own


def test_older_keys_alone_are_read_alike(spoiled):
    for name, drop in (("llama", ()), ("neox-partial", ("rope_theta",))):
        directory = spoiled(name)
        want = logits(GPT.from_pretrained(directory), tokens_for(61, 24))
        file = directory / "config.json"
        values = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("rope_parameters", *drop)}
        file.write_text(json.dumps(values))
        assert torch.equal(logits(GPT.from_pretrained(directory), tokens_for(61, 24)), want)
        assert (logits(load_stock(directory), tokens_for(61, 24)) - want).abs().max() <= TOLERANCE


def test_bfloat16_is_written_and_read_as_such(tmp_path):
    model = make_ours(OURS["llama-grouped-tied"])
    model.save_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "bf16/model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "bf16/config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in model.parameters()} == {torch.float32}

    half = GPT.from_pretrained(tmp_path / "bf16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.get_buffer("rotary_cos").dtype == torch.float32
    assert half.head.weight is half.embeddings.tokens.weight
    assert torch.get_default_dtype() == torch.float32
    stock = load_stock(tmp_path / "bf16")
    assert stock.dtype == torch.bfloat16
    tokens = tokens_for(61, 24)
    assert (logits(stock, tokens) - logits(half, tokens)).abs().mean() <= 0.05  # logits reach 5, where bf16 steps by 0.03

    full = GPT.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    assert torch.equal(full.get_parameter("blocks.0.attention.q.weight"), half.get_parameter("blocks.0.attention.q.weight").float())
    assert torch.equal(full.get_buffer("rotary_cos"), model.get_buffer("rotary_cos"))
    assert (logits(load_stock(tmp_path / "bf16", dtype=torch.float32), tokens) - logits(full, tokens)).abs().max() <= TOLERANCE

    half.save_pretrained(tmp_path / "again")
    assert all(torch.equal(t, tensors[key]) for key, t in load_file(tmp_path / "again/model.safetensors").items())


@pytest.mark.parametrize("name", ["gpt2-sinusoidal-scaled", "gpt2-no-positions", "neox-partial", "qwen3"])
def test_a_bfloat16_model_is_written_as_it_is(name, tmp_path):
    model = make_ours(OURS[name]).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert (logits(load_stock(tmp_path), tokens_for(61, 24)) - logits(model, tokens_for(61, 24))).abs().mean() <= 0.05


def test_shards_are_written_and_read(tmp_path, monkeypatch):
    model = make_ours(OURS["gpt2-untied-erf-no-bias"])
    model.save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    monkeypatch.setattr(huggingface, "MAX_SHARD_BYTES", 20_000)
    model.save_pretrained(tmp_path)

    assert not (tmp_path / "model.safetensors").exists()  # a left-over would be loaded in place of the shards
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    pieces = [load_file(file) for file in files]
    assert all(sum(t.nbytes for t in piece.values()) <= 20_000 for piece in pieces)
    joined = {key: t for piece in pieces for key, t in piece.items()}
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[key], whole[key]) for key in whole)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())

    tokens = tokens_for(61, 24)
    assert (logits(load_stock(tmp_path), tokens) - logits(model, tokens)).abs().max() <= TOLERANCE
    assert torch.equal(
        GPT.from_pretrained(tmp_path).get_parameter("blocks.1.feedforward.down.weight"),
        model.get_parameter("blocks.1.feedforward.down.weight"),
    )

    monkeypatch.undo()
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_model_can_be_saved_over_the_directory_it_came_from(spoiled):
    directory = spoiled("gpt2")
    model = GPT.from_pretrained(directory)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.get_parameter("blocks.0.attention.q.weight").zero_()
    model.save_pretrained(directory)
    again = dict(GPT.from_pretrained(directory).named_parameters())
    assert not again.pop("blocks.0.attention.q.weight").any()
    assert all(torch.equal(p, before[name]) for name, p in again.items())


def test_parameters_that_no_stock_class_holds_are_not_dropped_in_silence(tmp_path):
    model = make_ours({})
    model.get_submodule("blocks.0.attention.q").register_parameter("lora_a", nn.Parameter(torch.ones(2, 32)))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel cannot hold the parameter blocks\.0\.attention\.q\.lora_a"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "model").touch()
    with pytest.raises(ValueError, match="model is a file; give a directory"):
        make_ours({}).save_pretrained(tmp_path / "model")


def test_llama3_scaling_is_written_where_old_and_new_readers_look(tmp_path):
    for name in ("llama-3.1", "qwen2-scaled-rotation", "qwen3-scaled-rotation", "neox-scaled-rotation"):
        model = make_ours(OURS[name])
        model.save_pretrained(tmp_path / name)
        values = json.loads((tmp_path / name / "config.json").read_text())
        assert values["rope_scaling"] == HF_LLAMA3
        partial = {"partial_rotary_factor": 0.5} if name.startswith("neox") else {}
        assert values["rope_parameters"] == {**HF_LLAMA3, "rope_theta": 500.0, **partial}
        assert values["rope_theta"] == 500.0
        # as releases before 5 see it
        tokens = tokens_for(61, 24)
        want = logits(model.eval(), tokens)
        edit(tmp_path / name, rope_parameters=None)
        assert (logits(load_stock(tmp_path / name), tokens) - want).abs().max() <= TOLERANCE
        assert torch.equal(logits(GPT.from_pretrained(tmp_path / name), tokens), want)
        # and the scaling is what makes it so
        edit(tmp_path / name, rope_scaling=None)
        assert (logits(load_stock(tmp_path / name), tokens) - want).abs().max() > 0.01


def test_a_card_is_written_when_given(tmp_path):
    model = make_ours({})
    model.save_pretrained(tmp_path, card="# Größe\n")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "# Größe\n"
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "# Größe\n"


# A save that fails


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


class DiskFullError(Exception):
    pass


@pytest.mark.parametrize("fails_at", ["weights", "generation_config.json", "config.json", "tokenizer"])
def test_a_save_that_fails_leaves_what_was_there(fails_at, spoiled, tmp_path, monkeypatch):
    directory = spoiled("llama")
    before = snapshot(directory)
    monkeypatch.setattr(huggingface, "MAX_SHARD_BYTES", 20_000)
    save_file, write_json = huggingface.save_file, huggingface._write_json

    def failing_save_file(tensors, file, metadata):
        if fails_at == "weights" and "00002" in file.name:
            file.write_bytes(b"half")
            raise DiskFullError
        save_file(tensors, file, metadata)

    def failing_write_json(file, content):
        if file.name == fails_at:
            file.write_text("{")
            raise DiskFullError
        write_json(file, content)

    class FailingTokenizer:
        def __len__(self):
            return 3

        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("{")
            if fails_at == "tokenizer":
                raise DiskFullError

    monkeypatch.setattr(huggingface, "save_file", failing_save_file)
    monkeypatch.setattr(huggingface, "_write_json", failing_write_json)
    for target in (directory, tmp_path / "new"):
        with pytest.raises(DiskFullError):
            make_ours(OURS["qwen3"]).save_pretrained(target, tokenizer=FailingTokenizer(), card="card")
    assert snapshot(directory) == before
    assert not list((tmp_path / "new").iterdir())
    with pytest.raises(ValueError, match=r"has no config\.json"):
        GPT.from_pretrained(tmp_path / "new")


def test_a_full_disk_leaves_what_was_there(spoiled):
    directory = spoiled("llama")
    before = snapshot(directory)
    script = (
        "import resource, sys; from gpt import GPT, GPTConfig; import gpt.model.huggingface\n"
        "model = GPT(GPTConfig(vocab_size=61, context_length=24, n_layer=2, n_head=4, d_model=64))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: model.save_pretrained(sys.argv[1])\n"
        "except Exception as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(directory)], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert "File too large" in done.stdout
    assert snapshot(directory) == before


def test_a_save_that_is_killed_never_leaves_one_models_config_with_anothers_weights(saved, tmp_path, monkeypatch):
    old, new = GPT.from_pretrained(saved["qwen2"]), make_ours(OURS["qwen2"])
    with torch.no_grad():
        new.head.weight.add_(1.0)
    new.save_pretrained(tmp_path / "whole")
    wanted = [model.get_parameter("embeddings.tokens.weight") for model in (old, new)]
    monkeypatch.setattr(huggingface, "MAX_SHARD_BYTES", 20_000)
    names = ("replace", "unlink")
    real = {name: getattr(os, name) for name in names}
    outcomes = []
    for stops_at in range(40):
        directory = tmp_path / str(stops_at)
        shutil.copytree(saved["qwen2"], directory)
        count = 0

        def step(name, *args, stops_at=stops_at, **kwargs):
            nonlocal count
            if ".unfinished" in str(args[0]) and name == "unlink":
                return real[name](*args, **kwargs)  # not part of moving: what clears away
            count += 1
            if count > stops_at:
                raise DiskFullError
            return real[name](*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # killed: nothing is cleared away either
            for name in names:
                patch.setattr(os, name, functools.partial(step, name))
            try:
                new.save_pretrained(directory)
                whole = True
            except DiskFullError:
                whole = False
        if (directory / "config.json").exists():
            loaded = GPT.from_pretrained(directory).get_parameter("embeddings.tokens.weight")
            outcomes.append([torch.equal(loaded, w) for w in wanted].index(True))
        else:
            outcomes.append(None)
        if whole:
            break
        new.save_pretrained(directory)  # the next one succeeds, and clears what the killed one left
        assert not (directory / ".unfinished").exists()
    assert outcomes[0] == 0
    assert outcomes[-1] == 1
    assert set(outcomes[1:-1]) == {None}
    assert len(outcomes) > 5
