import numpy as np
import pytest
import torch

from optimum_clp.exporters import drift_correction
from optimum_clp.exporters.drift_correction import InputMoments, corrected_weight

INPUTS, OUTPUTS = 24, 10


def random_weight():
    return np.random.default_rng(0).standard_normal((OUTPUTS, INPUTS)).astype(np.float32)


def pairs(tokens, noise, seed, explained=True):
    """What enters a module in the float model and in the quantized one, `[tokens, inputs]` each."""
    generator = np.random.default_rng(1)
    mixing = 0.1 * generator.standard_normal((INPUTS, INPUTS))
    generator = np.random.default_rng(seed)
    inputs = generator.standard_normal((tokens, INPUTS))
    floats = inputs + noise * generator.standard_normal((tokens, INPUTS))
    return floats + inputs @ mixing if explained else floats, inputs


def moments_of(floats, inputs):
    halves = [slice(0, None, 2), slice(1, None, 2)]
    grams = [torch.from_numpy(inputs[half].T @ inputs[half]).float() for half in halves]
    drifts = [torch.from_numpy((floats[half] - inputs[half]).T @ inputs[half]).float() for half in halves]
    return InputMoments(tuple(grams), tuple(drifts))


def error(weight, truth, floats, inputs):
    return float(np.square(inputs @ weight.T - floats @ truth.T).sum())


@pytest.mark.parametrize("piece", [drift_correction._PIECE, 3 * INPUTS])
def test_the_change_is_that_of_ridge_regression(piece, monkeypatch):
    monkeypatch.setattr(drift_correction, "_PIECE", piece)
    weight = random_weight()
    floats, inputs = pairs(4000, 0.001, seed=2)
    found = corrected_weight(weight, moments_of(floats, inputs))
    # much text and little noise: the smallest ridge; solved here as a least-squares problem with rows for the ridge
    ridge = np.sqrt(0.01 * np.square(inputs).sum() / INPUTS) * np.eye(INPUTS)
    targets = np.concatenate([(floats - inputs) @ weight.T, np.zeros((INPUTS, OUTPUTS))])
    change = np.linalg.lstsq(np.concatenate([inputs, ridge]), targets, rcond=None)[0].T
    np.testing.assert_allclose(found, weight + change, rtol=1e-4, atol=1e-5)
    assert found.dtype == np.float32


@pytest.mark.parametrize("tokens", [40, 400, 4000])
def test_products_on_other_text_are_nearer_to_those_of_the_float_model(tokens):
    weight = random_weight()
    found = corrected_weight(weight, moments_of(*pairs(tokens, 0.3, seed=3)))
    floats, inputs = pairs(4000, 0.3, seed=4)
    assert error(found, weight, floats, inputs) < (0.97 if tokens == 40 else 0.9) * error(
        weight, weight, floats, inputs
    )


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_not_learned(seed):
    weight = random_weight()
    found = corrected_weight(weight, moments_of(*pairs(40, 0.3, seed=10 + seed, explained=False)))
    floats, inputs = pairs(4000, 0.3, seed=20 + seed, explained=False)
    # plain least squares on so few tokens has 1.5 times the error
    assert error(found, weight, floats, inputs) < 1.05 * error(weight, weight, floats, inputs)


def test_nothing_changes_where_there_is_nothing_to_compare_with():
    weight = random_weight()
    floats, inputs = pairs(40, 0.3, seed=5)
    moments = moments_of(floats, inputs)
    assert corrected_weight(weight, InputMoments((moments.grams[0],))) is weight
    # a single row of text has no other half
    empty = torch.zeros(INPUTS, INPUTS)
    assert corrected_weight(weight, InputMoments((moments.grams[0], empty), (moments.drifts[0], empty))) is weight
    # nothing has been quantized below
    assert corrected_weight(weight, moments_of(inputs, inputs)) is weight


def test_sums_over_texts():
    first, second = (pairs(30, 0.1, seed=seed) for seed in (6, 7))
    found = moments_of(*first).add(moments_of(*second))
    expected = moments_of(*(np.concatenate(parts) for parts in zip(first, second, strict=True)))
    for name in ("grams", "drifts"):
        for mine, theirs in zip(getattr(found, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(mine, theirs)
    np.testing.assert_allclose(found.gram, expected.gram, rtol=1e-5, atol=1e-4)
    # text whose tokens cannot be matched: the drifts of the rest say too little
    unmatched = moments_of(*first).add(InputMoments((expected.grams[0],)))
    assert unmatched.drifts is None
    np.testing.assert_allclose(
        unmatched.gram, moments_of(*first).gram + expected.grams[0].numpy(), rtol=1e-5, atol=1e-4
    )
