import copy

import pytest
import torch
from tiny_models import random_tokens, tiny_model
from torch import nn

from optimum_clp.exporters.rounding import products
from optimum_clp.exporters.rounding.input_grams import visit_layers, weight_names
from optimum_clp.exporters.rounding.products import product_dtype, products_in

ROWS = random_tokens(6, 20, seed=1)


class Refused(nn.Module):
    """What writes into a tensor of another dtype than its product's, as some experts do."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, states):
        found = self.linear(states)
        return torch.zeros(found.shape).index_add_(0, torch.arange(len(found)), found)


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_is_taken_where_the_processor_has_it_and_the_model_runs(monkeypatch, has):
    monkeypatch.setattr(products, "_has_bfloat16", lambda: has)
    model = tiny_model(num_layers=2)
    assert product_dtype(model, ROWS) is (torch.bfloat16 if has else torch.float32)
    other = copy.deepcopy(model)
    other.model.layers[1].mlp.up_proj = Refused(other.model.layers[1].mlp.up_proj)
    assert product_dtype(other, ROWS) is torch.float32
    # infinities are no reason to go on in the other dtype
    other = copy.deepcopy(model)
    other.model.norm.weight.data.fill_(torch.inf)
    assert product_dtype(other, ROWS) is torch.float32


def test_products_alone_are_in_the_dtype():
    states, weight = torch.full((2, 4), 1 + 2**-10), torch.full((4, 4), 1.0)
    with products_in(torch.bfloat16):
        assert (states @ weight).dtype is torch.bfloat16 and (states * 2).dtype is torch.float32
    with products_in(torch.float32):
        assert torch.equal(states @ weight, torch.full((2, 4), 4 * (1 + 2**-10)))


def sums_of(model, dtype):
    found = []

    def quantize(weights, sums, tied):
        if sums is not None:
            found.append(
                ([weight.names[0] for weight in weights], [gram.clone() for gram in (*sums.grams, *sums.drifts)])
            )
        return [lambda rows=slice(None), weight=weight.weight: weight[rows] * 0.9 for weight in weights]

    names = [names[0] for names in weight_names(model).values()]
    visit_layers(model, ROWS, names, quantize, batch_size=4, dtype=dtype, quiet=True)
    return found


def test_what_enters_modules_is_the_same_but_for_its_last_digits():
    model = tiny_model(num_layers=2)
    fine, coarse = (sums_of(model, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert [names for names, _ in fine] == [names for names, _ in coarse]
    for (name, expected), (_, found) in zip(fine[1:], coarse[1:], strict=True):
        # two halves of what enters, and two of its drift from the float model, which is a tenth of it
        for a, b, bound in zip(expected, found, (0.03, 0.03, 0.1, 0.1), strict=True):
            # sums stay in float32; a product rounds to 8 bits, and a dozen of them stand one behind the other
            assert b.dtype is torch.float32 and (a - b).norm() < bound * a.norm(), name
    assert any(
        not torch.equal(a, b) for (_, x), (_, y) in zip(fine, coarse, strict=True) for a, b in zip(x, y, strict=True)
    )
