"""A model from whatever one can point at, and one sentence where there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from inference_models import make_run

from gpt.data.tokenizer_training import byte_tokenizer
from gpt.errors import UserError
from gpt.inference.loading import load_model


@torch.no_grad()
def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.fixture
def finished(tmp_path: Path, plain_folder: Path) -> Path:
    make_run(tmp_path / "run")
    shutil.copytree(plain_folder, tmp_path / "run" / "model")
    return tmp_path / "run"


class TestHuggingFaceDirectories:
    def test_the_weights_the_tokenizer_and_the_end(self, plain_folder):
        loaded = load_model(str(plain_folder))
        assert (loaded.run, loaded.end_ids) == (None, {byte_tokenizer().end_of_text})
        assert loaded.tokenizer.encode("né") == byte_tokenizer().encode("né")
        assert not loaded.model.training
        assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
        assert {p.dtype for p in load_model(str(plain_folder), dtype=torch.bfloat16).model.parameters()} == {torch.bfloat16}

    def test_every_id_that_its_files_call_an_end(self, chat_folder, tmp_path):
        assert load_model(str(chat_folder)).end_ids == {0, 258, 77}
        folder = Path(shutil.copytree(chat_folder, tmp_path / "copy"))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
        assert load_model(str(folder)).end_ids >= {258, 5}
        (folder / "generation_config.json").write_text(json.dumps({}))
        assert 77 not in load_model(str(folder)).end_ids

    def test_home_is_expanded(self, plain_folder, monkeypatch):
        monkeypatch.setenv("HOME", str(plain_folder.parent))
        assert load_model(f"~/{plain_folder.name}").model.config.vocab_size == 257


class TestRuns:
    def test_a_finished_run_is_its_model_folder(self, finished, plain_folder):
        expected = load_model(str(plain_folder)).model
        for path in (finished, finished / "model"):
            loaded = load_model(str(path))
            assert loaded.run == finished
            assert same(loaded.model, expected)

    def test_a_run_that_has_not_finished_is_its_newest_whole_checkpoint(self, tmp_path, capsys):
        models = make_run(tmp_path / "run")
        loaded = load_model(str(tmp_path / "run"))
        assert same(loaded.model, models[7])
        assert loaded.run == tmp_path / "run"
        assert not loaded.model.training
        assert loaded.end_ids == {0}
        assert "step-00000007" in capsys.readouterr().err
        (tmp_path / "run" / "checkpoints" / "step-00000007" / "COMPLETE").unlink()
        assert same(load_model(str(tmp_path / "run")).model, models[3])
        assert "is not whole" in capsys.readouterr().err

    def test_one_checkpoint_of_a_run_finished_or_not(self, finished, tmp_path):
        models = make_run(tmp_path / "other")
        for run in (finished, tmp_path / "other"):
            for step in (3, 7):
                loaded = load_model(str(run / "checkpoints" / f"step-{step:08d}"), dtype=torch.bfloat16)
                assert same(loaded.model, models[step].bfloat16())
                assert loaded.run == run

    def test_from_within_the_folder(self, finished, monkeypatch):
        checkpoint = finished / "checkpoints" / "step-00000003"
        monkeypatch.chdir(checkpoint)
        assert load_model(".").model.config.d_model == 16
        monkeypatch.chdir(finished)
        assert load_model(".").model.config.d_model == 32
        assert load_model("checkpoints/step-00000003").model.config.d_model == 16
        for hub_id in ("gpt2", "Qwen/Qwen3-0.6B"):  # not parts of the run
            with pytest.raises(UserError, match=rf"^model={hub_id}: .*hub"):
                load_model(hub_id)


class TestNothingThere:
    def sentence(self, path: Path | str, *parts: str, key: str = "model") -> None:
        with pytest.raises(UserError) as error:
            load_model(str(path), key=key)
        message = str(error.value)
        assert "\n" not in message
        for part in parts:
            assert part in message

    def test_no_such_directory(self, finished):
        self.sentence(finished.parent / "rum", f"model={finished.parent / 'rum'}", "no such directory", f"{finished}?")
        self.sentence(finished / "checkpoints" / "step-00000004", "no such directory", "step-0000000")
        self.sentence("runs/nothing", "run=runs/nothing", "no such directory", key="run")

    def test_a_folder_of_runs(self, finished):
        self.sentence(finished.parent, "this folder holds runs", str(finished), key="run")

    def test_only_the_name_of_the_directory_is_compared(self, finished):
        with pytest.raises(UserError, match=rf"there is no such directory\. There are, the newest first: {finished}$"):
            load_model(str(finished.parent / "zzzzz"))

    def test_the_id_of_a_run_alone(self, tmp_path, monkeypatch):
        make_run(tmp_path / "runs" / "mine")
        monkeypatch.chdir(tmp_path)
        self.sentence("mine", "model=mine", "hub", "Did you mean runs/mine?")

    def test_a_hub_id_without_the_hub(self):
        self.sentence("gpt2", "model=gpt2", "hub")
        self.sentence("Qwen/Qwen3-0.6B", "model=Qwen/Qwen3-0.6B", "hub")

    def test_an_empty_folder_and_a_file(self, tmp_path):
        self.sentence(tmp_path, "config.json")
        (tmp_path / "file").write_text("x")
        self.sentence(tmp_path / "file", "is a file")

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
    def test_a_file_missing(self, plain_folder, tmp_path, name):
        folder = Path(shutil.copytree(plain_folder, tmp_path / "copy"))
        (folder / name).unlink()
        self.sentence(folder, name.removesuffix(".json"))

    @pytest.mark.parametrize("content", ["{nope", "[]", "3"])
    def test_a_generation_config_that_is_none(self, plain_folder, tmp_path, content):
        folder = Path(shutil.copytree(plain_folder, tmp_path / "copy"))
        (folder / "generation_config.json").write_text(content)
        self.sentence(folder, "generation_config.json", "is not", "copy it again")

    def test_a_run_without_checkpoints(self, tmp_path):
        make_run(tmp_path / "run", steps=())
        self.sentence(tmp_path / "run", "neither a model/ folder nor a whole checkpoint")

    def test_a_checkpoint_that_is_damaged_or_none(self, tmp_path):
        make_run(tmp_path / "run")
        checkpoint = tmp_path / "run" / "checkpoints" / "step-00000007"
        weights = checkpoint / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        self.sentence(checkpoint, "model.safetensors is damaged")
        self.sentence(checkpoint.parent, "model=")
