"""The curve through pilots, against curves that are known."""

import math

import pytest
import torch

from optimum_clp.errors import TuningError
from optimum_clp.tuning.forecast import RecoveryCurve

PILOTS = (4096, 8192, 16384, 32768)


def truth(constant, slope, exponent, tokens):
    return constant + slope * (tokens / PILOTS[0]) ** -exponent


def observed(curve, seed, noise=0.005):
    """What pilots on that curve would see: every one is off by a little."""
    generator = torch.Generator().manual_seed(seed)
    off = 1 + noise * torch.randn(len(PILOTS), generator=generator)
    return [truth(*curve, tokens) * factor for tokens, factor in zip(PILOTS, off.tolist(), strict=True)]


def curves(count):
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        constant, slope, exponent = torch.rand(3, generator=generator).tolist()
        yield 0.2 * constant, 0.1 + 0.4 * slope, 0.15 + 0.5 * exponent


def test_points_without_noise_give_the_curve_back():
    curve = (0.0, 0.5, 0.25)
    exact = [truth(*curve, tokens) for tokens in PILOTS]
    found = RecoveryCurve(PILOTS, exact).at(65536)
    assert found.num_tokens == 65536
    assert found.loss == pytest.approx(truth(*curve, 65536), rel=0.03)
    assert found.low < found.loss < found.high


@pytest.mark.parametrize(("times", "within"), [(4, 0.10), (32, 0.20)])
def test_a_prediction_is_near_and_its_interval_holds(times, within):
    tokens, errors, inside = times * PILOTS[-1], [], 0
    for seed, curve in enumerate(curves(40)):
        found, true = RecoveryCurve(PILOTS, observed(curve, seed)).at(tokens), truth(*curve, tokens)
        errors.append(abs(math.log(found.loss / true)))
        inside += found.low <= true <= found.high
    assert sorted(errors)[20] < within
    assert inside >= 0.7 * 40  # four of five, give or take what 40 can tell


def test_losses_that_do_not_fall_are_predicted_to_stay():
    found = RecoveryCurve(PILOTS, [0.3] * 4).at(10 * PILOTS[-1])
    assert found.loss == pytest.approx(0.3, rel=0.03)


def test_the_farther_the_less_sure():
    curve = RecoveryCurve(PILOTS, observed((0.1, 0.3, 0.3), 0))
    spans = [found.high - found.low for found in map(curve.at, (65536, 2**19, 2**23))]
    assert spans == sorted(spans)


@pytest.mark.parametrize("losses", [[1.0, 1.0], [1.0, math.nan, 1.0]])
def test_a_curve_needs_three_pilots_with_finite_losses(losses):
    with pytest.raises(TuningError, match="forecast.pilots is .*: a curve needs at least three pilots with finite "):
        RecoveryCurve(PILOTS[: len(losses)], losses)
