"""`experiment=char_fast`: what benchmarks time is a run of the trainer, and what comes out is a stock model."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from gpt import GPT, Trainer
from gpt.compose import compose_run
from gpt.data.tokenizer import load_tokenizer
from gpt.training.metrics import read_metrics
from scripts.benchmark_quality import held_out_loss, standard_library_text, train_plainly


@pytest.mark.slow
def test_some_steps_of_it_export_to_a_stock_model_that_computes_the_same(tmp_path):
    text = standard_library_text()
    assert len(text) == 1_000_000
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    places = [f"data.paths=[{tmp_path / 'text.txt'}]", f"data.cache_dir={tmp_path / 'cache'}", f"run.dir={tmp_path / 'runs'}"]
    config = compose_run("pretrain", ["experiment=char_fast", "device=cpu", *places, "train.budget=40steps", "train.log_every=10"])
    result = Trainer(config).fit()

    losses = [line["loss"] for line in read_metrics(result.run_directory / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0] - 1
    folder = result.run_directory / "model"
    ours, stock = GPT.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert isinstance(stock, Qwen3ForCausalLM)
    assert ours.num_parameters() <= 850_000
    held_out = text[text.index("\n", 900_000) + 1 :]
    ids = np.array(load_tokenizer(folder).encode(held_out))
    tokens = torch.from_numpy(ids[: 8 * 64]).view(8, 64)
    with torch.no_grad():
        want = ours(tokens)
        assert want.std() > 0.5
        assert (stock(tokens).logits - want).abs().max() < 1e-4
    # The benchmark scores with a function of its own, which serves its plain loop as well; the trainer's windows begin one token earlier.
    assert result.held_out is not None
    assert held_out_loss(ours, ids) == pytest.approx(result.held_out.loss, abs=0.01)


def test_the_plain_loop_that_it_is_compared_with_learns():
    ids = np.tile(np.random.default_rng(1).integers(0, 20, 50), 40)
    model, seconds = train_plainly(ids, 20, seed=1, steps=40)
    assert seconds > 0
    assert sum(p.numel() for p in model.parameters()) == 4 * (12 * 128**2 + 2 * 128) + (20 + 64 + 1) * 128  # nanoGPT's, bias=False
    assert held_out_loss(model, ids) < 2.5 < np.log(20)
