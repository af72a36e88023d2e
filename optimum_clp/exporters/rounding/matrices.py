"""Matrices in integers of 8 or 4 bits with one scale for each block of a row, in the layout that ONNX Runtime stores."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Rows are rounded together up to this many weights, which bounds the working memory to a few of its copies.
_CHUNK = 1024 * 1024
# Scales in between become float16 without a step between neighbours of more than a 128th; a matrix with others keeps float32.
_SMALLEST_NARROW, LARGEST_NARROW = 2.0**-17, 65504.0


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

    def stored_bytes(self, bits: int, block_size: int) -> int:
        """Bytes of integers and 16-bit scales, the last block of a row filled up (`"qdq"` has no filling: at most these)."""
        return self.rows * -(-self.columns // block_size) * (block_size * bits // 8 + 2)


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


# `(matrix, bits, block_size)` -> the matrix in integers
Rounding = Callable[[np.ndarray, int, int], RoundedMatrix]


def narrowed(numbers: np.ndarray) -> np.ndarray:
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
        bits (`int`): 4 or 8.
        columns (`int`): Columns of the matrix, without the filling.
        zero_points (`np.ndarray` of shape `[rows, blocks]`, *optional*): `2**(bits - 1)` if not given.

    Returns:
        `np.ndarray` of shape `[rows, columns]`, float32.
    """
    codes = unpack(integers, bits).reshape(*scales.shape, -1).astype(np.float32)
    codes -= np.float32(2 ** (bits - 1)) if zero_points is None else zero_points[..., None]
    # in place: a whole layer of such matrices is held while the next ones are rounded
    codes *= scales[..., None]
    return codes.reshape(len(scales), -1)[:, :columns]


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[rows, blocks, block_size]` as the bytes that are stored, `[rows, bytes]`."""
    codes = codes.reshape(len(codes), -1)
    return codes if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(integers: np.ndarray, bits: int) -> np.ndarray:
    """The codes of stored bytes `[rows, bytes]`, one by one, with the filling."""
    return integers if bits == 8 else np.stack([integers & 15, integers >> 4], axis=-1).reshape(len(integers), -1)


def reciprocal(scale: np.ndarray) -> np.ndarray:
    """What to multiply by instead of dividing: 0 for a block of zeros, or of numbers too small to divide by."""
    return np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) > np.finfo(np.float32).tiny)
