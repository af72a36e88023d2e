"""Log-likelihoods layer by layer: the plain passes'. The definition is tested in `test_tasks.py`."""

import pytest
import torch
from tiny_models import VOCABULARY, random_tokens, tiny_model
from zoo import ZOO, zoo_model

from optimum_clp.errors import ModelError
from optimum_clp.evaluation.likelihood import Request, log_likelihoods
from optimum_clp.forward.layer_major import Residence
from optimum_clp.mapped_weights import MappedWeights

TYPES = ("llama", "qwen3", "gemma3", "mixtral", "bloom", "jamba", "gemma4_text")
SOME = [next(tiny for tiny in ZOO if tiny.model_type == name) for name in TYPES if name in {t.model_type for t in ZOO}]
LENGTHS = (14, 3, 9, 9, 20, 2, 11, 5)


def some_requests():
    """Of many lengths; the first two ask two things of one input."""
    rows = [random_tokens(1, length, seed=length + number)[0].tolist() for number, length in enumerate(LENGTHS)]
    requests = [Request(row, 1 + number % min(3, len(row) - 1)) for number, row in enumerate(rows)]
    return [Request([*rows[0][:-1], 5], 1), *requests]


def asked(model, residence, batch_size=3):
    return log_likelihoods(model, some_requests(), batch_size, "t", True, residence)


def assert_same(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)


@pytest.mark.parametrize("tiny", SOME, ids=lambda t: f"{t.model_type}{t.variant}")
def test_the_figures_are_those_of_plain_passes(tiny):
    """Of a type whose layers hand on more than hidden states, too, which goes the old way."""
    model = zoo_model(tiny)
    assert_same(asked(model, Residence()), asked(model, None))


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_neither_layers_nor_rows_together_matter(together, batch_size, tmp_path):
    model, on_disk = tiny_model("qwen3"), Residence(together, state_memory=0, folder=tmp_path)
    assert_same(asked(model, on_disk, batch_size), asked(model, None))


@pytest.mark.parametrize(("memory", "readings"), [(2**30, 1), (0, 3)])
def test_requests_share_a_reading_as_long_as_their_states_have_room(memory, readings, monkeypatch):
    """Without memory as many as a layer's weights hold: here rows of 19, 13 and 10 tokens and less."""
    model, read = tiny_model(hidden_size=16, intermediate_size=16, head_dim=4), []
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    token = 2 * 16 * 4
    assert 3 * 13 * token < layer < 4 * 13 * token
    monkeypatch.setattr(MappedWeights, "let_go", lambda self, tensors: read.append(1))
    asked(model, Residence(state_memory=memory), batch_size=1)
    rows = len(LENGTHS)
    assert len(read) == readings * 6 and rows == 8


def test_weights_that_give_nan_are_named():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="it gives NaN for an example of the task t"):
        asked(model, Residence())


def test_the_vocabulary_is_wide_enough_for_the_requests():
    assert max(max(request.ids) for request in some_requests()) < VOCABULARY
