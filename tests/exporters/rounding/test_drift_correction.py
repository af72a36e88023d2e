import copy

import numpy as np
import pytest
import torch

from optimum_clp.exporters.rounding import drift_correction
from optimum_clp.exporters.rounding.drift_correction import InputGrams, corrected_weights

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


def sums_of(floats, inputs):
    halves = [slice(0, None, 2), slice(1, None, 2)]
    grams = [torch.from_numpy(inputs[half].T @ inputs[half]).float() for half in halves]
    drifts = [torch.from_numpy((floats[half] - inputs[half]).T @ inputs[half]).float() for half in halves]
    return InputGrams(tuple(grams), tuple(drifts))


def corrected(weight, sums):
    (found,) = corrected_weights([weight], sums)
    return found


def error(weight, truth, floats, inputs):
    return float(np.square(inputs @ weight.T - floats @ truth.T).sum())


@pytest.mark.parametrize("piece", [drift_correction._PIECE, 3 * INPUTS])
def test_the_change_is_that_of_ridge_regression(piece, monkeypatch):
    monkeypatch.setattr(drift_correction, "_PIECE", piece)
    weight = random_weight()
    floats, inputs = pairs(4000, 0.001, seed=2)
    found = corrected(weight, sums_of(floats, inputs))
    # much text and little noise: the smallest ridge; solved here as a least-squares problem with rows for the ridge
    ridge = np.sqrt(0.01 * np.square(inputs).sum() / INPUTS) * np.eye(INPUTS)
    targets = np.concatenate([(floats - inputs) @ weight.T, np.zeros((INPUTS, OUTPUTS))])
    change = np.linalg.lstsq(np.concatenate([inputs, ridge]), targets, rcond=None)[0].T
    np.testing.assert_allclose(found, weight + change, rtol=1e-4, atol=1e-5)
    assert found.dtype == np.float32


@pytest.mark.parametrize("tokens", [40, 400, 4000])
def test_products_on_other_text_are_nearer_to_those_of_the_float_model(tokens):
    weight = random_weight()
    found = corrected(weight, sums_of(*pairs(tokens, 0.3, seed=3)))
    floats, inputs = pairs(4000, 0.3, seed=4)
    assert error(found, weight, floats, inputs) < (0.97 if tokens == 40 else 0.9) * error(
        weight, weight, floats, inputs
    )


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_not_learned(seed):
    weight = random_weight()
    found = corrected(weight, sums_of(*pairs(40, 0.3, seed=10 + seed, explained=False)))
    floats, inputs = pairs(4000, 0.3, seed=20 + seed, explained=False)
    # plain least squares on so few tokens has 1.5 times the error
    assert error(found, weight, floats, inputs) < 1.05 * error(weight, weight, floats, inputs)


def test_nothing_changes_where_there_is_nothing_to_compare_with():
    weight = random_weight()
    floats, inputs = pairs(40, 0.3, seed=5)
    sums = sums_of(floats, inputs)
    assert corrected(weight, InputGrams((sums.grams[0],))) is weight
    # a single row of text has no other half
    empty = torch.zeros(INPUTS, INPUTS)
    assert corrected(weight, InputGrams((sums.grams[0], empty), (sums.drifts[0], empty))) is weight
    # nothing has been quantized below
    assert corrected(weight, sums_of(inputs, inputs)) is weight


def test_several_weights_are_corrected_as_each_alone():
    first, sums = random_weight(), sums_of(*pairs(400, 0.3, seed=8))
    second = np.random.default_rng(9).standard_normal((3, INPUTS)).astype(np.float32)
    # without a drift of its own inputs, the third has nothing to gain and stays
    third = np.zeros((2, INPUTS), np.float32)
    together = corrected_weights([first, second, third], copy.deepcopy(sums))
    for weight, found in zip((first, second), together, strict=False):
        np.testing.assert_array_equal(found, corrected(weight, copy.deepcopy(sums)))
        assert not np.array_equal(found, weight)
    assert together[2] is third


@pytest.mark.parametrize("explained", [True, False])
def test_some_rows_say_which_ridge_is_best_for_all(explained, monkeypatch):
    weight = np.random.default_rng(11).standard_normal((300, INPUTS)).astype(np.float32)
    sums = sums_of(*pairs(60, 0.3, seed=12, explained=explained))
    whole = corrected(weight, copy.deepcopy(sums))
    monkeypatch.setattr(drift_correction, "_JUDGED_ROWS", 40)
    np.testing.assert_array_equal(corrected(weight, sums), whole)


def test_sums_are_those_of_the_text():
    floats, inputs = (torch.from_numpy(x).float().reshape(4, 15, INPUTS) for x in pairs(60, 0.1, seed=6))
    found = InputGrams.zeros(INPUTS, matched=True)
    for batch in (slice(0, 2), slice(2, 4)):
        found.add(inputs[batch], floats[batch])
    for half in (0, 1):
        x, x_f = (states[half::2].reshape(-1, INPUTS) for states in (inputs, floats))
        torch.testing.assert_close(found.grams[half], x.T @ x)
        torch.testing.assert_close(found.drifts[half], (x_f - x).T @ x)
    flat = inputs.reshape(-1, INPUTS).double()
    gram = (flat.T @ flat).numpy()
    drift = (floats.reshape(-1, INPUTS).double() - flat).T @ flat
    found.merge()
    assert len(found.grams) == len(found.drifts) == 1
    torch.testing.assert_close(found.drifts[0].double(), drift, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.take_gram(), gram, rtol=1e-5, atol=1e-4)
    assert found.grams == () and found.drifts is None


def test_drifts_are_given_up_where_tokens_cannot_be_matched():
    floats, inputs = (torch.from_numpy(x).float().reshape(4, 15, INPUTS) for x in pairs(60, 0.1, seed=6))
    found, never = InputGrams.zeros(INPUTS, matched=True), InputGrams.zeros(INPUTS, matched=False)
    found.add(inputs[:2], floats[:2])
    found.add(inputs[2:].reshape(-1, INPUTS))
    never.add(inputs)
    flat = inputs.reshape(-1, INPUTS)
    for sums in (found, never):
        assert sums.drifts is None and len(sums.grams) == 1
        torch.testing.assert_close(sums.grams[0], flat.T @ flat)


def test_ridges_are_judged_in_float64_where_float32_has_no_factor():
    # of one direction alone, and a ridge that float32 does not see beside it
    gram, ridge = torch.full((INPUTS, INPUTS), 1e4), 1e-12
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(gram + ridge * 1e4 * torch.eye(INPUTS))
    factor = drift_correction._factor(gram, ridge, torch.float32)
    assert factor.dtype is torch.float64
    torch.testing.assert_close(factor @ factor.T, gram.double() + ridge * 1e4 * torch.eye(INPUTS).double())
    well = torch.eye(INPUTS) + 1
    factor = drift_correction._factor(well, 0.1, torch.float32)
    assert factor.dtype is torch.float32
    torch.testing.assert_close(factor.tril() @ factor.tril().T, well + 0.2 * torch.eye(INPUTS))
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        drift_correction._factor(-well, 0.1, torch.float32)
