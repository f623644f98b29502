"""What a run reads here becomes channels: the same files under the same names, each uploaded once."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from gpt.aws.inputs import CHANNELS
from gpt.aws.training_job import TrainingJob, plan_job
from gpt.config import RunConfig
from gpt.data.files import list_files
from gpt.errors import UserError
from tests.aws.request_builder import COMMIT, NOW, REGION, TOKEN, channels_of, container_config, job_config, planned


def plan(config: RunConfig) -> TrainingJob:
    return plan_job(config, NOW, TOKEN, REGION, COMMIT)


def laid_out(job: TrainingJob, root: Path) -> None:
    """The job's channels as its container has them."""
    for channel, uri in channels_of(job).items():
        for upload in job.uploads:
            if upload.uri.startswith(uri):
                path = root / channel / upload.uri.removeprefix(uri)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(upload.source if isinstance(upload.source, bytes) else upload.source.read_bytes())


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    for name in ("b.txt", "a.txt.gz", "deep/c d.txt", ".hidden", "deep/.git/x", "ü.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"this is {name}")
    return folder


@pytest.mark.parametrize("paths", ["{}", "{}/*.txt", "{}/b.txt", "{}/b.txt,{}", "{}/deep,{}/*", "{}/b.txt,{}/b.txt"])
def test_a_job_reads_the_files_of_a_run_here_in_their_order(books, tmp_path, paths):
    patterns = [path.format(books) for path in paths.split(",")]
    job = planned("data=text", f"data.paths=[{','.join(patterns)}]")
    laid_out(job, tmp_path / "there")
    there = container_config(job)["data"]["paths"]
    assert all(path.startswith(f"{CHANNELS}/train") for path in there)
    read = list_files([path.replace(CHANNELS, str(tmp_path / "there")) for path in there])
    here = list_files(patterns)
    assert [(file.name, Path(file.path).read_bytes()) for file in read] == [(file.name, Path(file.path).read_bytes()) for file in here]


def test_uploads_tell_what_is_in_them(books):
    job = planned("data=text", f"data.paths=[{books}]")
    for upload in job.uploads:
        content = upload.source if isinstance(upload.source, bytes) else upload.source.read_bytes()
        assert upload.size == len(content)
        assert upload.sha256 == hashlib.sha256(content).hexdigest()
    assert {upload.uri.rpartition("/")[2] for upload in job.uploads} >= {"b.txt", "a.txt.gz", "c d.txt", "ü.txt"}
    assert not [upload for upload in job.uploads if "hidden" in upload.uri or ".git" in upload.uri]


def test_inputs_lie_where_their_content_says_whatever_the_run(books):
    settings = ["data=text", f"data.paths=[{books}]"]
    before = channels_of(planned(*settings, "run.id=one"))
    assert channels_of(planned(*settings, "run.id=two", "seed=7")) == before
    (books / "b.txt").write_text("another")
    changed = channels_of(planned(*settings))
    assert changed != before
    (books / "b.txt").rename(books / "z.txt")
    assert channels_of(planned(*settings)) not in (before, changed)


def test_s3_uris_are_channels_and_other_urls_are_left_to_the_run():
    paths = "s3://corpora/books,s3://corpora/one.txt,https://example.com/a.txt,s3://corpora/v1.2/"
    job = planned("data=text", f"data.paths=[{paths}]")
    assert channels_of(job) == {"train.1": "s3://corpora/books/", "train.2": "s3://corpora/one.txt", "train.4": "s3://corpora/v1.2/"}
    assert container_config(job)["data"]["paths"] == [
        f"{CHANNELS}/train.1", f"{CHANNELS}/train.2", "https://example.com/a.txt", f"{CHANNELS}/train.4",
    ]  # fmt: skip


def test_channels_that_are_given_become_paths_where_they_are_called_train(books):
    job = planned(
        "data=text", "data.paths=[channel://notes/a.txt]", "launch.channels={train: s3://corpora/x, train.de: s3://corpora/de/}",
        f"launch.channels.notes={books}",
    )  # fmt: skip
    assert container_config(job)["data"]["paths"] == [f"{CHANNELS}/{name}" for name in ("notes/a.txt", "train", "train.de")]
    assert channels_of(job).keys() == {"train", "train.de", "notes"}


def test_parts_of_a_mixture_have_channels_of_their_own(books):
    parts = f"[{{source: text, paths: [{books}/b.txt]}}, {{source: text, paths: [{books}/deep, s3://corpora/x]}}, {{source: stdlib}}]"
    job = planned("data=mixture", f"data.parts={parts}".replace("s3://corpora/x", "'s3://corpora/x'").replace(str(books), f"{books}"))
    assert channels_of(job).keys() == {"part0", "part1.1", "part1.2"}
    inside = container_config(job)["data"]["parts"]
    assert [part["paths"] for part in inside] == [[f"{CHANNELS}/part0"], [f"{CHANNELS}/part1.1", f"{CHANNELS}/part1.2"], []]


def test_a_dataset_here_keeps_its_name(tmp_path):
    (tmp_path / "tales").mkdir()
    (tmp_path / "tales" / "rows.jsonl").write_text('{"text": "a"}')
    job = planned("data=hf", f"data.name={tmp_path / 'tales'}")
    assert container_config(job)["data"]["name"] == f"{CHANNELS}/dataset/tales"
    assert any(upload.uri.endswith("/tales/rows.jsonl") for upload in job.uploads)
    assert container_config(planned("data=hf", "data.name=roneneldan/TinyStories"))["data"]["name"] == "roneneldan/TinyStories"


# Weights and tokenizers


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What a Hugging Face folder of a model holds, as far as names go."""
    folder = tmp_path / "model"
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "pytorch_model.bin",
        "onnx/model.onnx",
        ".x",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def test_weights_go_with_their_tokenizer_once(model):
    config = replace(job_config(), init=str(model))
    config.tokenizer.name, config.tokenizer.path = "pretrained", str(model)
    job = plan(config)
    inside = container_config(job)
    assert inside["init"] == f"{CHANNELS}/init"
    assert inside["tokenizer"]["path"] == f"{CHANNELS}/init/tokenizer.json"
    assert channels_of(job).keys() == {"init"}
    names = [upload.uri.rpartition("/")[2] for upload in job.uploads if "/inputs/" in upload.uri]
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert "pytorch_model.bin" in str(plan(replace(config, allow_pickle=True)).uploads)


def test_a_run_is_shipped_as_its_model(model, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 1")
    model.rename(run / "model")
    config = replace(job_config(), init=str(run), adapt_tokenizer=str(run))
    config.distill.teacher = "org/teacher"
    job = plan(config)
    inside = container_config(job)
    assert inside["init"] == f"{CHANNELS}/init"
    assert inside["adapt_tokenizer"] == f"{CHANNELS}/init/tokenizer.json"
    assert inside["distill"]["teacher"] == "org/teacher"
    assert not any("config.yaml" in upload.uri for upload in job.uploads)


def test_an_unfinished_run_is_shipped_as_its_newest_whole_checkpoint(tmp_path):
    run = tmp_path / "run"
    for name in ("config.yaml", "tokenizer.json", *(f"checkpoints/step-0000000{n}/{f}" for n in (1, 2, 3) for f in ("COMPLETE", "w"))):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    (run / "checkpoints" / "step-00000003" / "COMPLETE").unlink()
    job = plan(replace(job_config(), init=str(run)))
    names = [upload.uri.split("/", 6)[6] for upload in job.uploads if "/inputs/" in upload.uri]
    assert names == ["checkpoints/step-00000002/COMPLETE", "checkpoints/step-00000002/w", "config.yaml", "tokenizer.json"]
    assert container_config(job)["init"] == f"{CHANNELS}/init"
    named = plan(replace(job_config(), init=str(run / "checkpoints" / "step-00000001")))
    assert container_config(named)["init"] == f"{CHANNELS}/init/checkpoints/step-00000001"
    assert any(upload.uri.endswith("/config.yaml") for upload in named.uploads)


def test_a_tokenizer_goes_with_what_is_read_beside_it(model):
    config = job_config()
    config.tokenizer.name, config.tokenizer.path = "pretrained", str(model / "tokenizer.json")
    job = plan(config)
    assert container_config(job)["tokenizer"]["path"] == f"{CHANNELS}/tokenizer/tokenizer.json"
    names = [upload.uri.rpartition("/")[2] for upload in job.uploads if "/inputs/" in upload.uri]
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    config.tokenizer.path = "org/tokenizer"
    assert container_config(plan(config))["tokenizer"]["path"] == "org/tokenizer"


def test_links_are_followed(model, tmp_path):
    linked = tmp_path / "linked"  # as the hub's cache has its files
    linked.mkdir()
    for file in model.glob("*.*"):
        (linked / file.name).symlink_to(file)
    assert channels_of(plan(replace(job_config(), init=str(linked)))) == channels_of(plan(replace(job_config(), init=str(model))))


# What cannot be shipped


def test_what_is_not_there_or_cannot_be_shipped_is_said_by_its_key(books, model, tmp_path, monkeypatch):
    def said(config: RunConfig) -> str:
        with pytest.raises(UserError) as error:
            plan(config)
        return str(error.value)

    def of(*settings: str) -> str:
        return said(job_config(*settings))

    empty = tmp_path / "empty"
    empty.mkdir()
    text = "data=text"
    assert of(text, f"data.paths=[{books}/none.txt]").startswith("data.paths: no file matches")
    assert of(text, f"data.paths=[{empty}]") == f"data.paths: the folder '{empty}' has no files in it"
    assert of(text, "data.paths=['s3://corpora/*.txt']").startswith("data.paths=s3://corpora/*.txt: a channel takes a folder")
    assert "no channel 'book'. Did you mean books?" in of(text, "data.paths=[channel://book]", "launch.channels.books=s3://corpora/b")
    assert of(f"launch.channels.x={empty}") == f"launch.channels.x: the folder '{empty}' has no files in it"
    assert of("launch.channels.x=https://example.com/x").startswith(
        "launch.channels.x=https://example.com/x: an input channel comes from S3"
    )
    assert of("launch.channels.code=s3://corpora/x").startswith("launch.channels.code: the channel code is that of the code")
    several = of(text, f"data.paths=[{books}/b.txt]", "launch.channels={train.1: s3://corpora/x}")
    assert several.startswith("data.paths: the channel train.1 is taken by another input")
    assert said(replace(job_config(), init=str(empty))).startswith(f"init={empty}: there is no config.json in {empty}")
    (empty / "config.yaml").write_text("seed: 1")
    assert said(replace(job_config(), init=str(empty))).startswith(f"init={empty}: the run has neither a model/ folder nor a whole")
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(books)}))
    assert f"changes {books}, a folder of this machine" in said(replace(job_config(), init=str(model)))
    config = job_config()
    config.tokenizer.name, config.tokenizer.path = "pretrained", str(books)
    assert said(config).startswith(f"tokenizer.path={books}: there is no tokenizer at {books}/tokenizer.json")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(tmp_path / "gone")
    (model / "adapter_config.json").unlink()
    assert said(replace(job_config(), init=str(model))) == f"init: {model / 'model.safetensors'} cannot be read: No such file or directory"


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_that_is_not_utf8_has_the_name_there_that_it_is_called_by_here(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    job = planned("data=text", f"data.paths=[{tmp_path}]")
    (called,) = [file.name for file in list_files([str(tmp_path)])]
    assert job.uploads[-1].uri.endswith(f"/{called}")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="everything can be read by this user")
def test_a_file_that_cannot_be_read(books):
    (books / "b.txt").chmod(0)
    with pytest.raises(UserError, match=r"data\.paths: .*b\.txt cannot be read: Permission denied"):
        planned("data=text", f"data.paths=[{books}]")
