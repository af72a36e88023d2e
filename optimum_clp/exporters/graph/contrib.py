"""Quantized nodes as operators of ONNX Runtime: `MatMulNBits` and `GatherBlockQuantized`.

Those of 6 bits are no operators yet: [`~exporters.graph.six_bits.split_six_bits`] makes such of them.
"""

import numpy as np
import onnx_ir as ir

from ..rounding.matrices import SIX_BITS, RoundedMatrix
from .count import QuantizedNodes
from .node_format import Layout, Store, StoredMatrix, slice_columns

_CONTRIB = "com.microsoft"


class ContribNodes:
    """The nodes of `export.format="contrib"`; a [`~exporters.graph.node_format.NodeFormat`].

    Args:
        store (`Callable`): Stores a tensor in the graph.
        accuracy_level (`int`): Of `MatMulNBits`.
    """

    def __init__(self, store: Store, accuracy_level: int):
        self.store = store
        self.accuracy_level = accuracy_level

    def layout(self, matrix: RoundedMatrix, is_embedding: bool) -> Layout:
        """Integers `[rows, blocks, bytes]`, of an embedding `[rows, bytes]`; the last block of a row filled up.

        Of 6 bits as [`~exporters.graph.six_bits.split_six_bits`] takes them.
        """
        if matrix.bits == SIX_BITS:
            return Layout(matrix.integers, -matrix.scales, matrix.zero_points)
        integers = matrix.integers if is_embedding else matrix.integers.reshape(*matrix.scales.shape, -1)
        return Layout(integers, matrix.scales, matrix.zero_points)

    def product(self, name: str, inputs: ir.Value, matrix: StoredMatrix) -> list[ir.Node]:
        nodes, integers = [], matrix.integers
        if matrix.is_embedding and matrix.bits != SIX_BITS:
            # a view of the embedding's integers for a tied head, made when the file is loaded
            shape = self.store(f"{name}_blocks", np.array([matrix.rows, matrix.blocks, -1], dtype=np.int64))
            nodes.append(ir.node("Reshape", [integers, shape], name=f"{name}_reshape"))
            integers = nodes[0].outputs[0]
        zero_points = [matrix.zero_points] if matrix.zero_points is not None else []
        attributes = {
            "K": matrix.columns,
            "N": matrix.rows,
            "bits": matrix.bits,
            "block_size": matrix.block_size,
            "accuracy_level": self.accuracy_level,
        }
        stored = [integers, matrix.scales, *zero_points]
        return [*nodes, ir.node("MatMulNBits", [inputs, *stored], attributes, domain=_CONTRIB, name=name)]

    def look_up(self, name: str, ids: ir.Value, matrix: StoredMatrix) -> list[ir.Node]:
        attributes = {"bits": matrix.bits, "block_size": matrix.block_size, "gather_axis": 0, "quantize_axis": 1}
        inputs = [matrix.integers, ids, matrix.scales]
        node = ir.node("GatherBlockQuantized", inputs, attributes, domain=_CONTRIB, name=name)
        if matrix.columns % matrix.block_size == 0:
            return [node]
        # The last block is filled up with zeros, so that the head can use the same bytes: cut them off.
        node.outputs[0].dtype = ir.DataType.FLOAT
        return [node, slice_columns(self.store, name, node.outputs[0], matrix.columns)]

    def finish(self, graph: ir.Model) -> QuantizedNodes:
        graph.opset_imports[_CONTRIB] = 1
        operators = [node.op_type for node in graph.graph if node.domain == _CONTRIB]
        return QuantizedNodes(operators.count("MatMulNBits"), operators.count("GatherBlockQuantized"))
