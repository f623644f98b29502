import math
import statistics
import string
import time

import pytest
import torch
import yaml

from gpt.compose import compose_run, load_run
from gpt.config import RunConfig
from gpt.data.batches import Batch
from gpt.data.loader import RowBatches
from gpt.errors import UserError
from gpt.training.data import open_training_data
from gpt.training.metrics import read_metrics
from gpt.training.trainer import Trainer
from tests.training.finetuning import SUMS, finetune_config, save_small_model, stop_in_the_middle, write_rows
from tests.training.test_trainer import assert_same_run, losses

T = 64  # of debug=golden


@pytest.fixture
def texts(tmp_path):
    """Two folders of text that no letter is shared by."""
    for name, letters in (("low", string.ascii_lowercase), ("high", string.ascii_uppercase)):
        (tmp_path / name).mkdir()
        for n in range(30):
            (tmp_path / name / f"{n}.txt").write_text(" ".join(letters[(i * i + n) % 26] * (1 + i % 5) for i in range(150)))
    return tmp_path


@pytest.fixture
def small(tmp_path, texts, cache_dir):
    """Composes a small pretraining run on one of the kinds of data; `rows` and further overrides."""
    rows = write_rows(tmp_path / "documents.jsonl", ({"body": (texts / "low" / f"{n % 30}.txt").read_text() + str(n)} for n in range(60)))
    parts = f"[{{source: text, paths: ['{texts / 'low'}'], weight: 3}}, {{source: text, paths: ['{texts / 'high'}'], weight: 1}}]"
    kinds = {
        "text": ["data=text", f"data.paths=[{texts / 'low'}]"],
        "jsonl": ["data=jsonl", f"data.paths=[{rows}]", "data.fields.text=body"],
        "mixture": ["data=mixture", f"data.parts={parts}"],
    }
    places = [f"data.cache_dir={cache_dir}", f"run.dir={tmp_path / 'runs'}"]
    settings = [
        "train.batch_tokens=512",
        "train.eval_tokens=256",
        "train.final_eval_tokens=256",
        "train.sample_prompts=[a]",
        "train.sample_tokens=2",
    ]

    def compose(kind: str, *overrides: str) -> RunConfig:
        return compose_run("pretrain", ["debug=golden", "train.eval_every=0", *settings, *kinds[kind], *places, *overrides])

    return compose


def config_of_kind(kind: str, small, tmp_path, *overrides: str) -> RunConfig:
    """A run on what is named first, with what is named after it."""
    source, *settings = kind.split()
    if source == "examples":
        rows = write_rows(tmp_path / "rows.jsonl", SUMS)
        init = tmp_path / "init"
        return finetune_config(tmp_path, init if init.is_dir() else save_small_model(init), rows, *settings, *overrides)
    return small(source, *settings, *overrides)


@pytest.fixture
def nothing_left(monkeypatch):
    """Runs end without a model folder and a report, which take longer than the run."""
    monkeypatch.setattr("gpt.training.trainer.write_results", lambda *_: None)


KINDS = [
    "examples data.packing=none",
    "mixture",
    "text data.document_mask=true",
    "text data.streaming=true tokenizer=bpe tokenizer.vocab_size=300",
    "jsonl data.streaming=true data.document_mask=true",
    "mixture data.streaming=true",
]


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_exactly(kind, small, tmp_path):
    """7 steps at once; or 2, and more budget, a signal in the middle of step 5, and the rest."""

    def config(run: str, steps: int) -> RunConfig:
        settings = ["train.micro_batch=2", "schedule=constant", "model.dropout=0.1", "train.batch_tokens=512", "optimizer.lr=0.01"]
        return config_of_kind(kind, small, tmp_path, f"run.id={run}", f"train.budget={steps}steps", *settings)

    assert Trainer(config("whole", 7)).fit().exit_code == 0
    assert Trainer(config("parts", 2)).fit().state.step == 2
    second = Trainer(config("parts", 7))
    result = stop_in_the_middle(second, 4)
    assert (result.exit_code, result.state.step) == (143, 4)
    assert Trainer(config("parts", 7)).fit().exit_code == 0
    assert len(losses(tmp_path / "runs/whole")) == 7
    assert_same_run(tmp_path / "runs/whole", tmp_path / "runs/parts")


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_document_mask_changes_what_is_seen_and_not_what_is_learned(small, streaming):
    stream = f"data.streaming={str(streaming).lower()}"
    # Documents of about 500 bytes: many windows of a batch hold two.
    runs = [
        Trainer(small("text", stream, "train.budget=2steps", "train.batch_tokens=4096", f"data.document_mask={mask}", f"run.id={mask}"))
        for mask in ("false", "true")
    ]
    first = [losses(run.fit().run_directory) for run in runs]
    assert first[0] != first[1]
    assert first[0][1] == pytest.approx(first[1][1], abs=0.05)
    if not streaming:
        without, masked = (run.data.batches.batch(0) for run in runs)
        assert (without.tokens == masked.tokens).all()
        assert (without.targets == masked.targets).all()
        assert without.documents is None
        assert masked.documents is not None
        assert ((masked.tokens[:, 1:] == runs[0].data.tokenizer.end_of_text) == (masked.documents.diff(dim=1) == 1)).all()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("settings", [["data.document_mask=true"], ["data.streaming=true"]])
def test_one_batch_can_be_learned_by_heart(small, settings):
    learning = ["train.overfit=true", "schedule=constant", "train.budget=60steps", "train.batch_tokens=128", "optimizer.lr=0.02"]
    run = Trainer(small("text", *settings, *learning)).fit().run_directory
    assert losses(run)[60] < 0.1 * losses(run)[1]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_parts_are_drawn_by_their_weights(small, streaming):
    """Of the 1024 rows of a block exactly; and both are measured."""
    config = small("mixture", f"data.streaming={streaming}", "train.final_eval_tokens=4096")
    data = open_training_data(config, 64, lambda _: None)

    def parts(rows: torch.Tensor) -> list[str]:
        return ["low" if data.tokenizer.decode(row.tolist()).strip().islower() else "high" for row in rows]

    drawn = [part for step in range(16) for part in parts(data.batches.batch(step).targets)]
    assert (drawn.count("low"), drawn.count("high")) == (768, 256)
    assert "low" in drawn[:20]
    assert "high" in drawn[:20]
    assert {part for batch in data.held_out(1, 4096) for part in parts(batch.targets)} == {"low", "high"}


def test_a_stream_has_no_epochs(small):
    with pytest.raises(UserError, match=r"train\.budget=2epochs: how long a stream is is not known; give steps, tokens or a time"):
        Trainer(small("text", "data.streaming=true", "train.budget=2epochs")).fit()


def test_a_stream_leaves_what_any_run_leaves(small):
    run = Trainer(small("jsonl", "data.streaming=true", "train.budget=2steps", "train.sample_prompts=[]")).fit().run_directory
    manifest = yaml.safe_load((run / "model" / "data_manifest.json").read_text())
    assert manifest["sources"][0]["streamed"] is True
    assert (run / "report.html").read_text().count('class="sample"') >= 1
    assert read_metrics(run / "metrics.jsonl")[0]["epoch"] is None


@pytest.mark.usefixtures("nothing_left")
def test_other_text_under_the_same_streaming_run_is_refused(small, texts):
    """Its ids are not known beforehand, and the byte tokenizer is the same for any text."""
    config = small("text", "data.streaming=true", "run.id=r", "train.budget=1steps")
    Trainer(config).fit()
    (texts / "low" / "0.txt").write_text("something else " * 40)
    with pytest.raises(UserError, match="data: the text or its tokens are not those"):
        Trainer(small("text", "data.streaming=true", "run.id=r", "train.budget=2steps")).fit()


@pytest.mark.usefixtures("nothing_left")
def test_a_stream_moved_to_another_place_goes_on(small, texts, tmp_path):
    Trainer(small("text", "data.streaming=true", "run.id=r", "train.budget=1steps")).fit()
    (texts / "low").rename(tmp_path / "moved")
    config = small("text", "data.streaming=true", "run.id=r", "train.budget=2steps", f"data.paths=[{tmp_path / 'moved'}]")
    assert Trainer(config).fit().state.step == 2


@pytest.mark.parametrize("name", ["text", "mixture"])
def test_too_little_held_out_of_a_stream(small, name, texts):
    for file in texts.glob("*/*.txt"):
        file.write_text(file.read_text()[:20])
    with pytest.raises(UserError, match=r"held-out text of text.* fewer than model\.context_length=64 and one more"):
        Trainer(small(name, "data.streaming=true")).fit()


@pytest.mark.usefixtures("nothing_left")
def test_a_mixture_streams_with_the_least_validation_that_there_is(small):
    """So many held-out tokens as one row has, which its parts have to share."""
    settings = [f"train.eval_tokens={T}", f"train.final_eval_tokens={T}", "train.budget=1steps"]
    assert Trainer(small("mixture", "data.streaming=true", *settings)).fit().held_out is not None


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("kind", ["text", "mixture data.streaming=true", "examples"])
def test_the_share_of_waiting_is_told(kind, small, tmp_path):
    run = Trainer(config_of_kind(kind, small, tmp_path, "train.budget=20steps", "train.log_every=1")).fit().run_directory
    waits = [line["data_wait"] for line in read_metrics(run / "metrics.jsonl") if "data_wait" in line]
    assert len(waits) == 20
    assert all(0 <= wait <= 1 for wait in waits)
    assert statistics.median(waits) < 0.02


@pytest.mark.usefixtures("nothing_left")
def test_the_wait_for_the_first_batch_does_not_count_where_the_first_step_does_not(small, monkeypatch):
    """The time of a process's first step is left out; a stream that fills its buffer then must not count as many times the rest."""
    batch = RowBatches.batch

    def slow(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        time.sleep(1.0 if step == 0 else 0.0)
        return batch(self, step, rank, world)

    monkeypatch.setattr(RowBatches, "batch", slow)
    run = Trainer(small("text", "train.budget=10steps", "train.log_every=5")).fit().run_directory
    waits = [line["data_wait"] for line in read_metrics(run / "metrics.jsonl") if "data_wait" in line]
    assert len(waits) == 2
    assert max(waits) < 0.5


NEW_KEYS = {
    "data": ["name", "config", "split", "fields", "licence", "parts", "streaming", "deduplicate", "min_characters", "redact", "format",
             "labels", "too_long", "packing", "document_mask", "workers", "memory_mb"],
    "tokenizer": ["split", "special_tokens"],
    "train": ["sequence_length"],
}  # fmt: skip


@pytest.mark.usefixtures("nothing_left")
def test_a_run_from_before_these_keys_goes_on(small, tmp_path):
    run = Trainer(small("text", "run.id=old", "train.budget=2steps")).fit().run_directory
    values = yaml.safe_load((run / "config.yaml").read_text())
    for section, names in NEW_KEYS.items():
        for name in names:
            del values[section][name]
    del values["loss_on"]
    values["data"]["on_error"] = "skip"  # as it always was
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert load_run(run).data.packing == "best_fit"
    assert math.isfinite(losses(run)[2])
    config = compose_run("pretrain", [f"resume={run}", "train.budget=4steps"])
    assert Trainer(config).fit().state.step == 4
