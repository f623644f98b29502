import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt.errors import UserError
from gpt.training.checkpoint import list_checkpoints
from gpt.training.metrics import read_metrics
from gpt.training.step import Step
from gpt.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_report")


def losses(run: Path) -> dict[int, float]:
    return {m["step"]: m["loss"] for m in read_metrics(run / "metrics.jsonl") if "loss" in m}


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(run / "checkpoints")[-1][1] / "model.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    assert losses(a) == losses(b)
    ours, theirs = final_weights(a), final_weights(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_batch_can_be_learned_by_heart(tiny_config, precision):
    config = tiny_config(
        "train.overfit=true", "schedule=constant", "schedule.warmup=5", "train.budget=120steps", "train.batch_tokens=256",
        f"precision={precision}", "model.d_model=128", "optimizer.lr=0.02",
    )  # fmt: skip
    run = Trainer(config).fit().run_directory
    assert losses(run)[120] < 0.05


def test_accumulated_micro_batches_equal_one_batch(tiny_config):
    runs = [
        Trainer(
            tiny_config(f"train.micro_batch={n}", f"run.id=micro{n}", "train.batch_tokens=1024", "train.budget=5steps", "optimizer=adamw")
        )
        .fit()
        .run_directory
        for n in (16, 4)
    ]
    # Muon's bf16 iteration magnifies the rounding of sums in another order; AdamW does not.
    for one, accumulated in zip(losses(runs[0]).values(), losses(runs[1]).values(), strict=True):
        assert accumulated == pytest.approx(one, abs=1e-6)


def test_gradients_of_accumulated_micro_batches_equal_one_batch(tiny_config, monkeypatch):
    gradients, update = [], Step._update

    def record(step, *arguments):
        gradients.append({name: p.grad.clone() for name, p in step.model.named_parameters()})
        update(step, *arguments)

    monkeypatch.setattr(Step, "_update", record)
    for n in (16, 4):
        Trainer(tiny_config(f"train.micro_batch={n}", f"run.id=gradients{n}", "train.batch_tokens=1024", "train.budget=1steps")).fit()
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, atol=1e-3, rtol=1e-5)  # sums over 1,024 tokens


def test_resume_is_bit_identical_with_dropout_across_an_epoch(tiny_config, tmp_path):
    """12 steps at once, against 5, a new process's worth of forgetting, and 7 more; an epoch ends at step 7."""
    settings = ["model.dropout=0.2", "train.budget=12steps", "checkpoint.every=5steps", "train.eval_every=4", "train.batch_tokens=16384"]
    settings += ["checkpoint.keep_last=9"]
    whole = Trainer(tiny_config(*settings, "run.id=whole"))
    assert whole.fit().exit_code == 0
    assert whole.batches.windows < 12 * whole.sequences, "the test must cross an epoch's border"
    run = tmp_path / "runs" / "whole"
    half = tmp_path / "runs" / "half"
    shutil.copytree(run, half)
    for step, path in list_checkpoints(half / "checkpoints"):
        if step > 5:
            shutil.rmtree(path)
    shutil.rmtree(half / "model")
    with (half / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # cut short by the kill
    torch.manual_seed(99)  # the process's own random state must not matter
    again = Trainer(tiny_config(*settings, "run.id=half"))
    assert again.fit().exit_code == 0
    assert_same_run(run, half)
    validations = [[m["val_loss"] for m in read_metrics(r / "metrics.jsonl") if "val_loss" in m] for r in (run, half)]
    assert len(validations[0]) == 3
    assert validations[0] == validations[1]


def test_a_signal_saves_and_the_run_goes_on_exactly(tiny_config, tmp_path):
    config = tiny_config("run.id=stopped", "train.budget=8steps", "model.dropout=0.1")
    trainer = Trainer(config)
    step = trainer._next_step

    def interrupt_at_three(stop):
        if trainer.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(stop)

    trainer._next_step = interrupt_at_three
    result = trainer.fit()
    assert result.exit_code == 143
    assert result.state.step == 3, "the step in which the signal came is left undone"
    assert Trainer(tiny_config("run.id=stopped", "train.budget=8steps", "model.dropout=0.1")).fit().exit_code == 0
    Trainer(tiny_config("run.id=undisturbed", "train.budget=8steps", "model.dropout=0.1")).fit()
    assert_same_run(tmp_path / "runs/stopped", tmp_path / "runs/undisturbed")


def test_steps_that_are_not_finite_are_skipped_and_counted(tiny_config):
    trainer = Trainer(tiny_config("train.budget=6steps"))
    set_up = trainer._set_up

    def set_up_poisoned():
        set_up()
        objective = trainer.step.objective
        trainer.step.objective = lambda *rows: objective(*rows) * (math.nan if trainer.state.step in (2, 3) else 1.0)

    trainer._set_up = set_up_poisoned
    trainer.fit()
    lines = [m for m in read_metrics(trainer.directory.metrics) if "skipped_steps" in m]
    assert [m["skipped_steps"] for m in lines] == [0, 0, 1, 2, 2, 2]
    assert math.isnan(lines[2]["loss"])
    assert math.isfinite(lines[5]["loss"])
    assert all(torch.isfinite(t).all() for t in final_weights(trainer.directory.path).values())


def test_divergence_stops_with_a_sentence_and_keeps_the_last_checkpoint(tiny_config):
    trainer = Trainer(tiny_config("train.budget=50steps", "checkpoint.every=2steps", "train.max_skipped_steps=3", "run.id=diverging"))
    step = trainer._next_step

    def poisoned(stop):
        if trainer.state.step == 4:
            trainer.model.embeddings.tokens.weight.data[:] = math.inf
        return step(stop)

    trainer._next_step = poisoned
    with pytest.raises(UserError, match=r"3 steps in a row up to step 7 .* last checkpoint is .*step-0000000\d.*optimizer\.lr"):
        trainer.fit()


@pytest.mark.parametrize(("budget", "steps"), [("3steps", 3), ("3", 3), ("1024tokens", 2), ("1300tokens", 3), ("0.5epochs", None)])
def test_budgets(tiny_config, budget, steps):
    trainer = Trainer(tiny_config(f"train.budget={budget}"))
    result = trainer.fit()
    assert result.state.step == (steps or math.ceil(0.5 * trainer.batches.windows / trainer.sequences))


def test_a_time_budget_ends_near_its_time(tiny_config):
    result = Trainer(tiny_config("train.budget=2s", "schedule=wsd")).fit()
    assert result.state.step > 3
    assert 2 <= result.state.seconds < 6


def test_a_run_directory_holds_what_the_contract_says(tiny_config, monkeypatch):
    monkeypatch.undo()  # with its report
    result = Trainer(tiny_config("train.eval_every=10")).fit()
    run = result.run_directory
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "report.html", "model/config.json", "model/model.safetensors"):
        assert (run / name).is_file(), name
    newest = list_checkpoints(run / "checkpoints")[-1][1]
    assert newest.name == "step-00000020"
    for name in ("model.safetensors", "optimizer", "state.json", "COMPLETE"):
        assert (newest / name).exists(), name
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu"} <= read_metrics(run / "metrics.jsonl")[0].keys()
    assert {"val_loss", "val_bpb"} <= next(m for m in read_metrics(run / "metrics.jsonl") if "val_loss" in m).keys()
    assert json.loads((run / "environment.json").read_text())["torch"].partition("+")[0] == torch.__version__.partition("+")[0]


def test_the_best_weights_are_exported_not_the_last(tiny_config):
    trainer = Trainer(tiny_config("train.budget=12steps", "train.eval_every=3"))
    step = trainer._next_step

    def spoil(stop):
        if trainer.state.step == 7:
            trainer.model.embeddings.tokens.weight.data.mul_(30)
        return step(stop)

    trainer._next_step = spoil
    result = trainer.fit()
    assert result.state.best_step == 6
    exported = load_file(result.run_directory / "model" / "model.safetensors")["model.embed_tokens.weight"]
    best = load_file(result.run_directory / f"checkpoints/step-{result.state.best_step:08d}" / "model.safetensors")
    assert torch.equal(exported, best["embeddings.tokens.weight"])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("model.n_layer=3", "model.n_layer=3"),
        ("seed=2", "seed=2"),
        ("optimizer=adamw", "optimizer.name=adamw"),
        ("data.holdout=0.2", "data.holdout"),
    ],
)
def test_resuming_with_a_changed_model_or_data_is_refused(tiny_config, changed, named):
    Trainer(tiny_config("run.id=r", "train.budget=2steps")).fit()
    with pytest.raises(UserError, match=f"{named}.*started with"):
        Trainer(tiny_config("run.id=r", "train.budget=4steps", changed)).fit()


def test_resuming_on_changed_text_is_refused(tiny_config, corpus):
    Trainer(tiny_config("run.id=r", "train.budget=2steps")).fit()
    file = sorted(corpus.iterdir())[0]
    before = file.read_text()
    try:
        file.write_text(before + "\nmore = 1\n")
        with pytest.raises(UserError, match="data: the text or its tokens are not those"):
            Trainer(tiny_config("run.id=r", "train.budget=4steps")).fit()
    finally:
        file.write_text(before)


def test_a_longer_budget_continues_a_finished_run(tiny_config):
    Trainer(tiny_config("run.id=r", "train.budget=2steps")).fit()
    assert Trainer(tiny_config("run.id=r", "train.budget=4steps")).fit().state.step == 4


def test_never_resume_refuses_an_existing_run(tiny_config):
    Trainer(tiny_config("run.id=r", "train.budget=1steps")).fit()
    with pytest.raises(UserError, match="resume=never"):
        Trainer(tiny_config("run.id=r", "train.budget=1steps", "resume=never")).fit()


def test_two_processes_cannot_share_a_run_directory(tiny_config):
    trainer = Trainer(tiny_config("run.id=r"))
    step = trainer._next_step

    def second_one(stop):
        with pytest.raises(UserError, match="another process"):
            Trainer(tiny_config("run.id=r")).fit()
        trainer._next_step = step
        return step(stop)

    trainer._next_step = second_one
    assert trainer.fit().exit_code == 0


def test_a_run_directory_that_cannot_be_written(tiny_config, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match=r"run\.dir=.*cannot write"):
        Trainer(tiny_config(f"run.dir={blocked}")).fit()


def test_vocabulary_of_the_model_smaller_than_the_tokenizers(tiny_config):
    with pytest.raises(UserError, match=r"model\.vocab_size=100 is smaller"):
        Trainer(tiny_config("model.vocab_size=100")).fit()


def test_a_warmup_longer_than_epochs_allow(tiny_config):
    with pytest.raises(UserError, match=r"schedule\.warmup=1000"):
        Trainer(tiny_config("train.budget=1epochs", "schedule.warmup=1000")).fit()


def test_the_device_that_is_not_there_is_refused(tiny_config):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"device=cuda: there is none here.*found: (cpu|neuron)"):
        Trainer(tiny_config("device=cuda")).fit()
