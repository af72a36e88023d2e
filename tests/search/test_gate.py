import math

import pytest
import torch

from optimum_clp.search.gate import concave_gate, hard_gate


def reference_gate(start, length, num_layers, k):
    """The formula of the docs, one layer at a time, in plain Python floats."""

    def sigma(x):
        return 1 / (1 + math.exp(-x)) if x > -700 else 0.0

    def v(x):
        return sigma(k * (x - start + 0.5)) - sigma(k * (x - start - length + 0.5))

    return [1 - (v(i) + v(-1 - i) + v(2 * num_layers - 1 - i)) for i in range(num_layers)]


CASES = [
    (start, length, layers, k)
    for layers, length in ((5, 1), (16, 3), (32, 8), (80, 16))
    for k in (0.5, 1.0, 4.0, 20.0)
    for start in (0.0, 0.3, (layers - length) / 2, layers - length - 0.7, float(layers - length))
]


@pytest.mark.parametrize(("start", "length", "layers", "k"), CASES)
def test_values_lie_in_the_unit_interval_and_match_the_formula(start, length, layers, k):
    gate = concave_gate(start, length, layers, k)
    assert gate.dtype == torch.float64 and gate.shape == (layers,)
    assert (gate >= 0).all() and (gate <= 1).all()
    torch.testing.assert_close(gate.tolist(), reference_gate(start, length, layers, k), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("start", "length", "layers", "k"), [c for c in CASES if c[2] * c[3] >= 8])
def test_closed_mass_is_the_number_of_removed_layers(start, length, layers, k):
    assert (1 - concave_gate(start, length, layers, k)).sum().item() == pytest.approx(length, abs=1e-3)


@pytest.mark.parametrize(("start", "length", "layers", "k"), CASES)
def test_there_is_one_valley(start, length, layers, k):
    slope = concave_gate(start, length, layers, k).diff()
    falling = (slope > 1e-12).nonzero()
    # once the gate has begun to rise it never falls again
    if len(falling):
        assert (slope[falling[0, 0] :] >= -1e-12).all()


@pytest.mark.parametrize("start", [0, 2, 13])
def test_the_limit_is_the_hard_mask(start):
    torch.testing.assert_close(concave_gate(start, 3, 16, 200.0), hard_gate(start, 3, 16), atol=1e-12, rtol=0)
    assert hard_gate(start, 3, 16).tolist() == [0.0 if start <= i < start + 3 else 1.0 for i in range(16)]


@pytest.mark.parametrize("start", [0.4, 4.25, 9.9])
@pytest.mark.parametrize("k", [0.5, 2.0, 6.0])
def test_gradient_matches_finite_differences(start, k):
    position = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    weights = torch.linspace(-1, 2, 16, dtype=torch.float64) ** 3
    (concave_gate(position, 3, 16, k) * weights).sum().backward()
    step = 1e-6

    def value(s):
        return sum(w * g for w, g in zip(weights.tolist(), reference_gate(s, 3, 16, k), strict=True))

    assert position.grad.item() == pytest.approx((value(start + step) - value(start - step)) / (2 * step), abs=1e-6)
