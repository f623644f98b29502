import pytest
import torch

from gpt.compose import compose_run
from gpt.errors import UserError
from gpt.model.config import GPTConfig
from gpt.model.loss import LinearCrossEntropy
from gpt.model.objective import NextTokenLoss
from gpt.model.transformer import GPT
from gpt.runtime.case import case_of
from gpt.runtime.cpu import Cpu
from gpt.runtime.memory import ROOM, needs
from gpt.runtime.neuron import CHIPS, Neuron
from gpt.training.micro_batch import divisors, largest_by_formula, largest_that_fits, try_pass


@pytest.mark.parametrize("sequences", [1, 7, 12, 64, 96])
@pytest.mark.parametrize("most", [0, 1, 8, 1000])
def test_sizes_divide_the_batch_and_are_bounded(sequences, most):
    sizes = divisors(sequences, most)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1
    assert set(sizes) == {d for d in range(1, sequences + 1) if sequences % d == 0 and (d <= most or d == 1)}


def memory_for(most: int, tried: list[int]):
    def attempt(size: int) -> None:
        tried.append(size)
        if size > most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")  # torch.OutOfMemoryError is one, with such words

    return attempt


def test_the_largest_that_fits_is_found_from_above():
    tried: list[int] = []
    assert largest_that_fits(memory_for(5, tried), [12, 6, 4, 3, 2, 1]) == 4
    assert tried == [12, 6, 4]


def test_where_nothing_fits_the_remedy_is_named():
    with pytest.raises(UserError, match=r"train\.micro_batch=auto: not even 1 sequence.*activation_checkpointing=full"):
        largest_that_fits(memory_for(0, []), [2, 1])


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def broken(size: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        largest_that_fits(broken, [2, 1])


@pytest.mark.parametrize("documents", [False, True])
def test_a_trial_leaves_no_gradients(documents):
    model = GPT(GPTConfig(vocab_size=32, context_length=8, n_layer=1, n_head=1, d_model=8))
    objective = NextTokenLoss(model, LinearCrossEntropy())
    seen = []
    model.head.weight.register_hook(lambda gradient: seen.append(float(gradient.abs().sum())))
    try_pass(objective, [], Cpu("CPU", torch.float32), 8, documents, 3)
    assert seen
    assert seen[0] > 0
    assert all(p.grad is None for p in model.parameters())


def test_a_device_that_is_not_tried_out_gets_what_the_formulas_let_fit():
    config = compose_run("pretrain", ["model=gpt2-large", "model.vocab_size=50257", "train.batch_tokens=16384"])
    chip = Neuron("a chip", torch.bfloat16, None, CHIPS["trn2"])
    sizes = divisors(16, 16)
    chosen = largest_by_formula(sizes, lambda size: case_of(config, 1, size, chip, True), chip)
    assert 1 < chosen < 16
    needed = {size: needs(case_of(config, 1, size, chip, True)).total for size in sizes}
    assert needed[chosen] <= ROOM * chip.memory_limit() < needed[2 * chosen]
    unknown = Neuron("an unknown one", torch.bfloat16)
    assert largest_by_formula(sizes, lambda size: case_of(config, 1, size, unknown, True), unknown) == 16
    large = compose_run("pretrain", ["model=gpt2-xl", "model.n_layer=96"])
    assert largest_by_formula(sizes, lambda size: case_of(large, 1, size, chip, True), chip) == 1
