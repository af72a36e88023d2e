import numpy as np
import pytest

from optimum_clp.exporters.rounding import gptq, matrices
from optimum_clp.exporters.rounding.gptq import DAMPING, FeedbackRounding
from optimum_clp.exporters.rounding.nearest import quantize_blocks, round_to_nearest


def layer_of(rows, columns, tokens=300, seed=0):
    """A weight, and inputs that depend on one another, as those of a language model do."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal((rows, columns)).astype(np.float32)
    mixing = random.standard_normal((columns, columns)) * np.exp(-np.arange(columns) / 8)
    return weight, random.standard_normal((tokens, columns)) @ mixing.T


def textbook_gptq(weight, gram, bits, block_size):
    """GPTQ as its paper has it: the inverse is taken anew for the columns that are left after each column."""
    weight, half = weight.astype(np.float64).copy(), 2 ** (bits - 1)
    rows, columns = weight.shape
    hessian = gram + DAMPING * np.trace(gram) / columns * np.eye(columns)
    rounded = np.zeros_like(weight)
    for column in range(columns):
        if column % block_size == 0:
            block = weight[:, column : column + block_size].astype(np.float32)
            left = [np.linalg.inv(hessian[c:, c:])[0, 0] for c in range(column, min(columns, column + block_size))]
            importance = np.array([1 / inverse for inverse in left], dtype=np.float32)
            scales = quantize_blocks(block, bits, block.shape[1], importance)[1][:, 0].astype(np.float64)
        code = np.clip(np.rint(weight[:, column] / scales), -half, half - 1)
        rounded[:, column] = code * scales
        inverse = np.linalg.inv(hessian[column:, column:])
        error = (weight[:, column] - rounded[:, column]) / inverse[0, 0]
        weight[:, column:] -= np.outer(error, inverse[0])
    return rounded


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "block_size"), [(48, 16), (40, 16), (20, 32)])
def test_feedback_is_the_textbooks(bits, columns, block_size, monkeypatch):
    weight, inputs = layer_of(12, columns)
    gram = (inputs.T @ inputs).astype(np.float32)
    expected = textbook_gptq(weight, gram, bits, block_size)
    # every row as it comes with feedback, without the choice between two roundings
    errors = iter([np.zeros(12), np.ones(12)])
    monkeypatch.setattr(gptq, "_output_error", lambda difference, gram: next(errors))
    found = FeedbackRounding(gram).round(weight, bits, block_size)
    np.testing.assert_allclose(found.dequantize(), expected, atol=1e-6)
    assert (found.bits, found.columns, found.block_size) == (bits, columns, block_size)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [10, 300])
def test_products_are_never_worse_than_rounded_to_nearest(bits, tokens, monkeypatch):
    monkeypatch.setattr(matrices, "_CHUNK", 400)
    weight, inputs = layer_of(40, 56, tokens, seed=1)
    fed = FeedbackRounding(inputs.T @ inputs).round(weight, bits, 16).dequantize()
    nearest = round_to_nearest(weight, bits, 16).dequantize()
    errors = [np.square((weight - rounded) @ inputs.T).sum(1) for rounded in (fed, nearest)]
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()
    assert errors[0].sum() < 0.7 * errors[1].sum()


def test_rows_in_pieces_are_rounded_as_together(monkeypatch):
    weight, inputs = layer_of(30, 32)
    whole = FeedbackRounding(inputs.T @ inputs).round(weight, 4, 32)
    monkeypatch.setattr(matrices, "_CHUNK", 100)
    pieces = FeedbackRounding(inputs.T @ inputs).round(weight, 4, 32)
    np.testing.assert_allclose(pieces.dequantize(), whole.dequantize(), atol=1e-6)


def test_no_input_means_rounding_to_nearest():
    weight, _ = layer_of(6, 32)
    fed, nearest = FeedbackRounding(np.zeros((32, 32))).round(weight, 4, 32), round_to_nearest(weight, 4, 32)
    np.testing.assert_array_equal(fed.integers, nearest.integers)
    np.testing.assert_array_equal(fed.scales, nearest.scales)


def test_inputs_that_are_zero_on_some_features_are_no_obstacle():
    weight, inputs = layer_of(6, 32)
    inputs[:, 5] = 0
    inputs[:, 20:] = 0
    assert np.isfinite(FeedbackRounding(inputs.T @ inputs).round(weight, 4, 16).dequantize()).all()
