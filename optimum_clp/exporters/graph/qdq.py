"""Quantized nodes in standard operators of opset 21 alone: `DequantizeLinear` with a scale for each block.

A product is `MatMul(x, DequantizeLinear(integers, scales))` with integers `[columns, rows]` of 4 or 8 bits, the layout that
ONNX Runtime turns into its `MatMulNBits` when it loads the file. A look-up multiplies the integers that it has gathered by their scales. An
embedding may be the head too: what the head does to it, up to its `DequantizeLinear`, is folded at load.
"""

import numpy as np
import onnx_ir as ir

from ...runtime.names import ACCURACY_LEVEL
from ..rounding.matrices import RoundedMatrix
from .count import QuantizedNodes
from .node_format import Layout, Store, StoredMatrix, slice_columns


class QdqNodes:
    """The nodes of `export.format="qdq"`; a [`~exporters.graph.node_format.NodeFormat`].

    Args:
        store (`Callable`): Stores a tensor in the graph.
        accuracy_level (`int`): Of the products, written to the file's metadata: no standard operator has it.
    """

    def __init__(self, store: Store, accuracy_level: int):
        self.store = store
        self.accuracy_level = accuracy_level

    def layout(self, matrix: RoundedMatrix, is_embedding: bool) -> Layout:
        """Signed integers without a zero point, and no filling at the ends of rows.

        Products take int4 or int8 `[columns, rows]` with scales `[blocks, rows]`. An embedding is `[rows, columns]`, its
        scales `[rows, blocks]`; in 4 bits, which `Gather` of opset 21 does not take, uint8 `[rows, ceil(columns / 2)]` with the
        row's first half in the lower halves of the bytes. In place of float zero points stands what they add to each block
        of ones, `[blocks, rows]`.
        """
        half = 2 ** (matrix.bits - 1)
        scales, zero_points = matrix.scales, matrix.zero_points
        # two's complement has the highest bit the other way round
        codes = matrix.codes() ^ np.uint8(half)
        if is_embedding:
            return Layout(halves(codes) if matrix.bits == 4 else codes.view(np.int8), scales, None)
        codes = np.ascontiguousarray(codes.T)
        integers = _int4(codes) if matrix.bits == 4 else codes.view(np.int8)
        shifts = None if zero_points is None else np.ascontiguousarray(((half - zero_points) * scales).T)
        return Layout(integers, np.ascontiguousarray(scales.T), shifts)

    def product(self, name: str, inputs: ir.Value, matrix: StoredMatrix) -> list[ir.Node]:
        integers, scales, nodes = matrix.integers, matrix.scales, list[ir.Node]()
        if matrix.is_embedding:
            if matrix.bits == 4:
                nodes += self.unpack(name, integers, matrix.columns)
                integers = nodes[-1].outputs[0]
            nodes.append(ir.node("Transpose", [integers], {"perm": [1, 0]}))
            integers = nodes[-1].outputs[0]
            if matrix.bits == 4:
                # OpenVINO does not cut bits off where ONNX says that a conversion does: convert what fits
                nodes += self.signed(f"{name}_head", integers)
                nodes.append(ir.node("Cast", [nodes[-1].outputs[0]], {"to": ir.DataType.INT4}))
                integers = nodes[-1].outputs[0]
            nodes.append(ir.node("Transpose", [scales], {"perm": [1, 0]}))
            scales = nodes[-1].outputs[0]
        nodes.append(_dequantize([integers, scales], 0, matrix.block_size, f"{name}_dequantize"))
        nodes.append(ir.node("MatMul", [inputs, nodes[-1].outputs[0]], name=name))
        if matrix.zero_points is not None:
            nodes += self._add_shifts(name, inputs, nodes[-1].outputs[0], matrix.zero_points, matrix)
        return nodes

    def look_up(self, name: str, ids: ir.Value, matrix: StoredMatrix) -> list[ir.Node]:
        # not by DequantizeLinear, which OpenVINO does for stored numbers alone
        integers = ir.node("Gather", [matrix.integers, ids], {"axis": 0}, name=name)
        scales = ir.node("Gather", [matrix.scales, ids], {"axis": 0}, name=f"{name}_scales")
        nodes = [integers, scales]
        if matrix.bits == 4:
            nodes += self.unpack(name, integers.outputs[0], matrix.columns)
            nodes += self.signed(name, nodes[-1].outputs[0])
        else:
            nodes.append(ir.node("Cast", [integers.outputs[0]], {"to": ir.DataType.FLOAT}))
        numbers = nodes[-1].outputs[0]
        rank = len(ids.shape) if ids.shape is not None else 2
        if matrix.columns % matrix.block_size:
            pads = self.sizes(f"{name}_pads", 0, -matrix.columns % matrix.block_size)
            nodes.append(ir.node("Pad", [numbers, pads, None, self.sizes(f"{name}_padded", -1)]))
            numbers = nodes[-1].outputs[0]
        # a size of 0 is the input's own
        blocks = self.sizes(f"{name}_blocks", *[0] * rank, matrix.blocks, matrix.block_size)
        in_blocks = ir.node("Reshape", [numbers, blocks])
        wide = ir.node("Unsqueeze", [scales.outputs[0], self.sizes(f"{name}_last", -1)])
        scaled = ir.node("Mul", [in_blocks.outputs[0], wide.outputs[0]], name=f"{name}_scaled")
        width = self.sizes(f"{name}_width", *[0] * rank, matrix.blocks * matrix.block_size)
        nodes += [in_blocks, wide, scaled, ir.node("Reshape", [scaled.outputs[0], width])]
        if matrix.columns % matrix.block_size:
            nodes.append(slice_columns(self.store, f"{name}_row", nodes[-1].outputs[0], matrix.columns))
        return nodes

    def finish(self, graph: ir.Model) -> QuantizedNodes:
        graph.metadata_props[ACCURACY_LEVEL] = str(self.accuracy_level)
        dequantized = {node.outputs[0] for node in graph.graph if node.op_type == "DequantizeLinear"}
        matmuls = sum(node.op_type == "MatMul" and node.inputs[1] in dequantized for node in graph.graph)
        return QuantizedNodes(matmuls, count_look_ups(graph))

    def unpack(self, name: str, packed: ir.Value, columns: int, axis: int = -1) -> list[ir.Node]:
        """Nodes whose last one has one number for each weight of bytes, with the integer in its lower 4 bits."""
        bits = self.store(f"{name}_bits", np.array(4, dtype=np.uint8))
        # OpenVINO shifts by a division that it rounds: only what leaves no rest is right there
        alone = ir.node("BitwiseAnd", [packed, self.store(f"{name}_upper", np.array(240, dtype=np.uint8))])
        upper = ir.node("BitShift", [alone.outputs[0], bits], {"direction": "RIGHT"})
        both = ir.node("Concat", [packed, upper.outputs[0]], {"axis": axis})
        if columns % 2 == 0:
            return [alone, upper, both]
        return [alone, upper, both, slice_columns(self.store, name, both.outputs[0], columns, axis)]

    def signed(self, name: str, unpacked: ir.Value) -> list[ir.Node]:
        """Nodes whose last one has what [`unpack`] gives as float32, from -8 to 7."""
        lower = ir.node("BitwiseAnd", [unpacked, self.store(f"{name}_lower", np.array(15, dtype=np.uint8))])
        # two's complement with the highest bit the other way round is 8 more than the number
        turned = ir.node("BitwiseXor", [lower.outputs[0], self.store(f"{name}_sign", np.array(8, dtype=np.uint8))])
        number = ir.node("Cast", [turned.outputs[0]], {"to": ir.DataType.FLOAT})
        half = self.store(f"{name}_half", np.array(8, dtype=np.float32))
        return [lower, turned, number, ir.node("Sub", [number.outputs[0], half])]

    def _add_shifts(
        self, name: str, inputs: ir.Value, product: ir.Value, shifts: ir.Value, matrix: StoredMatrix
    ) -> list[ir.Node]:
        """Zero points that are no integers: what they add to a product depends on the sums of the inputs' blocks alone."""
        nodes = []
        filling = -matrix.columns % matrix.block_size
        if filling:
            pads, axes = self.sizes(f"{name}_pads", 0, filling), self.sizes(f"{name}_padded_axis", -1)
            nodes.append(ir.node("Pad", [inputs, pads, None, axes]))
            inputs = nodes[0].outputs[0]
        shape = self.sizes(f"{name}_blocks", -1, matrix.blocks, matrix.block_size)
        blocks = ir.node("Reshape", [inputs, shape])
        sums = ir.node("ReduceSum", [blocks.outputs[0], self.sizes(f"{name}_summed_axis", 2)], {"keepdims": 0})
        shift = ir.node("MatMul", [sums.outputs[0], shifts], name=f"{name}_shift")
        size = ir.node("Shape", [product])
        reshaped = ir.node("Reshape", [shift.outputs[0], size.outputs[0]])
        return [*nodes, blocks, sums, shift, size, reshaped, ir.node("Add", [product, reshaped.outputs[0]])]

    def sizes(self, name: str, *sizes: int) -> ir.Value:
        """Stored sizes or positions, int64."""
        return self.store(name, np.array(sizes, dtype=np.int64))


def count_look_ups(graph: ir.Model) -> int:
    """Look-ups in a stored table of integers; those of its scales do not count."""
    tables = [node.inputs[0] for node in graph.graph if node.op_type == "Gather"]
    return sum(t is not None and t.dtype in (ir.DataType.INT8, ir.DataType.UINT8) for t in tables)


def _dequantize(inputs: list[ir.Value], axis: int, block_size: int, name: str) -> ir.Node:
    return ir.node("DequantizeLinear", inputs, {"axis": axis, "block_size": block_size}, name=name)


def halves(codes: np.ndarray) -> np.ndarray:
    """Codes `[rows, columns]` as bytes with the first half of a row in their lower halves."""
    rows, columns = codes.shape
    middle = -(-columns // 2)
    packed = codes[:, :middle].copy()
    packed[:, : columns - middle] |= codes[:, middle:] << 4
    return packed


def _int4(codes: np.ndarray) -> ir.PackedTensor:
    """Codes as ONNX stores int4: neighbours in a byte, the first in its lower half, whatever the rows."""
    flat = codes.reshape(-1)
    packed = flat[0::2].copy()
    packed[: flat.size // 2] |= flat[1::2] << 4
    return ir.PackedTensor(packed, ir.DataType.INT4, shape=codes.shape)
