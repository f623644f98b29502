"""Language modelling beside classes: the loss against its formula in fp64, and what of a text counts how much."""

import copy
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from gpt.finetuning.auxiliary import AuxiliaryLanguageLoss, next_tokens
from gpt.model.config import GPTConfig
from gpt.model.loss import IGNORE, LinearCrossEntropy, valid_rows
from gpt.model.objective import NextTokenLoss
from gpt.model.transformer import GPT

T, V, CLASSES = 16, 40, ["a", "b", "c"]
LENGTHS = [[5, 1, 7], [16], [2]]
"""Of the texts of each row; what is left is padding."""
Text = tuple[torch.Tensor, torch.Tensor]


def a_model(head: Literal["sequence", "tokens"]) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=V, context_length=T, n_layer=2, n_head=2, d_model=16, tie_embeddings=False, head=head, classes=CLASSES,
    )  # fmt: skip
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() == 2 else 1)
    return model


def a_batch(asked: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[Text]]:
    """Tokens, targets and documents (3, T), and the texts by themselves; targets at the last token, at all of them, or at every third."""
    torch.manual_seed(1)
    tokens, targets, documents = torch.zeros(3, T).long(), torch.full((3, T), IGNORE), torch.zeros(3, T).long()
    texts = []
    for row, lengths in enumerate(LENGTHS):
        documents[row], place = len(lengths), 0
        for number, length in enumerate(lengths):
            ids, said = torch.randint(V, (length,)), torch.full((length,), IGNORE)
            where = {"last": slice(length - 1, None), "all": slice(None), "some": slice(0, None, 3)}[asked]
            said[where] = torch.randint(len(CLASSES), said[where].shape)
            here = slice(place, place + length)
            tokens[row, here], targets[row, here], documents[row, here] = ids, said, number
            texts.append((ids, said))
            place += length
    return tokens, targets, documents, texts


def of_formula(model: GPT, texts: list[Text]) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of the classes, and of the next tokens as they count, each text by itself, in fp64."""
    classes = language = torch.zeros((), dtype=torch.float64)
    for ids, said in texts:
        hidden = model.hidden_states(ids[None])[0]
        classes = classes + F.cross_entropy(model.head(hidden), said, ignore_index=IGNORE, reduction="sum")
        if len(ids) > 1:
            mean = F.cross_entropy(hidden[:-1] @ model.embeddings.tokens.weight.T, ids[1:])
            language = language + (said != IGNORE).sum() * mean
    return classes, language


@pytest.mark.parametrize(("head", "asked"), [("sequence", "last"), ("sequence", "all"), ("tokens", "some")])
@pytest.mark.parametrize("frozen", ["", "embeddings", "head"])
def test_loss_and_gradients_are_those_of_the_formula(head, asked, frozen):
    model, (tokens, targets, documents, texts) = a_model(head), a_batch(asked)
    for name, p in model.named_parameters():
        p.requires_grad_(not (frozen and name.startswith(frozen)))
    exact = copy.deepcopy(model).double()
    classes, language = of_formula(exact, texts)
    (classes + 0.5 * language).backward()
    objective = AuxiliaryLanguageLoss(model, LinearCrossEntropy(chunk=7), 0.5)
    loss = objective(tokens, targets, documents, valid_rows(targets, 7))
    assert loss.item() == pytest.approx((classes + 0.5 * language).item(), rel=1e-5)
    loss.backward()
    gradients = {name: p.grad for name, p in exact.named_parameters()}
    for name, p in model.named_parameters():
        if frozen and name.startswith(frozen):
            assert p.grad is None
        else:
            assert p.grad is not None
            torch.testing.assert_close(
                p.grad.double(), gradients[name], atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
    count = int((targets != IGNORE).sum())
    assert objective.units(targets, documents) == count
    assert objective.figures(lambda sums: sums) == {"lm_loss": pytest.approx(language.item() / count, rel=1e-5)}
    assert objective.figures(lambda sums: sums) == {}, "what was told counts no more"


@pytest.mark.parametrize("asked", ["last", "all"])
def test_what_is_measured_is_the_classes(asked):
    model, (tokens, targets, documents, texts) = a_model("sequence"), a_batch(asked)
    objective = AuxiliaryLanguageLoss(model, LinearCrossEntropy(), 0.5).eval()
    with torch.no_grad():
        measured = objective(tokens, targets, documents).item()
        assert measured == NextTokenLoss(model, LinearCrossEntropy())(tokens, targets, documents).item()
        assert measured == pytest.approx(of_formula(copy.deepcopy(model).double(), texts)[0].item(), rel=1e-5)
    assert objective.figures(lambda sums: sums) == {}


def test_rows_add_up_to_their_batch():
    """So the sum over processes, and over passes, is that of the whole batch."""
    model, (tokens, targets, documents, _) = a_model("sequence"), a_batch("all")
    objective = AuxiliaryLanguageLoss(model, LinearCrossEntropy(), 0.5)
    whole = objective(tokens, targets, documents).item()
    parts = [objective(tokens[row, None], targets[row, None], documents[row, None]).item() for row in range(3)]
    assert sum(parts) == pytest.approx(whole, rel=1e-6)


def test_what_follows_stays_within_its_text_and_counts_as_often_as_its_classes():
    tokens, targets, documents, _ = a_batch("last")
    following, weights = next_tokens(tokens, targets, documents)
    for row, lengths in enumerate(LENGTHS):
        place = 0
        for length in lengths:
            assert following[row, place : place + length - 1].tolist() == tokens[row, place + 1 : place + length].tolist()
            assert following[row, place + length - 1] == IGNORE
            assert weights[row, place : place + length].sum() == pytest.approx(float(length > 1))
            place += length
        assert (following[row, place:] == IGNORE).all(), "padding is no text"
        assert not weights[row, place:].any()
    alone, weights = next_tokens(tokens[1:2], targets[1:2])
    assert alone.tolist() == following[1:2].tolist(), "without documents a row is one"
    assert weights.sum() == pytest.approx(1)
