"""What the two formats of quantized files have in common: a stored matrix, and the nodes that it appears in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from ..rounding.matrices import RoundedMatrix
from .count import QuantizedNodes

# Stores a tensor in the graph under a new name.
Store = Callable[[str, np.ndarray | ir.TensorProtocol], ir.Value]


@dataclass(frozen=True)
class StoredMatrix:
    """A quantized weight `[rows, columns]` in the graph.

    Args:
        name (`str`): Of the float weight.
        integers, scales (`onnx_ir.Value`): In the layout of the format.
        zero_points (`onnx_ir.Value`, *optional*): Likewise.
        bits (`int`): 4 or 8.
        block_size (`int`): Weights that share a scale.
        rows (`int`): Output features, or tokens of the embedding.
        columns (`int`): Input features, or the width of the embedding.
        is_embedding (`bool`): Whether tokens are looked up in it; it may serve the head too.
    """

    name: str
    integers: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    bits: int
    block_size: int
    rows: int
    columns: int
    is_embedding: bool

    @property
    def blocks(self) -> int:
        """Blocks in a row, the last of which may be a part of one."""
        return -(-self.columns // self.block_size)


@dataclass(frozen=True)
class Layout:
    """What is stored for a matrix, in the layout of a format."""

    integers: np.ndarray | ir.TensorProtocol
    scales: np.ndarray
    zero_points: np.ndarray | None


def slice_columns(store: Store, name: str, value: ir.Value, columns: int, axis: int = -1) -> ir.Node:
    """The first columns, which are the last axis or another."""
    bounds = (("start", 0), ("end", columns), ("axis", axis))
    stored = [store(f"{name}_{key}", np.array([bound], dtype=np.int64)) for key, bound in bounds]
    return ir.node("Slice", [value, *stored], name=f"{name}_slice")


class NodeFormat(Protocol):
    """A format's way to write products and look-ups with integers."""

    def layout(self, matrix: RoundedMatrix, is_embedding: bool) -> Layout:
        """What is stored for a matrix.

        Args:
            matrix ([`RoundedMatrix`]): Integers and scales.
            is_embedding (`bool`): Whether tokens are looked up in it.
        """

    def product(self, name: str, inputs: ir.Value, matrix: StoredMatrix) -> list[ir.Node]:
        """Nodes whose last one multiplies by the transposed matrix, `[..., columns]` to `[..., rows]`, float32."""

    def look_up(self, name: str, ids: ir.Value, matrix: StoredMatrix) -> list[ir.Node]:
        """Nodes whose last one gives rows of the matrix, int64 `[...]` to float32 `[..., columns]`."""

    def finish(self, graph: ir.Model) -> QuantizedNodes:
        """Declare what the nodes need, and count them in the graph."""
