"""Every way to heal that is compared runs, on a tiny model: what they take from the package is not only what users take."""

import importlib.util

import pytest
import torch
from tiny_models import random_tokens, tiny_model

from benchmarks.recovery.compare import recipe
from benchmarks.recovery.methods import METHODS, Cell, hadamard
from optimum_clp import LayerSegment

CELL = Cell(tiny_model(), LayerSegment(2, 4), random_tokens(8, 16, seed=1), random_tokens(4, 16, seed=2), seed=0)
NEEDS_PEFT = {"lora_r8", "lora_equal"}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_heals_and_leaves_the_dense_model_alone(name):
    if name in NEEDS_PEFT and importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    method = METHODS[name]
    before = {key: value.clone() for key, value in CELL.dense.state_dict().items()}
    healed = method.heal(CELL) if method.loss is None else method.heal(CELL, recipe(method, 1e-3, epochs=1))
    assert all(torch.equal(value, before[key]) for key, value in CELL.dense.state_dict().items())
    with torch.no_grad():
        assert healed.model(CELL.train).logits.isfinite().all()
    assert (healed.num_trained > 0) == (method.loss is not None or name == "clp_default_rate")


@pytest.mark.parametrize("width", [1, 2, 12, 20, 32, 56, 72, 96, 120, 576])
def test_hadamard_matrices_are_orthogonal_and_of_one_size(width):
    matrix = hadamard(width)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, width**-0.5))
