"""Loss spikes: what counts as one, and what `train.spike` does about it."""

import contextlib
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt.config import RunConfig
from gpt.runtime.cpu import Cpu
from gpt.training import results
from gpt.training.checkpoint import TrainingState, list_checkpoints, read_state
from gpt.training.metrics import read_metrics
from gpt.training.step import SPIKE_AFTER, SPIKE_DECAY, SPIKE_DEVIATIONS, SPIKE_SHARE, Counts
from gpt.training.trainer import Trainer
from tests.processes import run_together
from tests.training.test_trainer import assert_same_run, final_weights, losses

AT, STEPS = 40, 56
SETTINGS = [f"train.budget={STEPS}steps", "checkpoint.every=8steps", "train.batch_tokens=256", "model.dropout=0.1", "train.ema=0.9"]


pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def config_of(tiny_config) -> Callable[..., RunConfig]:
    return lambda *overrides: tiny_config(*SETTINGS, *overrides)


class Killed(BaseException):
    """Ends a run in the middle of a step: what was not on disk is lost."""


def train(config: RunConfig, factors: dict[int, float], kill_at: int | None = None) -> Trainer:
    """Train with the losses of some batches multiplied, until batch `kill_at`."""
    trainer = Trainer(config)
    set_up = trainer._set_up

    def set_up_with_spikes() -> None:
        set_up()

        def spike(objective: torch.nn.Module, rows: tuple[torch.Tensor, ...], loss: torch.Tensor) -> torch.Tensor:
            if trainer.state.batch == kill_at:
                raise Killed
            return loss * factors.get(trainer.state.batch, 1.0) if objective.training else loss

        trainer.step.objective.register_forward_hook(spike)

    trainer._set_up = set_up_with_spikes
    with contextlib.suppress(Killed):
        trainer.fit()
    return trainer


def column(trainer: Trainer, key: str) -> list[float]:
    return [line[key] for line in read_metrics(trainer.directory.metrics) if key in line]


# What a spike is


def plain_spikes(values: list[float]) -> list[bool]:
    """The rule of docs/reliability.md, number by number."""
    found, mean, variance, count = [], 0.0, 0.0, 0
    for loss in values:
        found.append(count >= SPIKE_AFTER and loss > mean + max(SPIKE_DEVIATIONS * math.sqrt(variance), SPIKE_SHARE * mean))
        if math.isfinite(loss):
            weight = 1 - SPIKE_DECAY if count else 1.0
            variance = (1 - weight) * (variance + weight * (loss - mean) ** 2)
            mean += weight * (loss - mean)
            count += 1
    return found


def counted_spikes(values: list[float]) -> list[bool]:
    counts, one = Counts(TrainingState(), Cpu("CPU", torch.float32)), torch.ones(())
    found = []
    for value in values:
        loss = torch.tensor(value, dtype=torch.float64)
        found.append(bool(counts.is_spike(loss)))
        counts.add(loss, one, one, torch.tensor(found[-1]))
    state = TrainingState()
    counts.store(state)
    assert state.spikes == sum(found)
    return found


def test_a_spike_is_told_by_the_rule_that_is_written_down():
    chance = random.Random(0)
    values = [5 * 0.99**step + chance.gauss(0, 0.1) for step in range(300)]
    for step, value in {10: 6.0, 60: math.nan, 61: math.inf, 100: 9.0, 101: 9.0, 200: 3.0, 250: 30.0}.items():
        values[step] = value
    found = counted_spikes(values)
    assert found == plain_spikes(values)
    assert [step for step, is_spike in enumerate(found) if is_spike] == [61, 100, 250], "an infinite loss is left out in any case"


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
def test_noise_a_falling_loss_and_a_harder_text_are_no_spikes(noise):
    chance = random.Random(1)
    for start, floor in ((9.0, 3.0), (4.0, 0.01)):
        values = [floor + (start - floor) * math.exp(-step / 300) + abs(chance.gauss(0, noise)) for step in range(2000)]
        values[1000:] = [value + max(0.05 * value, 2 * noise) for value in values[1000:]]
        assert not any(counted_spikes(values))


def test_a_noisy_run_has_no_spike(tiny_config):
    """300 steps of four short sequences each, at a high rate."""
    config = tiny_config("train.budget=300steps", "train.batch_tokens=256", "train.spike=skip", "optimizer.lr=0.03", "schedule=constant")
    trainer = train(config, {})
    assert (trainer.state.spikes, trainer.state.skipped_steps) == (0, 0)
    noise = torch.tensor(column(trainer, "loss")[100:])
    assert noise.std() > 0.05, "the test is to have noise"


# What is done about one


def test_none_trains_on_it_and_counts_it(config_of):
    calm, spiked = train(config_of("run.id=calm"), {}), train(config_of("run.id=spiked"), {AT: 50.0})
    assert (spiked.state.spikes, spiked.state.skipped_steps, spiked.state.rewinds) == (1, 0, 0)
    assert column(spiked, "spikes") == [0] * AT + [1] * (STEPS - AT)
    one, other = final_weights(calm.directory.path), final_weights(spiked.directory.path)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_skip_is_as_if_the_batch_had_been_left_out(config_of):
    """A step that is not finite is left out in any case: the two runs must end alike, averages included."""
    left_out, skipped = train(config_of("run.id=out"), {AT: math.nan}), train(config_of("run.id=skip", "train.spike=skip"), {AT: 50.0})
    assert (skipped.state.spikes, skipped.state.skipped_steps, skipped.state.rewinds) == (1, 1, 0)
    assert column(skipped, "skipped_steps") == [0] * AT + [1] * (STEPS - AT)
    assert skipped.state.step == skipped.state.batch == STEPS
    folders = [list_checkpoints(trainer.directory.checkpoints)[-1][1] for trainer in (left_out, skipped)]
    for name in ("model.safetensors", "ema.safetensors", "optimizer/state.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_rewind_goes_back_and_on_with_other_data(config_of, capsys):
    trainer = train(config_of("train.spike=rewind", "run.id=r"), {44: 50.0})
    assert f"loss spike at step 45: going back to step {AT}, and on with other data" in capsys.readouterr().err
    state = read_state(list_checkpoints(trainer.directory.checkpoints)[-1][1])
    assert (state.step, state.batch) == (STEPS, STEPS + 5), "five batches are passed over"
    assert (state.spikes, state.rewinds, state.skipped_steps) == (1, 1, 1)
    steps = column(trainer, "step")
    assert [step for step in steps if step <= STEPS][: AT + 6] == [*range(1, 45), 41, 42], "the spike itself has no line: it is undone"
    after = next(n for n, step in enumerate(steps) if n and step < steps[n - 1])
    assert column(trainer, "rewinds")[after - 1 : after + 1] == [0, 1]
    assert column(trainer, "spikes")[after - 1 : after + 1] == [0, 1]
    assert trainer.state.best_step == STEPS


def test_after_a_rewind_the_run_is_that_of_the_checkpoint_on_the_later_data(config_of, tmp_path):
    """The same weights come out when the checkpoint is taken up by hand with the batches passed over."""
    rewound = train(config_of("train.spike=rewind", "run.id=rewound", "checkpoint.keep_last=9"), {44: 50.0})
    by_hand = tmp_path / "runs" / "by-hand"
    shutil.copytree(rewound.directory.path, by_hand)
    for step, path in list_checkpoints(by_hand / "checkpoints"):
        if step > AT:
            shutil.rmtree(path)
    trainer = Trainer(config_of("train.spike=none", "run.id=by-hand"))
    resume = trainer._resume

    def resume_further(checkpoint: Path) -> None:
        resume(checkpoint)
        trainer.state.batch += 5

    trainer._resume = resume_further
    trainer.fit()
    ours, theirs = final_weights(by_hand), final_weights(rewound.directory.path)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


@pytest.mark.parametrize("kill_at", [42, 46], ids=["before the spike", "after the rewind"])
def test_killed_around_a_rewind_it_ends_alike(config_of, kill_at):
    settings = ["train.spike=rewind", "checkpoint.keep_last=9"]
    whole = train(config_of(*settings, "run.id=whole"), {44: 50.0})
    stopped = train(config_of(*settings, "run.id=stopped"), {44: 50.0}, kill_at)
    assert stopped.state.step < STEPS
    again = train(config_of(*settings, "run.id=stopped"), {44: 50.0})
    assert_same_run(whole.directory.path, again.directory.path)
    assert (again.state.batch, again.state.spikes, again.state.rewinds) == (STEPS + 5, 1, 1)


def test_there_are_at_most_five_rewinds(config_of, capsys):
    factors = {AT + 4 + 5 * n: 50.0 for n in range(7)}
    trainer = train(config_of("train.spike=rewind"), factors)
    said = capsys.readouterr().err
    assert said.count("going back to step") == 5
    assert "left out (too many" in said
    assert (trainer.state.step, trainer.state.rewinds) == (STEPS, 5)
    assert trainer.state.skipped_steps == trainer.state.spikes >= 6
    assert losses(trainer.directory.path).keys() == set(range(1, STEPS + 1))


def test_without_a_checkpoint_a_spike_is_left_out(config_of, capsys):
    trainer = train(config_of("train.spike=rewind", "checkpoint.every=1h"), {AT: 50.0})
    assert f"loss spike at step {AT + 1}: left out (no checkpoint to go back to" in capsys.readouterr().err
    assert (trainer.state.spikes, trainer.state.skipped_steps, trainer.state.rewinds) == (1, 1, 0)


def train_with_a_spike_in_the_second(configs: list[RunConfig]) -> None:
    results.write_report = lambda directory, *_: directory / "report.html"
    for config in configs:
        train(config, {AT: 50.0} if os.environ["RANK"] == "1" else {})


def test_a_spike_in_one_process_is_one_for_all(config_of, tmp_path):
    alone = train(config_of("run.id=alone", "model.dropout=0", "train.spike=skip"), {AT: 50.0})
    layout = ["model.dropout=0", "parallel=ddp", "checkpoint.every=20steps"]
    configs = [config_of(f"run.id={spike}", f"train.spike={spike}", *layout) for spike in ("skip", "rewind")]
    log = tmp_path / "log"
    run_together(train_with_a_spike_in_the_second, configs, processes=2, log=log)
    skip, rewind = (tmp_path / "runs" / name for name in ("skip", "rewind"))
    assert [line["skipped_steps"] for line in read_metrics(skip / "metrics.jsonl") if "loss" in line] == [0] * AT + [1] * (STEPS - AT)
    ours, theirs = losses(skip), losses(alone.directory.path)
    del ours[AT + 1], theirs[AT + 1]  # only half of that batch was spoiled here
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert log.read_text().count(f"loss spike at step {AT + 1}: going back to step {AT}") == 1, "one process says it"
    state = read_state(list_checkpoints(rewind / "checkpoints")[-1][1])
    assert (state.step, state.batch, state.rewinds) == (STEPS, STEPS + 1, 1)
