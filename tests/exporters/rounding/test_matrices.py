import numpy as np
import pytest

from optimum_clp.exporters.rounding.matrices import dequantize_blocks, from_integers


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
