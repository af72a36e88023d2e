"""Weights times gradients, layer by layer: the plain pass's figures. The formula is tested in `test_importance.py`."""

import pytest
import torch
from tiny_models import random_tokens, tiny_model
from zoo import ZOO, zoo_model

from optimum_clp.evaluation.live_memory import LiveTensorBytes
from optimum_clp.forward.layer_major import Residence
from optimum_clp.mapped_weights import MappedWeights
from optimum_clp.resume import Journal
from optimum_clp.search.objective import Objective
from optimum_clp.search.weight_gradients import weights_by_gradients

TYPES = ("qwen3", "gemma3", "mixtral", "bloom", "jamba", "gemma4_text")
SOME = [next(tiny for tiny in ZOO if tiny.model_type == t) for t in TYPES if t in {tiny.model_type for tiny in ZOO}]
ROWS = 3


def objective_of(model, residence, rows=ROWS, length=12, **options):
    return Objective(model, random_tokens(rows, length), batch_size=2, quiet=True, residence=residence, **options)


def sums(model, residence, **options):
    return weights_by_gradients(objective_of(model, residence, **options))


@pytest.mark.parametrize("tiny", SOME, ids=lambda t: f"{t.model_type}{t.variant}")
def test_architectures_have_the_same_figures_in_both_orders(tiny):
    """Every type of the zoo was tried once. Gemma 4, whose layers hand on more than hidden states, goes the old way."""
    model = zoo_model(tiny)
    assert sums(model, Residence()) == pytest.approx(sums(model, None), rel=1e-6)


@pytest.mark.parametrize("together", [1, 4])
def test_states_and_gradients_may_lie_on_disk(together, tmp_path):
    model, on_disk = tiny_model(), Residence(together, state_memory=0, folder=tmp_path)
    assert sums(model, on_disk) == sums(model, None)
    assert not list(tmp_path.iterdir())


def test_the_weights_are_read_up_and_down(monkeypatch):
    model, read = tiny_model(num_layers=6), []
    objective = objective_of(model, Residence())
    monkeypatch.setattr(MappedWeights, "let_go", lambda self, tensors: read.append(id(next(iter(tensors)))))
    weights_by_gradients(objective)
    numbers = {id(next(layer.parameters())): index for index, layer in enumerate(model.model.layers)}
    assert [numbers[tensor] for tensor in read] == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]


def test_padding_is_no_word_of_the_loss():
    model, mask = tiny_model(), torch.ones(ROWS, 12, dtype=torch.long)
    mask[1, 7:], mask[2, :4] = 0, 0
    plain, by_layers = (sums(model, r, attention_mask=mask) for r in (None, Residence()))
    assert by_layers == plain != sums(model, None)


def test_a_weight_that_layers_share_counts_for_each_of_them_under_a_bound_too():
    model = tiny_model()
    model.model.layers[3].mlp = model.model.layers[1].mlp
    assert sums(model, Residence()) == sums(model, None)


def test_an_interrupted_pass_measures_only_what_is_missing(tmp_path):
    model, file, ran = tiny_model(), tmp_path / "journal.jsonl", []
    whole = sums(model, None, journal=Journal(file))
    file.write_bytes(file.read_bytes().splitlines(keepends=True)[0])
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: ran.append(1))
    for passes in (2 * (ROWS - 1), 0):  # of the rows that are missing, up and down, and of none
        objective = objective_of(model, Residence(), journal=Journal(file))
        ran.clear()  # the work was counted
        assert weights_by_gradients(objective) == whole
        assert len(ran) == passes


def test_what_requires_gradients_is_put_back_and_no_gradient_is_left():
    model = tiny_model()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    before = [parameter.requires_grad for parameter in model.parameters()]
    sums(model, Residence())
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(
        parameter.grad is None and not parameter._post_accumulate_grad_hooks for parameter in model.parameters()
    )


def test_one_layers_activations_exist_at_a_time(tmp_path):
    """What is inside the layers grows with their number in the plain order, and does not layer by layer."""
    peaks = {}
    for depth in (6, 24):
        model = tiny_model(num_layers=depth)
        for residence in (None, Residence(state_memory=0, folder=tmp_path)):
            objective = objective_of(model, residence, rows=1, length=100)
            with LiveTensorBytes(model) as live:
                weights_by_gradients(objective)
            weights = sum(p.nbytes for p in model.parameters())
            peaks[depth, residence is None] = live.peak - weights
    assert peaks[24, True] > 2 * peaks[6, True]
    # the states that enter the layers lie in files, and are counted here
    states = (24 - 6) * 100 * 32 * 4
    assert peaks[24, False] - peaks[6, False] <= 1.1 * states
