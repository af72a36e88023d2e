"""Quantized nodes for runtimes without fast kernels for integers: weights become float32 when the file is loaded.

What makes float32 of the stored integers depends on stored numbers alone, so that ONNX Runtime computes it once, at load, and
what runs are the products of the float32 file: as fast as these, and with as much memory. Only operators and types are
used that its build for WebAssembly has: no int4, no `GatherBlockQuantized`.
"""

import numpy as np
import onnx_ir as ir

from ..rounding.matrices import RoundedMatrix
from .count import QuantizedNodes
from .node_format import Layout, StoredMatrix, slice_columns
from .qdq import QdqNodes, count_look_ups, halves

_UNPACKED = "_unpacked"


class UnpackedNodes(QdqNodes):
    """The nodes of `export.format="unpacked"`; a [`~exporters.graph.node_format.NodeFormat`]. Look-ups are those of `"qdq"`."""

    def layout(self, matrix: RoundedMatrix, is_embedding: bool) -> Layout:
        """As in `"qdq"`, but for products in 4 bits: uint8 `[ceil(columns / 2), rows]`, the first half of the columns in the lower
        halves of the bytes."""
        layout = super().layout(matrix, is_embedding)
        if is_embedding or matrix.bits == 8:
            return layout
        codes = halves(matrix.codes() ^ np.uint8(8))
        return Layout(np.ascontiguousarray(codes.T), layout.scales, layout.zero_points)

    def product(self, name: str, inputs: ir.Value, matrix: StoredMatrix) -> list[ir.Node]:
        nodes = self._float_weight(name, matrix)
        return [*nodes, ir.node("MatMul", [inputs, nodes[-1].outputs[0]], name=name)]

    def finish(self, graph: ir.Model) -> QuantizedNodes:
        weights = [node.inputs[1] for node in graph.graph if node.op_type == "MatMul"]
        makers = [weight.producer() for weight in weights if weight is not None]
        matmuls = sum(node is not None and str(node.name).endswith(_UNPACKED) for node in makers)
        return QuantizedNodes(matmuls, count_look_ups(graph))

    def _float_weight(self, name: str, matrix: StoredMatrix) -> list[ir.Node]:
        """Nodes whose last one is `[columns, rows]`; not `DequantizeLinear`, of which ONNX Runtime would make its own product."""
        nodes = list[ir.Node]()

        def add(kind: str, *given: ir.Value | None, **options) -> ir.Value:
            nodes.append(ir.node(kind, given, **options))
            return nodes[-1].outputs[0]

        scales, axis = matrix.scales, -1 if matrix.is_embedding else 0
        if matrix.bits == 4:
            nodes += self.unpack(name, matrix.integers, matrix.columns, axis)
            nodes += self.signed(name, nodes[-1].outputs[0])
        else:
            add("Cast", matrix.integers, attributes={"to": ir.DataType.FLOAT})
        weight = nodes[-1].outputs[0]
        if matrix.is_embedding:
            weight, scales = (add("Transpose", value, attributes={"perm": [1, 0]}) for value in (weight, scales))
        filling = -matrix.columns % matrix.block_size
        if filling:
            weight = add("Pad", weight, self.sizes(f"{name}_filling", 0, 0, filling, 0))
        weight = add("Reshape", weight, self.sizes(f"{name}_in_blocks", matrix.blocks, matrix.block_size, -1))
        block_axis = self.sizes(f"{name}_block_axis", 1)
        weight = add("Mul", weight, add("Unsqueeze", scales, block_axis))
        if matrix.zero_points is not None:
            weight = add("Add", weight, add("Unsqueeze", matrix.zero_points, block_axis))
        weight = add("Reshape", weight, self.sizes(f"{name}_in_rows", -1, matrix.rows))
        if filling:
            nodes.append(slice_columns(self.store, f"{name}_cut", weight, matrix.columns, 0))
        nodes[-1].name = f"{name}{_UNPACKED}"
        return nodes
