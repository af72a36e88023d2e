import numpy as np
import pytest

from optimum_clp.exporters.rounding import half_quadratic, matrices
from optimum_clp.exporters.rounding.half_quadratic import round_half_quadratic


@pytest.mark.parametrize("columns", [64, 80])
def test_half_quadratic_zero_points_are_no_worse_in_their_norm(columns, monkeypatch):
    """Than the range's own zero point, block by block; rows in pieces as together."""
    weight = np.random.default_rng(0).standard_normal((40, columns)).astype(np.float32)
    weight[:, 3] *= 20
    matrix = round_half_quadratic(weight, 4, 32)
    with monkeypatch.context() as patch:
        patch.setattr(half_quadratic, "_ROUNDS", 1)
        first = round_half_quadratic(weight, 4, 32)
    errors = [np.abs(found.dequantize() - weight) ** 0.7 for found in (matrix, first)]
    sums = [error[:, : columns // 32 * 32].reshape(40, -1, 32).sum(-1) for error in errors]
    assert (sums[0] <= sums[1] * (1 + 1e-6)).all() and sums[0].sum() < 0.98 * sums[1].sum()
    for stored in (matrix.scales, matrix.zero_points):
        assert np.array_equal(stored.astype(np.float16).astype(np.float32), stored)
    monkeypatch.setattr(matrices, "_CHUNK", 128)
    pieces = round_half_quadratic(weight, 4, 32)
    assert np.array_equal(pieces.integers, matrix.integers) and np.array_equal(pieces.zero_points, matrix.zero_points)


def test_half_quadratic_rounding_keeps_what_is_on_the_grid():
    codes = np.random.default_rng(0).integers(0, 16, (6, 64))
    codes[:, ::32], codes[:, 1::32] = 0, 15
    weight = ((codes - 5) * 0.25).astype(np.float32)
    weight[5] = 0
    matrix = round_half_quadratic(weight, 4, 32)
    assert np.array_equal(matrix.dequantize(), weight)
