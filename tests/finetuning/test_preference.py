"""The DPO loss against its formula in fp64, and the model that it is held to, which is asked once."""

import copy
import errno
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from gpt.config import DeviceConfig
from gpt.data.batches import Batch
from gpt.finetuning.preference import PreferenceLoss, Reference
from gpt.model.config import GPTConfig
from gpt.model.loss import IGNORE, LinearCrossEntropy, chunk_size, valid_rows
from gpt.model.transformer import GPT
from gpt.runtime.device import find_device
from gpt.runtime.distributed import World

B, T, V = 4, 24, 50
LENGTHS = [[(6, 3), (9, 5)], [(8, 3), (6, 5)], [(10, 4)], [(5, 4)]]
"""Of each document of each row: its tokens, and how many of them are the prompt's."""
ROWS = {"train": 6, "held_out": 4}


def small_model(seed=0, **changes) -> GPT:
    torch.manual_seed(seed)
    settings = {"vocab_size": V, "context_length": T, "n_layer": 2, "n_head": 2, "d_model": 16, "tie_embeddings": False} | changes
    model = GPT(GPTConfig(**settings))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() == 2 else 1)
    return model


def a_batch(seed=1, numbers=(0, 1, 2, 3)) -> Batch:
    torch.manual_seed(seed)
    tokens, targets, documents = torch.zeros(B, T).long(), torch.full((B, T), IGNORE), torch.zeros(B, T).long()
    for row, lengths in enumerate(LENGTHS):
        place = 0
        documents[row] = len(lengths)
        for number, (length, prompt) in enumerate(lengths):
            ids = torch.randint(V, (length,))
            tokens[row, place : place + length] = ids
            targets[row, place + prompt - 1 : place + length - 1] = ids[prompt:]
            documents[row, place : place + length] = number
            place += length
    return Batch(tokens, targets, documents, torch.tensor(numbers))


def completions(model: GPT, batch: Batch) -> list[list[torch.Tensor]]:
    """The log-likelihood of each completion in fp64, each document by itself."""
    found = []
    for row, lengths in enumerate(LENGTHS):
        found.append([])
        place = 0
        for length, prompt in lengths:
            ids = batch.tokens[row, place : place + length]
            logits = model(ids[None, :-1])[0].double()
            each = F.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0]
            found[-1].append(each[prompt - 1 :].sum())
            place += length
    return found


def trl_sigmoid_loss(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing):
    """As trl 0.24's DPOTrainer.dpo_loss writes it, for one pair."""
    logratios, ref_logratios = chosen - rejected, ref_chosen - ref_rejected
    logits = logratios - ref_logratios
    return -F.logsigmoid(beta * logits) * (1 - label_smoothing) - F.logsigmoid(-beta * logits) * label_smoothing


def expected(model: GPT, reference: GPT, batch: Batch, beta: float, label_smoothing: float):
    """The loss in fp64, the gradients of the model's parameters, and beta times how much each chosen completion gained more."""
    model, reference = copy.deepcopy(model).double(), copy.deepcopy(reference).double()
    ours, theirs = completions(model, batch), completions(reference, batch)
    total, margins = torch.zeros((), dtype=torch.float64), []
    for row in (0, 2):
        for d in range(len(LENGTHS[row])):
            four = ours[row][d], ours[row + 1][d], theirs[row][d].detach(), theirs[row + 1][d].detach()
            total = total + trl_sigmoid_loss(*four, beta, label_smoothing)
            margins.append(beta * ((four[0] - four[2]) - (four[1] - four[3])).item())
    total.backward()
    return total.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, margins


def likelihoods(model: GPT, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return PreferenceLoss(model, LinearCrossEntropy(), 1.0)(batch.tokens, batch.targets, batch.documents, likelihoods=True)


@pytest.mark.parametrize("frozen", ["", "head", "blocks.0", "embeddings"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gather", [False, True])
def test_loss_and_gradients_are_those_of_the_formula(frozen, smoothing, gather):
    model, reference, batch = small_model(), small_model(3), a_batch()
    total, gradients, _ = expected(model, reference, batch, 0.3, smoothing)
    for name, p in model.named_parameters():
        p.requires_grad_(not (frozen and name.startswith(frozen)))
    objective = PreferenceLoss(model, LinearCrossEntropy(chunk=7), 0.3, smoothing)
    rows = valid_rows(batch.targets, 7) if gather else None
    assert (rows is not None) == gather
    loss = objective(batch.tokens, batch.targets, batch.documents, rows, reference=likelihoods(reference, batch))
    assert loss.item() == pytest.approx(total, rel=1e-5)
    loss.backward()
    for name, p in model.named_parameters():
        if frozen and name.startswith(frozen):
            assert p.grad is None
        else:
            torch.testing.assert_close(
                p.grad.double(), gradients[name], atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert objective.units(batch.targets, batch.documents) == 3


def test_the_states_of_frozen_blocks_may_be_given():
    model, batch, given = small_model(), a_batch(), likelihoods(small_model(3), a_batch())
    objective = PreferenceLoss(model, LinearCrossEntropy(), 0.3)
    states = model.hidden_states(batch.tokens, documents=batch.documents, end=1)
    whole = objective(batch.tokens, batch.targets, batch.documents, reference=given)
    assert objective(batch.tokens, batch.targets, batch.documents, states=states, start=1, reference=given).item() == whole.item()


def test_micro_batches_of_pairs_add_up_to_the_batch():
    model, batch, given = small_model(), a_batch(), likelihoods(small_model(3), a_batch())
    objective = PreferenceLoss(model, LinearCrossEntropy(), 0.3)
    whole = objective(batch.tokens, batch.targets, batch.documents, reference=given)
    parts = [slice(0, 2), slice(2, 4)]
    sums = [objective(batch.tokens[p], batch.targets[p], batch.documents[p], reference=given[p]) for p in parts]
    assert sum(part.item() for part in sums) == pytest.approx(whole.item(), rel=1e-6)
    assert [objective.units(batch.targets[p], batch.documents[p]) for p in parts] == [2, 1]
    with pytest.raises(ValueError, match="3 rows are no whole pairs"):
        objective(batch.tokens[:3], batch.targets[:3], batch.documents[:3])


def test_rows_without_documents_are_one_pair():
    model, batch = small_model(), a_batch()
    tokens, targets = batch.tokens[2:, :10], batch.targets[2:, :10]
    objective = PreferenceLoss(model, LinearCrossEntropy(), 0.3)
    plain = objective(tokens, targets)
    assert objective.units(targets) == 1
    assert plain.item() == pytest.approx(objective(tokens, targets, torch.zeros_like(tokens)).item(), rel=1e-6)
    assert objective(tokens, torch.full_like(targets, IGNORE)).item() == 0
    assert objective.units(torch.full_like(targets, IGNORE)) == 0


def test_in_eval_mode_pairs_and_margins_are_counted():
    model, reference, batch = small_model(), small_model(3), a_batch(2)
    margins = expected(model, reference, batch, 0.3, 0.0)[2]
    assert 0 < sum(margin > 0 for margin in margins) < 3
    objective = PreferenceLoss(model, LinearCrossEntropy(), 0.3).eval()
    with objective.counting() as counts, torch.no_grad():
        for _ in range(2):
            objective(batch.tokens, batch.targets, batch.documents, reference=likelihoods(reference, batch))
        objective.train()
        objective(batch.tokens, batch.targets, batch.documents)
    assert counts[:2].tolist() == [6, 2 * sum(margin > 0 for margin in margins)]
    assert counts[2].item() == pytest.approx(2 * sum(margins), rel=1e-4)


@pytest.mark.parametrize("trains", ["both", "hidden", "weight"])
@pytest.mark.parametrize("chunk", [5, 1000])
def test_losses_one_by_one_have_the_gradients_of_any_sum_of_them(trains, chunk):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(37, 24) * 3, torch.randn(101, 24), torch.randint(101, (37,))
    targets[::5] = IGNORE
    hidden.requires_grad_(trains != "weight")
    weight.requires_grad_(trains != "hidden")
    scales = torch.randn(37)
    each = LinearCrossEntropy(chunk=chunk).each(hidden, weight, targets)
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = F.cross_entropy(h @ w.T, targets, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(each.double(), exact, atol=1e-5, rtol=1e-5)
    (each * scales).sum().backward()
    (exact * scales.double()).sum().backward()
    for ours, theirs in ((hidden, h), (weight, w)):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(LinearCrossEntropy(chunk=chunk).each(hidden, weight, targets), each.detach())


def test_in_bf16_losses_one_by_one_are_close():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(200, 24, requires_grad=True), torch.randn(101, 24, requires_grad=True), torch.randint(101, (200,))
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    scales = torch.randn(200)
    (LinearCrossEntropy(torch.bfloat16).each(hidden, weight, targets) * scales).sum().backward()
    (F.cross_entropy(h @ w.T, targets, reduction="none") * scales.double()).sum().backward()
    for ours, exact in ((hidden.grad, h.grad), (weight.grad, w.grad)):
        assert ((ours.double() - exact).norm() / exact.norm()).item() < 2e-2


def test_no_logits_of_all_tokens_are_held(monkeypatch):
    """What autograd keeps of the losses one by one is no larger than the hidden states or the head."""
    kept = []
    hidden, weight = torch.randn(512, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        LinearCrossEntropy(chunk=chunk_size("cpu", 300, 512)).each(hidden, weight, torch.randint(300, (512,))).sum()
    assert kept
    assert max(kept) <= 512 * 8


class Asked:
    """Loads the objective of a reference, and counts how often it was loaded and asked."""

    def __init__(self) -> None:
        self.loaded = self.asked = 0

    def __call__(self) -> PreferenceLoss:
        self.loaded += 1
        objective = PreferenceLoss(small_model(3), LinearCrossEntropy(), 0.3).eval()
        objective.register_forward_hook(lambda *_: setattr(self, "asked", self.asked + 1))
        return objective


def a_reference(load, said=None) -> Reference:
    device = find_device(DeviceConfig("cpu"), "fp32")
    return Reference(load, ROWS, 2, device, World(), (said if said is not None else []).append)


BATCHES = [a_batch(1, (0, 1, 2, 3)), a_batch(2, (4, 5, -1, -1))]


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_reference_is_asked_once_for_each_row_and_then_let_go(tmp_path, on_disk):
    load = Asked()
    reference = a_reference(load)
    if on_disk:
        assert reference.keep_in(tmp_path, {"weights": "w"}) == 0
    first = [reference.train(batch)["reference"] for batch in BATCHES]
    torch.testing.assert_close(first[0], likelihoods(small_model(3), BATCHES[0]))
    assert load.asked == 2
    assert reference.is_loaded
    again = [reference.train(batch)["reference"] for batch in (BATCHES[0], a_batch(2, (4, 5, 2, 3)))]
    assert torch.equal(again[0], first[0])
    assert torch.equal(again[1][:2], first[1][:2])  # by number, whatever else is in the pass
    assert (load.asked, load.loaded, reference.is_loaded) == (2, 1, False)
    reference.held_out(BATCHES[0])  # other rows of the same numbers
    assert (load.asked, load.loaded) == (3, 2)


def test_what_it_said_is_there_for_the_next_run_of_the_same_beginning_and_data(tmp_path):
    load = Asked()
    first = a_reference(load)
    first.keep_in(tmp_path, {"weights": "w"})
    said = [first.train(batch)["reference"] for batch in BATCHES]
    first.close()
    second, third = a_reference(load), a_reference(load)
    assert second.keep_in(tmp_path, {"weights": "w"}) == 6
    assert third.keep_in(tmp_path, {"weights": "other"}) == 0
    assert torch.equal(second.train(BATCHES[0])["reference"], said[0])
    assert load.asked == 2
    third.train(BATCHES[0])
    assert load.asked == 3


def test_rows_without_targets_in_a_pass_that_only_keeps_others_company_are_not_kept():
    load = Asked()
    reference, batch = a_reference(load), BATCHES[0]
    reference.held_out(Batch(batch.tokens, torch.full_like(batch.targets, IGNORE), batch.documents, batch.numbers))
    torch.testing.assert_close(reference.held_out(batch)["reference"], likelihoods(small_model(3), batch))


def test_a_full_disk_is_said_and_memory_is_used(tmp_path, monkeypatch):
    said, load = [], Asked()
    reference = a_reference(load, said)
    reference.keep_in(tmp_path, {"weights": "w"})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gpt.finetuning.row_store.os", SimpleNamespace(pwrite=full, close=lambda file: None))
    values = [reference.train(batch)["reference"] for batch in (*BATCHES, BATCHES[1])]
    assert said == ["warning: what the reference said cannot be kept on disk (No space left on device); it is kept in memory"]
    assert torch.equal(values[1][:2], values[2][:2])
    assert load.asked == 2
