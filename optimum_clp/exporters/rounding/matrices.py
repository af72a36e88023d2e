"""Rounding of a matrix to 8 or 4 bits with one scale for each block of a row, in the form that ONNX Runtime stores.

Symmetric round-to-nearest, or with error feedback (GPTQ): the rounding error of a column is made up for by the columns
behind it, for the inputs that the matrix meets on calibration text. Or with a fitted zero point for each block (HQQ).
"""

from dataclasses import dataclass

import numpy as np
import torch

# Rows are quantized together up to this many weights, which bounds the working memory to a few of its copies.
_CHUNK = 1024 * 1024
# Shares of the largest weight that are tried as the end of the int4 range beside 1, which ONNX Runtime's tool takes.
_INT4_RANGES = (0.95, 0.9, 0.85, 0.8)
# Scales in between become float16 without a step between neighbours of more than a 128th; a matrix with others keeps float32.
_SMALLEST_NARROW, _LARGEST_NARROW = 2.0**-17, 65504.0
# HQQ: the norm that errors count in, the penalty that ties them to their shrunken copy (in squared steps of the block), its
# growth in each round, and the rounds.
_LP_NORM, _PENALTY, _PENALTY_GROWTH, _ROUNDS = 0.7, 10.0, 1.01, 20
# Added to the Gram matrix's diagonal, in units of its mean, as GPTQ's authors do.
DAMPING = 0.01


@dataclass(frozen=True)
class RoundedMatrix:
    """A matrix `[rows, columns]` in integers: a weight is `(integer - zero point) * scale`.

    Args:
        integers (`np.ndarray` of shape `[rows, blocks * block_size * bits / 8]`, uint8): The lower half of a byte first
            where `bits` is 4. The last block is filled up with zeros.
        scales (`np.ndarray` of shape `[rows, blocks]`, float32): One for each block of a row. Those that are made here are
            float16's numbers, unless the matrix has scales that do not fit there.
        bits (`int`): 4 or 8.
        columns (`int`): Columns of the matrix, without the filling.
        zero_points (`np.ndarray` of shape `[rows, blocks]`, float32, *optional*): `2**(bits - 1)` if not given.
    """

    integers: np.ndarray
    scales: np.ndarray
    bits: int
    columns: int
    zero_points: np.ndarray | None = None

    @property
    def block_size(self) -> int:
        """Weights that share a scale."""
        return self.integers.shape[1] * 8 // self.bits // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        parts = (self.integers, self.scales, self.zero_points)
        return sum(part.nbytes for part in parts if part is not None)

    def codes(self) -> np.ndarray:
        """The unsigned integers one by one, uint8 `[rows, columns]`."""
        return _unpack(self.integers, self.bits)[:, : self.columns]

    def dequantize(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The matrix that is stored, or some of its rows, `[rows, columns]`, float32."""
        zero_points = None if self.zero_points is None else self.zero_points[rows]
        return dequantize_blocks(self.integers[rows], self.scales[rows], self.bits, self.columns, zero_points)


def round_to_nearest(weight: np.ndarray, bits: int, block_size: int) -> RoundedMatrix:
    """[`quantize_blocks`] as a [`RoundedMatrix`].

    Args:
        weight (`np.ndarray` of shape `[rows, columns]`, float32): One row for each output feature.
        bits (`int`): 4 or 8.
        block_size (`int`): Weights that share a scale, even.

    Returns:
        [`RoundedMatrix`]
    """
    return RoundedMatrix(*quantize_blocks(weight, bits, block_size), bits, weight.shape[1])


class FeedbackRounding:
    """Rounds matrices column by column, each time moving the columns that are left so that products change least.

    This is GPTQ in the order of the columns; scales are chosen block by block, from the weights as they are when a block
    is reached, by the rule of [`quantize_blocks`]. A row whose products change more than by rounding to nearest, on the
    inputs that `gram` is of, is rounded to nearest, and so is a whole matrix if no input differs from zero.

    Args:
        gram (`np.ndarray` of shape `[columns, columns]`, float32): Sum over tokens of `x x^T` of the matrices' inputs.
        damping (`float`): Added to the diagonal of `gram`, in units of its mean; above 0.
    """

    def __init__(self, gram: np.ndarray, damping: float = DAMPING):
        mean = np.trace(gram) / len(gram)
        self.gram = gram
        self.factor = _feedback(gram, damping * mean) if mean > 0 else None

    def round(self, weight: np.ndarray, bits: int, block_size: int) -> RoundedMatrix:
        """Round one matrix.

        Args:
            weight (`np.ndarray` of shape `[rows, columns]`, float32): One row for each output feature.
            bits (`int`): 4 or 8.
            block_size (`int`): Weights that share a scale, even.

        Returns:
            [`RoundedMatrix`]
        """
        plain = round_to_nearest(weight, bits, block_size)
        if self.factor is None:
            return plain
        rows, columns = weight.shape
        narrow = _fits_16_bits(plain.scales)
        step = max(1, _CHUNK // columns)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            codes, scales = _round_columns(weight[part].astype(np.float64), self.factor, bits, block_size, narrow)
            integers = _pack(codes, bits)
            fed = dequantize_blocks(integers, scales, bits, columns)
            nearest = dequantize_blocks(plain.integers[part], plain.scales[part], bits, columns)
            better = _output_error(weight[part] - fed, self.gram) < _output_error(weight[part] - nearest, self.gram)
            plain.integers[part][better] = integers[better]
            plain.scales[part][better] = scales[better]
        return plain


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
    step = max(1, _CHUNK // (blocks * block_size))
    parts = [slice(start, start + step) for start in range(0, rows, step)]
    for part in parts:
        padded = _in_blocks(weight[part], blocks, block_size)
        scales[part] = (np.maximum(padded.max(-1), 0) - np.minimum(padded.min(-1), 0)) / (2**bits - 1)
    if _fits_16_bits(scales):
        scales = _narrowed(scales)
    for part in parts:
        padded = _in_blocks(weight[part], blocks, block_size)
        codes, zero_points[part] = _fit_zero_points(padded, scales[part, :, None], 2**bits - 1)
        integers[part] = _pack(codes, bits)
    return RoundedMatrix(integers, scales, bits, columns, zero_points)


def _fit_zero_points(weight: np.ndarray, scale: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and zero points of `[rows, blocks, size]`; errors are counted in steps of the block's scale."""
    scaled = weight * _inverse(scale)
    zero = _narrowed(-np.minimum(scaled.min(-1, keepdims=True), 0))
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
        zero = _narrowed((codes - (scaled - shrunken)).mean(-1, keepdims=True))
        penalty *= _PENALTY_GROWTH
    codes = np.clip(np.rint(scaled + best_zero), 0, largest)
    return codes.astype(np.uint8), best_zero[..., 0]


def _narrowed(numbers: np.ndarray) -> np.ndarray:
    """The nearest of float16's numbers, in float32."""
    return numbers.astype(np.float16).astype(np.float32)


def from_integers(codes: np.ndarray, bits: int, scales: np.ndarray, shifts: np.ndarray | None = None) -> RoundedMatrix:
    """Integers that were made elsewhere, exactly as they are.

    Args:
        codes (`np.ndarray` of shape `[rows, columns]`, uint8): Unsigned integers of `bits` bits.
        bits (`int`): 4 or 8.
        scales (`np.ndarray` of shape `[rows, groups]`, float32): One for each group of neighbouring columns. A group that
            is no block of `MatMulNBits` is made of several blocks with one scale.
        shifts (`np.ndarray` of shape `[rows, groups]`, float32, *optional*): A weight is `code * scale - shift`; without
            shifts it is `(code - 2**(bits - 1)) * scale`.

    Returns:
        [`RoundedMatrix`]
    """
    rows, columns = codes.shape
    group = columns // scales.shape[1]
    # a power of two that divides the group; where none from 16 on does, there is one group and its last block is filled up
    block_size = next((size for size in (256, 128, 64, 32, 16) if group % size == 0), 16)
    blocks = -(-columns // block_size)
    padded = np.full((rows, blocks * block_size), 2 ** (bits - 1), dtype=np.uint8)
    padded[:, :columns] = codes
    repeats = -(-group // block_size)
    scales = np.ascontiguousarray(np.repeat(scales, repeats, axis=1))
    zero_points = None
    if shifts is not None:
        zero_points = np.repeat(shifts, repeats, axis=1) * _inverse(scales)
    return RoundedMatrix(_pack(padded.reshape(rows, blocks, block_size), bits), scales, bits, columns, zero_points)


def _feedback(gram: np.ndarray, penalty: float) -> np.ndarray:
    """The upper Cholesky factor of the inverse of the damped Gram matrix, float64.

    It is the inverse of the upper triangular matrix `R` with `R R^T` equal to the damped matrix, and that is the lower
    Cholesky factor of the matrix in reversed order. One matrix is held beside `gram`: these are the largest of an export.
    """
    # symmetric, so its transpose is the same matrix in the order of columns, in which LAPACK works in place
    reverse = torch.from_numpy(gram[::-1, ::-1].astype(np.float64)).T
    reverse.diagonal().add_(penalty)
    _invert_lower(torch.linalg.cholesky(reverse, out=reverse))
    return reverse.numpy()[::-1, ::-1]


def _invert_lower(matrix: torch.Tensor, step: int = 256) -> None:
    """The inverse of a lower triangular matrix in its place, blocks of columns from the last to the first."""
    size = len(matrix)
    for start in reversed(range(0, size, step)):
        stop = min(start + step, size)
        block = matrix[start:stop, start:stop]
        inverse = torch.linalg.solve_triangular(block, torch.eye(stop - start, dtype=matrix.dtype), upper=False)
        below = matrix[stop:, start:stop]
        below.copy_(matrix[stop:, stop:] @ (below @ inverse)).neg_()
        block.copy_(inverse)


def _round_columns(
    weight: np.ndarray, factor: np.ndarray, bits: int, block_size: int, narrow: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Codes, uint8 `[rows, blocks, block_size]`, and scales, float32; `weight`, float64, is overwritten."""
    half = 2 ** (bits - 1)
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    codes = np.full((rows, blocks * block_size), half, dtype=np.uint8)
    scales = np.empty((rows, blocks), dtype=np.float32)
    for block in range(blocks):
        start, stop = block * block_size, min(columns, (block + 1) * block_size)
        scales[:, block] = _round_blocks(weight[:, start:stop].astype(np.float32), bits, narrow)[1]
        scale = scales[:, block].astype(np.float64)
        inverse = _inverse(scale)
        errors = np.empty((rows, stop - start))
        for column in range(start, stop):
            code = np.clip(np.rint(weight[:, column] * inverse), -half, half - 1)
            codes[:, column] = code + half
            error = (weight[:, column] - code * scale) / factor[column, column]
            weight[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes.reshape(rows, blocks, block_size), scales


def _output_error(difference: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """For each row `d` of the difference the summed square of its products, `d gram d^T`."""
    return np.einsum("ij,ij->i", difference @ gram, difference, dtype=np.float64)


def quantize_blocks(weight: np.ndarray, bits: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a matrix to unsigned integers with one scale for each block of a row.

    A weight is `(integer - 2**(bits - 1)) * scale`. The scale maps the block's largest weight to the integer range's
    longer end; in 4 bits also somewhat smaller scales are tried and the one with the least squared error is taken. Scales
    are rounded to float16 before weights are divided by them, unless the matrix has scales that do not fit there.

    Args:
        weight (`np.ndarray` of shape `[rows, columns]`, float32): One row for each output feature.
        bits (`int`): 4 or 8.
        block_size (`int`): Weights that share a scale, even.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Integers, uint8 of shape `[rows, blocks * block_size * bits / 8]`, the lower
        half of a byte first where `bits` is 4; and scales, float32 of shape `[rows, blocks]`. The last block is filled
        up with zeros.
    """
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    integers = np.empty((rows, blocks * block_size * bits // 8), dtype=np.uint8)
    scales = np.empty((rows, blocks), dtype=np.float32)
    step = max(1, _CHUNK // (blocks * block_size))
    parts = [slice(start, start + step) for start in range(0, rows, step)]
    for part in parts:
        scales[part] = np.abs(_in_blocks(weight[part], blocks, block_size)).max(-1) / 2 ** (bits - 1)
    narrow = _fits_16_bits(scales)
    for part in parts:
        codes, scales[part] = _round_blocks(_in_blocks(weight[part], blocks, block_size), bits, narrow)
        integers[part] = _pack(codes, bits)
    return integers, scales


def _in_blocks(weight: np.ndarray, blocks: int, block_size: int) -> np.ndarray:
    padded = np.zeros((len(weight), blocks * block_size), dtype=np.float32)
    padded[:, : weight.shape[1]] = weight
    return padded.reshape(-1, blocks, block_size)


def _fits_16_bits(scales: np.ndarray) -> bool:
    sizes = np.abs(scales[scales != 0])
    return bool(((sizes >= _SMALLEST_NARROW) & (sizes <= _LARGEST_NARROW)).all())


def dequantize_blocks(
    integers: np.ndarray, scales: np.ndarray, bits: int, columns: int, zero_points: np.ndarray | None = None
) -> np.ndarray:
    """The matrix that [`quantize_blocks`] has stored.

    Args:
        integers (`np.ndarray`): Packed integers, from [`quantize_blocks`].
        scales (`np.ndarray` of shape `[rows, blocks]`): From [`quantize_blocks`].
        bits (`int`): 4 or 8.
        columns (`int`): Columns of the matrix, without the filling.
        zero_points (`np.ndarray` of shape `[rows, blocks]`, *optional*): `2**(bits - 1)` if not given.

    Returns:
        `np.ndarray` of shape `[rows, columns]`, float32.
    """
    codes = _unpack(integers, bits).reshape(*scales.shape, -1).astype(np.float32)
    codes -= np.float32(2 ** (bits - 1)) if zero_points is None else zero_points[..., None]
    # in place: a whole layer of such matrices is held while the next ones are rounded
    codes *= scales[..., None]
    return codes.reshape(len(scales), -1)[:, :columns]


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[rows, blocks, block_size]` as the bytes that are stored, `[rows, bytes]`."""
    codes = codes.reshape(len(codes), -1)
    return codes if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)


def _unpack(integers: np.ndarray, bits: int) -> np.ndarray:
    """The codes of stored bytes `[rows, bytes]`, one by one, with the filling."""
    return integers if bits == 8 else np.stack([integers & 15, integers >> 4], axis=-1).reshape(len(integers), -1)


def _inverse(scale: np.ndarray) -> np.ndarray:
    # a block of zeros, or of numbers too small to divide by, becomes zeros
    return np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) > np.finfo(np.float32).tiny)


def _round_blocks(weight: np.ndarray, bits: int, narrow: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes (uint8, the shape of `weight`) and scales (its shape without the last axis) of `[..., size]`."""
    half = 2 ** (bits - 1)
    largest = np.take_along_axis(weight, np.abs(weight).argmax(-1, keepdims=True), -1)
    best_codes, best_scale, best_error = _round_to(weight, largest * np.float32(-1 / half), half, narrow)
    for share in _INT4_RANGES if bits == 4 else ():
        codes, scale, error = _round_to(weight, largest * np.float32(-share / half), half, narrow)
        better = error < best_error
        np.copyto(best_codes, codes, where=better)
        np.copyto(best_scale, scale, where=better)
        np.copyto(best_error, error, where=better)
    return (best_codes + half).astype(np.uint8), best_scale[..., 0]


def _round_to(
    weight: np.ndarray, scale: np.ndarray, half: int, narrow: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed codes of `weight` at `scale`, the scale itself as it is stored, and the squared error of each block."""
    if narrow:
        # feedback may move a block's weights out of float16's range: its row is then rounded to nearest
        scale = _narrowed(np.clip(scale, -_LARGEST_NARROW, _LARGEST_NARROW))
    codes = np.clip(np.rint(weight * _inverse(scale)), -half, half - 1)
    return codes, scale, np.square(codes * scale - weight).sum(-1, keepdims=True)
