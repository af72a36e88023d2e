"""Half-quadratic quantization (HQQ): a zero point for each block that is fitted without data."""

import numpy as np

from .matrices import RoundedMatrix, fits_16_bits, in_blocks, narrowed, pack, reciprocal, row_pieces
from .method import RoundedWeights, RoundingMethod, RoundingProblem

# The norm that errors count in, the penalty that ties them to their shrunken copy (in squared steps of the block), its
# growth in each round, and the rounds.
_LP_NORM, _PENALTY, _PENALTY_GROWTH, _ROUNDS = 0.7, 10.0, 1.01, 20


class HalfQuadratic(RoundingMethod):
    """In 4 bits [`round_half_quadratic`]; in 8 bits to nearest: there is next to nothing to gain."""

    zero_points = frozenset({4})
    group_bytes = {8: 2, 4: 4}
    budget_obstacle = "sizes and errors are planned for groups without zero points, which HQQ has"

    def round(self, problem: RoundingProblem) -> RoundedWeights:
        return RoundedWeights(rounding=round_half_quadratic if problem.bits in self.zero_points else None)


def round_half_quadratic(weight: np.ndarray, bits: int, block_size: int) -> RoundedMatrix:
    """Round a matrix with a zero point for each block that is fitted without data (HQQ, half-quadratic quantization).

    The scale maps the block's range, 0 included, to the integers' range; the zero point minimises the sum of
    `|error|**0.7`, in which a few large weights count less than in squares, by alternating a shrinkage of the errors and the
    zero point's closed form. Of all rounds the block's best is kept.

    Args:
        weight (`np.ndarray` of shape `[rows, columns]`, float32): One row for each output feature.
        bits (`int`): 4 or 8.
        block_size (`int`): Weights that share a scale, even.

    Returns:
        [`RoundedMatrix`]: With zero points, which like the scales are float16's numbers where they fit there.
    """
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    integers = np.empty((rows, blocks * block_size * bits // 8), dtype=np.uint8)
    scales, zero_points = (np.empty((rows, blocks), dtype=np.float32) for _ in range(2))
    parts = row_pieces(rows, blocks * block_size)
    for part in parts:
        padded = in_blocks(weight[part], blocks, block_size)
        scales[part] = (np.maximum(padded.max(-1), 0) - np.minimum(padded.min(-1), 0)) / (2**bits - 1)
    if fits_16_bits(scales):
        scales = narrowed(scales)
    for part in parts:
        padded = in_blocks(weight[part], blocks, block_size)
        codes, zero_points[part] = _fit_zero_points(padded, scales[part, :, None], 2**bits - 1)
        integers[part] = pack(codes, bits)
    return RoundedMatrix(integers, scales, bits, columns, zero_points)


def _fit_zero_points(weight: np.ndarray, scale: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and zero points of `[rows, blocks, size]`; errors are counted in steps of the block's scale."""
    scaled = weight * reciprocal(scale)
    zero = narrowed(-np.minimum(scaled.min(-1, keepdims=True), 0))
    best_zero, best_error, penalty = zero, np.full_like(zero, np.inf), _PENALTY
    for _ in range(_ROUNDS):
        codes = np.clip(np.rint(scaled + zero), 0, largest)
        error = scaled - (codes - zero)
        size = np.abs(error)
        total = (size**_LP_NORM).sum(-1, keepdims=True)
        better = total < best_error
        best_zero, best_error = np.where(better, zero, best_zero), np.where(better, total, best_error)
        with np.errstate(divide="ignore"):
            shrunken = np.sign(error) * np.maximum(size - size ** (_LP_NORM - 1) / penalty, 0)
        zero = narrowed((codes - (scaled - shrunken)).mean(-1, keepdims=True))
        penalty *= _PENALTY_GROWTH
    codes = np.clip(np.rint(scaled + best_zero), 0, largest)
    return codes.astype(np.uint8), best_zero[..., 0]
