"""Rounding to nearest: the integers that are closest to the weights, at the best of a few scales."""

import numpy as np

from .matrices import (
    LARGEST_NARROW,
    RoundedMatrix,
    fits_16_bits,
    in_blocks,
    integer_range,
    narrowed,
    pack,
    reciprocal,
    row_pieces,
    zero_point,
)
from .method import RoundedWeights, RoundingMethod, RoundingProblem

# the name to advise where another method cannot be used
NEAREST = "rtn"
# Shares of the largest weight that are tried as the longer end of the range of so many bits beside 1, which ONNX Runtime's tool takes; and
# those where it is known how much a column's error counts (docs/onnx_lab_notes.md, "A real model", "Between 4 and 8 bits"). In 6 bits
# it is the shorter end that cuts something off.
_RANGES = {4: (0.95, 0.9, 0.85, 0.8), 6: (1.1, 1.05, 0.95)}
_WEIGHTED_RANGES = {4: (1.05, *(1 - step / 40 for step in range(1, 13))), 6: _RANGES[6]}


class ToNearest(RoundingMethod):
    """Every matrix by [`round_to_nearest`]."""

    def round(self, problem: RoundingProblem) -> RoundedWeights:
        return RoundedWeights()


def round_to_nearest(
    weight: np.ndarray, bits: int, block_size: int, importance: np.ndarray | None = None
) -> RoundedMatrix:
    """[`quantize_blocks`] as a [`RoundedMatrix`].

    Args:
        weight (`np.ndarray` of shape `[rows, columns]`, float32): One row for each output feature.
        bits (`int`): 4, 6 or 8.
        block_size (`int`): Weights that share a scale, even.
        importance (`np.ndarray` of shape `[columns]`, *optional*): See [`quantize_blocks`].

    Returns:
        [`RoundedMatrix`]
    """
    return RoundedMatrix(*quantize_blocks(weight, bits, block_size, importance), bits, weight.shape[1])


def quantize_blocks(
    weight: np.ndarray, bits: int, block_size: int, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a matrix to unsigned integers with one scale for each block of a row.

    A weight is `(integer - zero_point(bits)) * scale`. The scale maps the block's largest weight to the integer range's
    longer end; in 4 and 6 bits other scales near it are tried too, and the one with the least squared error is taken. Scales are
    rounded to float16 before weights are divided by them, unless the matrix has scales that do not fit there.

    Args:
        weight (`np.ndarray` of shape `[rows, columns]`, float32): One row for each output feature.
        bits (`int`): 4, 6 or 8.
        block_size (`int`): Weights that share a scale, even.
        importance (`np.ndarray` of shape `[columns]`, float32, *optional*): What a squared error of each column counts, such
            as the mean square of what it is multiplied by; all count the same if not given.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Integers, uint8 of shape `[rows, blocks * block_size * bits / 8]`, the lower
        half of a byte first where `bits` is 4; and scales, float32 of shape `[rows, blocks]`. The last block is filled
        up with zeros.
    """
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    integers = np.empty((rows, blocks * block_size * bits // 8), dtype=np.uint8)
    scales = np.empty((rows, blocks), dtype=np.float32)
    parts = row_pieces(rows, blocks * block_size)
    for part in parts:
        scales[part] = np.abs(in_blocks(weight[part], blocks, block_size)).max(-1) / zero_point(bits)
    narrow = fits_16_bits(scales)
    counts = None if importance is None else in_blocks(importance[None], blocks, block_size)
    for part in parts:
        codes, scales[part] = round_blocks(in_blocks(weight[part], blocks, block_size), bits, narrow, counts)
        integers[part] = pack(codes, bits)
    return integers, scales


def round_blocks(
    weight: np.ndarray, bits: int, narrow: bool, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (uint8, the shape of `weight`) and scales (its shape without the last axis) of `[..., size]`.

    `importance`, of a shape that can be multiplied by the weight's, says what a squared error counts.
    """
    largest = np.take_along_axis(weight, np.abs(weight).argmax(-1, keepdims=True), -1)
    ends = integer_range(bits)
    best_codes, best_scale, best_error = _round_to(weight, largest * np.float32(1 / ends[0]), ends, narrow, importance)
    shares = _RANGES if importance is None else _WEIGHTED_RANGES
    for share in shares.get(bits, ()):
        codes, scale, error = _round_to(weight, largest * np.float32(share / ends[0]), ends, narrow, importance)
        better = error < best_error
        np.copyto(best_codes, codes, where=better)
        np.copyto(best_scale, scale, where=better)
        np.copyto(best_error, error, where=better)
    return (best_codes - ends[0]).astype(np.uint8), best_scale[..., 0]


def _round_to(
    weight: np.ndarray, scale: np.ndarray, ends: tuple[int, int], narrow: bool, importance: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed codes of `weight` at `scale` between the ends, the scale itself as it is stored, and the squared error of each block as it counts."""
    if narrow:
        # feedback may move a block's weights out of float16's range: its row is then rounded to nearest
        scale = narrowed(np.clip(scale, -LARGEST_NARROW, LARGEST_NARROW))
    codes = np.clip(np.rint(weight * reciprocal(scale)), *ends)
    error = np.square(codes * scale - weight)
    if importance is not None:
        error *= importance
    return codes, scale, error.sum(-1, keepdims=True)
