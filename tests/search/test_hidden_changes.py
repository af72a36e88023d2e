"""Changes of hidden states, layer by layer: the plain pass's, bit for bit. The formulas are tested in `test_importance.py`."""

import pytest
import torch
from tiny_models import random_tokens, tiny_model
from zoo import ZOO, zoo_model

from optimum_clp.forward.layer_major import Residence
from optimum_clp.mapped_weights import MappedWeights
from optimum_clp.resume import Journal
from optimum_clp.search.hidden_changes import hidden_changes
from optimum_clp.search.objective import Objective

TYPES = ("qwen3", "gemma3", "mixtral", "bloom", "jamba", "gemma4_text")
SOME = [next(tiny for tiny in ZOO if tiny.model_type == t) for t in TYPES if t in {tiny.model_type for tiny in ZOO}]
ROWS = 5


def objective_of(model, residence, **options):
    return Objective(model, random_tokens(ROWS, 12), batch_size=4, quiet=True, residence=residence, **options)


def changes(model, length, residence, **options):
    return hidden_changes(objective_of(model, residence, **options), length)


@pytest.mark.parametrize("tiny", SOME, ids=lambda t: f"{t.model_type}{t.variant}")
def test_architectures_have_the_same_figures_in_both_orders(tiny):
    """Every type of the zoo was tried once. Gemma 4, whose layers hand on more than hidden states, goes the old way."""
    model = zoo_model(tiny)
    assert changes(model, 2, None) == changes(model, 2, Residence())


@pytest.mark.parametrize("together", [1, 2, 4, 6])
@pytest.mark.parametrize("length", [1, 3, 6])
def test_any_number_of_layers_together_and_in_a_run(together, length, tmp_path):
    """What waits lies in files without a name."""
    model, on_disk = tiny_model(num_layers=6), Residence(together, state_memory=0, folder=tmp_path)
    assert changes(model, length, on_disk) == changes(model, length, None)
    assert not list(tmp_path.iterdir())


def test_the_weights_are_read_once(monkeypatch):
    model, read = tiny_model(num_layers=6), []
    objective = objective_of(model, Residence())
    monkeypatch.setattr(MappedWeights, "let_go", lambda self, tensors: read.append(next(iter(tensors))))
    hidden_changes(objective, 2)
    assert [id(tensor) for tensor in read] == [id(next(layer.parameters())) for layer in model.model.layers]


def test_padding_enters_no_average():
    model, mask = tiny_model(), torch.ones(ROWS, 12, dtype=torch.long)
    mask[1, 7:], mask[3, :4] = 0, 0
    plain, by_layers = (changes(model, 2, r, attention_mask=mask) for r in (None, Residence()))
    assert plain == by_layers != changes(model, 2, None)


def test_an_interrupted_pass_measures_only_what_is_missing(tmp_path):
    model, file, ran = tiny_model(), tmp_path / "journal.jsonl", []
    whole = changes(model, 2, None, journal=Journal(file))
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0])
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: ran.append(1))
    for batches in (len(lines) - 1, 0):  # of the first one, and of what is known then
        objective = objective_of(model, Residence(), journal=Journal(file))
        ran.clear()  # the work was counted
        assert hidden_changes(objective, 2) == whole
        assert len(ran) == batches
