import numpy as np
import pytest

from optimum_clp.exporters.rounding import matrices as onnx_rounding
from optimum_clp.exporters.rounding.matrices import (
    DAMPING,
    FeedbackRounding,
    dequantize_blocks,
    from_integers,
    quantize_blocks,
    round_half_quadratic,
    round_to_nearest,
)


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
            scales = quantize_blocks(block, bits, block.shape[1])[1][:, 0].astype(np.float64)
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
    gram = inputs.T @ inputs
    expected = textbook_gptq(weight, gram, bits, block_size)
    # every row as it comes with feedback, without the choice between two roundings
    errors = iter([np.zeros(12), np.ones(12)])
    monkeypatch.setattr(onnx_rounding, "_output_error", lambda difference, gram: next(errors))
    found = FeedbackRounding(gram).round(weight, bits, block_size)
    np.testing.assert_allclose(found.dequantize(), expected, atol=1e-6)
    assert (found.bits, found.columns, found.block_size) == (bits, columns, block_size)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [10, 300])
def test_products_are_never_worse_than_rounded_to_nearest(bits, tokens, monkeypatch):
    monkeypatch.setattr(onnx_rounding, "_CHUNK", 400)
    weight, inputs = layer_of(40, 56, tokens, seed=1)
    fed = FeedbackRounding(inputs.T @ inputs).round(weight, bits, 16).dequantize()
    nearest = round_to_nearest(weight, bits, 16).dequantize()
    errors = [np.square((weight - rounded) @ inputs.T).sum(1) for rounded in (fed, nearest)]
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()
    assert errors[0].sum() < 0.7 * errors[1].sum()


def test_rows_in_pieces_are_rounded_as_together(monkeypatch):
    weight, inputs = layer_of(30, 32)
    whole = FeedbackRounding(inputs.T @ inputs).round(weight, 4, 32)
    monkeypatch.setattr(onnx_rounding, "_CHUNK", 100)
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


@pytest.mark.parametrize(("columns", "groups", "block_size"), [(256, 2, 128), (192, 2, 32), (64, 1, 64), (20, 1, 16)])
def test_integers_of_others_are_kept(columns, groups, block_size):
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (5, columns)).astype(np.uint8)
    scales = random.uniform(0.01, 0.1, (5, groups)).astype(np.float32)
    shifts = random.uniform(0, 1, (5, groups)).astype(np.float32)
    matrix = from_integers(codes, 4, scales, shifts)
    assert matrix.block_size == block_size
    group = columns // groups
    expected = [
        [float(codes[i, j]) * scales[i, j // group] - shifts[i, j // group] for j in range(columns)] for i in range(5)
    ]
    np.testing.assert_allclose(matrix.dequantize(), expected, atol=1e-5)
    symmetric = from_integers(codes, 8, scales)
    np.testing.assert_array_equal(
        symmetric.dequantize(), dequantize_blocks(symmetric.integers, symmetric.scales, 8, columns)
    )
    assert symmetric.zero_points is None and symmetric.integers[0, 0] == codes[0, 0]
    assert matrix.nbytes == matrix.integers.nbytes + 2 * matrix.scales.nbytes


@pytest.mark.parametrize("columns", [64, 80])
def test_half_quadratic_zero_points_are_no_worse_in_their_norm(columns, monkeypatch):
    """Than the range's own zero point, block by block; rows in pieces as together."""
    weight = np.random.default_rng(0).standard_normal((40, columns)).astype(np.float32)
    weight[:, 3] *= 20
    matrix = round_half_quadratic(weight, 4, 32)
    with monkeypatch.context() as patch:
        patch.setattr(onnx_rounding, "_ROUNDS", 1)
        first = round_half_quadratic(weight, 4, 32)
    errors = [np.abs(found.dequantize() - weight) ** 0.7 for found in (matrix, first)]
    sums = [error[:, : columns // 32 * 32].reshape(40, -1, 32).sum(-1) for error in errors]
    assert (sums[0] <= sums[1] * (1 + 1e-6)).all() and sums[0].sum() < 0.98 * sums[1].sum()
    for stored in (matrix.scales, matrix.zero_points):
        assert np.array_equal(stored.astype(np.float16).astype(np.float32), stored)
    monkeypatch.setattr(onnx_rounding, "_CHUNK", 128)
    pieces = round_half_quadratic(weight, 4, 32)
    assert np.array_equal(pieces.integers, matrix.integers) and np.array_equal(pieces.zero_points, matrix.zero_points)


def test_half_quadratic_rounding_keeps_what_is_on_the_grid():
    codes = np.random.default_rng(0).integers(0, 16, (6, 64))
    codes[:, ::32], codes[:, 1::32] = 0, 15
    weight = ((codes - 5) * 0.25).astype(np.float32)
    weight[5] = 0
    matrix = round_half_quadratic(weight, 4, 32)
    assert np.array_equal(matrix.dequantize(), weight)
