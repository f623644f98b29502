import json
import math
import shutil

import pytest
import torch
import yaml
from torch import nn

from gpt.commands import EvaluateConfig
from gpt.config import RunConfig
from gpt.data.config import DataConfig
from gpt.data.tokenizer import load_tokenizer
from gpt.data.tokenizer_training import byte_tokenizer
from gpt.errors import UserError
from gpt.evaluation import command
from gpt.evaluation.command import evaluate
from gpt.model.transformer import GPT
from tests.evaluation.conftest import CONTEXT

TEXT = "".join(f"line {n}: größer\n" for n in range(12))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def config_of(folder, file, **settings) -> EvaluateConfig:
    config = EvaluateConfig(
        model=str(folder), data=DataConfig(source="text", paths=[str(file)]), device="cpu", precision="fp32", **settings
    )
    config.validate()
    return config


def bits(folder, stride: int, count: int | None = None) -> tuple[float, int, int]:
    """Of TEXT, in fp64: bits, tokens and bytes. The ids of a byte tokenizer are the bytes, whose first has 256 ids before it."""
    model, tokenizer = GPT.from_pretrained(folder).double().eval(), load_tokenizer(folder)
    ids = torch.tensor([tokenizer.end_of_text, *tokenizer.encode(TEXT)])[: None if count is None else count + 1]
    total = 0.0
    for place in range(1, len(ids)):
        start = max(0, math.ceil((place - CONTEXT) / stride)) * stride
        with torch.no_grad():
            total -= model(ids[None, start:place])[0, -1].softmax(-1)[ids[place]].log2().item()
    return total, len(ids) - 1, len(ids) - 1


@pytest.mark.parametrize("settings", [{}, {"stride": 5}, {"stride": CONTEXT}, {"max_tokens": 100}, {"batch": 1}])
def test_the_figures_are_those_of_a_plain_loop(folder, file, tmp_path, capsys, settings):
    output = tmp_path / "figures.json"
    assert evaluate(config_of(folder, file, output=str(output), **settings)) == 0
    total, tokens, n_bytes = bits(folder, settings.get("stride", CONTEXT // 2), settings.get("max_tokens"))
    found = json.loads(output.read_text())
    assert found["bits_per_byte"] == pytest.approx(total / n_bytes, abs=1e-4)
    assert found["loss"] == pytest.approx(total * math.log(2) / tokens, abs=1e-4)
    assert found["perplexity"] == pytest.approx(2 ** (total / tokens), rel=1e-4)
    assert (found["tokens"], found["bytes"], found["documents"]) == (tokens, n_bytes, 1)
    assert found["stride"] == settings.get("stride", CONTEXT // 2)
    assert found["context_length"] == found["model"]["context_length"] == CONTEXT
    assert found["model"]["path"] == str(folder)
    assert found["data"] == {"source": "text", "paths": [str(file)], "part": "all"}
    assert found["versions"].keys() == {"gpt", "torch", "python"}
    assert found["compressed_bits_per_byte"].keys() == {"gzip -9", "xz -9e"}
    printed, err = capsys.readouterr()
    assert f"{found['loss']:.4f} nats" in printed
    assert f"bits per byte  {found['bits_per_byte']:.4f}" in printed
    assert err == ""  # no bar where there is no terminal


def test_windows_shorter_than_the_model_s(folder, file, tmp_path):
    losses = []
    for length in (6, 0):
        output = tmp_path / f"{length}.json"
        evaluate(config_of(folder, file, context_length=length, output=str(output)))
        losses.append(json.loads(output.read_text())["loss"])
    assert losses[0] != losses[1]


def test_a_long_window_is_said(folder, file, capsys, monkeypatch):
    monkeypatch.setattr(command, "_LONG", CONTEXT - 1)
    evaluate(config_of(folder, file))
    assert f"windows of {CONTEXT} tokens, all that the model can read" in capsys.readouterr().err
    evaluate(config_of(folder, file, context_length=CONTEXT))
    assert capsys.readouterr().err == ""


def test_what_is_held_out_of_few_files_is_said(folder, file, capsys):
    evaluate(config_of(folder, file, part="held_out"))
    out, err = capsys.readouterr()
    assert "held out" in out
    assert "the end of each is held out" in err


def test_int8_is_set_against_the_weights_as_they_are(folder, file, tmp_path, capsys):
    pytest.importorskip("torchao")
    output = tmp_path / "figures.json"
    evaluate(config_of(folder, file, quantize="int8", output=str(output)))
    found = json.loads(output.read_text())
    total, tokens, _ = bits(folder, CONTEXT // 2)
    assert found["loss"] == pytest.approx(total * math.log(2) / tokens, abs=1e-4)  # of the weights as they are
    difference = found["int8"]["loss"] - found["loss"]
    assert 0 < abs(difference) < 0.2
    assert found["int8"]["loss_difference"] == pytest.approx(difference)
    printed = capsys.readouterr().out
    assert (
        f"loss {found['loss']:.4f} -> {found['int8']['loss']:.4f}, {difference:+.4f} ({100 * difference / found['loss']:+.2f} %)" in printed
    )


def test_a_head_of_another_kind_is_asked(folder, file, tmp_path, monkeypatch):
    """Quantising replaces the head by a module that has no weight of the usual kind."""

    class Head(nn.Module):
        def forward(self, x):
            return torch.zeros(*x.shape[:-1], 257)

    def quantize(model):
        assert isinstance(model.head, nn.Linear)
        model.head = Head()

    monkeypatch.setattr("gpt.inference.quantize.quantize_int8", quantize)
    output = tmp_path / "figures.json"
    evaluate(config_of(folder, file, quantize="int8", output=str(output)))
    assert json.loads(output.read_text())["int8"]["loss"] == pytest.approx(math.log(257), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": CONTEXT + 1}, f"stride={CONTEXT + 1} must be at most the {CONTEXT} tokens of a window"),
        ({"context_length": 999}, f"context_length=999: the model reads at most {CONTEXT} tokens"),
        ({"output": "/nowhere/figures.json"}, "output=/nowhere/figures.json: cannot write to the folder /nowhere"),
        ({"output": "/"}, "output=/: is a folder"),
    ],
)
def test_settings_that_do_not_go_with_the_model(folder, file, settings, message):
    with pytest.raises(UserError) as error:
        evaluate(config_of(folder, file, **settings))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_things(folder, file, tmp_path):
    with pytest.raises(UserError, match=r"data\.paths: no file matches .*Did you mean text\.txt"):
        evaluate(config_of(folder, tmp_path / "txt.txt"))
    with pytest.raises(UserError, match=r"model=.*: there is no such directory"):
        evaluate(config_of(tmp_path / "nowhere", file))


def test_damaged_weights(folder, file, tmp_path):
    model = GPT.from_pretrained(folder)
    with torch.no_grad():
        model.final_norm.weight[0] = math.nan
    model.save_pretrained(tmp_path / "damaged", tokenizer=byte_tokenizer())
    with pytest.raises(UserError, match=r"model=.*damaged: its loss is nan"):
        evaluate(config_of(tmp_path / "damaged", file))


@pytest.mark.parametrize("part_of_it", ["", "model"])
def test_a_run_is_measured_on_what_it_held_out(folder, file, tmp_path, part_of_it):
    """What the command line makes of `model=<run>` alone."""
    from gpt.compose import compose_use

    run = tmp_path / "run"
    shutil.copytree(folder, run / "model")
    values = RunConfig(data=DataConfig(source="text", paths=[str(file)], holdout=0.3)).to_dict()
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    output = tmp_path / "figures.json"
    assert evaluate(compose_use("evaluate", [f"model={run / part_of_it}", "precision=fp32", f"output={output}"])) == 0
    found = json.loads(output.read_text())
    assert found["data"]["part"] == "held_out"
    assert 0.15 < found["bytes"] / len(TEXT.encode()) < 0.35
