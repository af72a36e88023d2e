"""Matrices in integers of 8, 6 or 4 bits with one scale for each block of a row, in the layout that ONNX Runtime stores.

Of 6 bits ONNX Runtime has no operators: such a matrix is the sum of its upper 4 bits and its lower 2, which it has.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# Between 4 and 8 bits an integer is two, `4 * upper + 3 - lower`: with 8 and 2 for the zero points of the two, which ONNX Runtime takes
# where none is stored, it goes from -33 to 30, and without the complement from -34 to 29, which costs more where it ends first.
SIX_BITS = 6
_LOWER_BITS = 2
# that share a scale where a step between integers is small
_WIDE_BLOCK = 64
# Rows are rounded together up to this many weights, which bounds the working memory to a few of its copies.
_CHUNK = 1024 * 1024
# Scales in between become float16 without a step between neighbours of more than a 128th; a matrix with others keeps float32.
_SMALLEST_NARROW, LARGEST_NARROW = 2.0**-17, 65504.0


@dataclass(frozen=True)
class IntegerForm:
    """How a matrix is stored in integers.

    Args:
        bits (`int`): 4, 6 or 8.
        block_size (`int`): Weights that share a scale, even.
    """

    bits: int
    block_size: int

    @property
    def error(self) -> float:
        """Mean square of rounding errors, up to a factor that all forms share: of the step between integers, which goes with the largest
        of a block's weights, and that, of normally distributed ones, with the root of the logarithm of their number."""
        return math.log(self.block_size) / integer_range(self.bits)[0] ** 2


@dataclass(frozen=True)
class GraphMatrix:
    """A matrix that the graph stores in integers.

    Args:
        rows (`int`): Output features, or tokens of the embedding.
        columns (`int`): Input features, or the width of the embedding.
        is_router (`bool`): Whether it chooses experts; such a matrix gets 8 bits.
    """

    rows: int
    columns: int
    is_router: bool = False

    def stored_bytes(self, form: IntegerForm) -> int:
        """Bytes of integers and 16-bit scales, the last block of a row filled up (`"qdq"` has no filling: at most these)."""
        return self.rows * -(-self.columns // form.block_size) * (form.block_size * form.bits // 8 + 2)

    def forms(self, block_size: int, offered: Sequence[int]) -> list[IntegerForm]:
        """What a budget may make of it, the smallest first: 4 bits, and so many more.

        Args:
            block_size (`int`): Weights that share a scale in 4 bits.
            offered (`Sequence[int]`): Bits beside 4, ascending. Where a step is that small, scales are too dear for blocks as short as of 4 bits,
                and products of 2 bits are slow; the last form has them all the same, for a budget that lasts.
        """
        if self.is_router:
            return [IntegerForm(8, block_size)]
        wide = max(block_size, _WIDE_BLOCK) if self.columns % _WIDE_BLOCK == 0 else block_size
        found = [IntegerForm(4, block_size), *(IntegerForm(bits, wide) for bits in offered)]
        return found if wide == block_size else [*found, IntegerForm(offered[-1], block_size)]


@dataclass(frozen=True)
class RoundedMatrix:
    """A matrix `[rows, columns]` in integers: a weight is `(integer - zero point) * scale`.

    Args:
        integers (`np.ndarray` of shape `[rows, blocks * block_size * bits / 8]`, uint8): As [`pack`] writes them. The last
            block is filled up with zeros.
        scales (`np.ndarray` of shape `[rows, blocks]`, float32): One for each block of a row. Those that are made here are
            float16's numbers, unless the matrix has scales that do not fit there.
        bits (`int`): 4, 6 or 8.
        columns (`int`): Columns of the matrix, without the filling.
        zero_points (`np.ndarray` of shape `[rows, blocks]`, float32, *optional*): [`zero_point`] if not given.
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

    def kept(self, keep: Callable[[np.ndarray], np.ndarray]) -> "RoundedMatrix":
        """The same matrix, its arrays where `keep` has put them."""
        zero_points = None if self.zero_points is None else keep(self.zero_points)
        return RoundedMatrix(keep(self.integers), keep(self.scales), self.bits, self.columns, zero_points)

    def codes(self) -> np.ndarray:
        """The unsigned integers one by one, uint8 `[rows, columns]`."""
        return unpack(self.integers, self.bits)[:, : self.columns]

    def dequantize(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The matrix that is stored, or some of its rows, `[rows, columns]`, float32."""
        zero_points = None if self.zero_points is None else self.zero_points[rows]
        return dequantize_blocks(self.integers[rows], self.scales[rows], self.bits, self.columns, zero_points)


def zero_point(bits: int) -> int:
    """What stands for zero among unsigned integers of so many bits where a matrix has no zero points of its own."""
    return 33 if bits == SIX_BITS else 2 ** (bits - 1)


def integer_range(bits: int) -> tuple[int, int]:
    """The least and the largest integer less [`zero_point`]; the least is the further from zero."""
    return -zero_point(bits), 2**bits - 1 - zero_point(bits)


# `(matrix, bits, block_size)` -> the matrix in integers
Rounding = Callable[[np.ndarray, int, int], RoundedMatrix]


def narrowed(numbers: np.ndarray) -> np.ndarray:
    """The nearest of float16's numbers, in float32."""
    return numbers.astype(np.float16).astype(np.float32)


def from_integers(codes: np.ndarray, bits: int, scales: np.ndarray, shifts: np.ndarray | None = None) -> RoundedMatrix:
    """Integers that were made elsewhere, exactly as they are.

    Args:
        codes (`np.ndarray` of shape `[rows, columns]`, uint8): Unsigned integers of `bits` bits.
        bits (`int`): 4, 6 or 8.
        scales (`np.ndarray` of shape `[rows, groups]`, float32): One for each group of neighbouring columns. A group that
            is no block of `MatMulNBits` is made of several blocks with one scale.
        shifts (`np.ndarray` of shape `[rows, groups]`, float32, *optional*): A weight is `code * scale - shift`; without
            shifts it is `(code - zero_point(bits)) * scale`.

    Returns:
        [`RoundedMatrix`]
    """
    rows, columns = codes.shape
    group = columns // scales.shape[1]
    # a power of two that divides the group; where none from 16 on does, there is one group and its last block is filled up
    block_size = next((size for size in (256, 128, 64, 32, 16) if group % size == 0), 16)
    blocks = -(-columns // block_size)
    padded = np.full((rows, blocks * block_size), zero_point(bits), dtype=np.uint8)
    padded[:, :columns] = codes
    repeats = -(-group // block_size)
    scales = np.ascontiguousarray(np.repeat(scales, repeats, axis=1))
    zero_points = None
    if shifts is not None:
        zero_points = np.repeat(shifts, repeats, axis=1) * reciprocal(scales)
    return RoundedMatrix(pack(padded.reshape(rows, blocks, block_size), bits), scales, bits, columns, zero_points)


def row_pieces(rows: int, width: int) -> list[slice]:
    """Pieces of a matrix of so many rows, each small enough to be rounded at once."""
    step = max(1, _CHUNK // width)
    return [slice(start, start + step) for start in range(0, rows, step)]


def in_blocks(weight: np.ndarray, blocks: int, block_size: int) -> np.ndarray:
    """A matrix as float32 `[rows, blocks, block_size]`, the last block of a row filled up with zeros."""
    padded = np.zeros((len(weight), blocks * block_size), dtype=np.float32)
    padded[:, : weight.shape[1]] = weight
    return padded.reshape(-1, blocks, block_size)


def fits_16_bits(scales: np.ndarray) -> bool:
    """Whether scales are near enough to float16's numbers to be stored there."""
    sizes = np.abs(scales[scales != 0])
    return bool(((sizes >= _SMALLEST_NARROW) & (sizes <= LARGEST_NARROW)).all())


def dequantize_blocks(
    integers: np.ndarray, scales: np.ndarray, bits: int, columns: int, zero_points: np.ndarray | None = None
) -> np.ndarray:
    """The matrix that a [`RoundedMatrix`] with these parts stands for.

    Args:
        integers (`np.ndarray`): Packed, see [`pack`].
        scales (`np.ndarray` of shape `[rows, blocks]`): One for each block of a row.
        bits (`int`): 4, 6 or 8.
        columns (`int`): Columns of the matrix, without the filling.
        zero_points (`np.ndarray` of shape `[rows, blocks]`, *optional*): [`zero_point`] if not given.

    Returns:
        `np.ndarray` of shape `[rows, columns]`, float32.
    """
    codes = unpack(integers, bits).reshape(*scales.shape, -1).astype(np.float32)
    codes -= np.float32(zero_point(bits)) if zero_points is None else zero_points[..., None]
    # in place: a whole layer of such matrices is held while the next ones are rounded
    codes *= scales[..., None]
    return codes.reshape(len(scales), -1)[:, :columns]


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[rows, blocks, block_size]` as the bytes that are stored, `[rows, bytes]`, the first code in the lowest bits of a byte.

    In 6 bits a row's upper 4 bits come first, and then the complement of its lower 2 bits.
    """
    codes = codes.reshape(len(codes), -1)
    if bits == 8:
        return codes
    if bits == SIX_BITS:
        return np.concatenate([_packed(codes >> _LOWER_BITS, 4), _packed(~codes & 3, _LOWER_BITS)], axis=1)
    return _packed(codes, bits)


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    each = 8 // bits
    found = codes[:, 0::each].copy()
    for place in range(1, each):
        found |= codes[:, place::each] << (place * bits)
    return found


def parts_of_six_bits(integers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stored upper 4 bits, and the complement of the lower 2, of integers `[rows, bytes]` of 6."""
    upper = integers.shape[1] * 4 // SIX_BITS
    return integers[:, :upper], integers[:, upper:]


def unpack(integers: np.ndarray, bits: int) -> np.ndarray:
    """The codes of stored bytes `[rows, bytes]`, one by one, with the filling."""
    if bits == 8:
        return integers
    if bits == SIX_BITS:
        upper, lower = parts_of_six_bits(integers)
        return (unpack(upper, 4) << _LOWER_BITS) | (~unpack(lower, _LOWER_BITS) & 3)
    mask = 2**bits - 1
    return np.stack([(integers >> place) & mask for place in range(0, 8, bits)], axis=-1).reshape(len(integers), -1)


def reciprocal(scale: np.ndarray) -> np.ndarray:
    """What to multiply by instead of dividing: 0 for a block of zeros, or of numbers too small to divide by."""
    return np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) > np.finfo(np.float32).tiny)
