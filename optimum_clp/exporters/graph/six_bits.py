"""Integers of 6 bits as operators of ONNX Runtime: a sum of what their upper 4 bits and their lower 2 bits give.

An integer less its zero point is `4 * (upper - 8) - (lower - 2)`, each part with the zero point that the operators take where none is
stored. What is stored are the lower part's scales, the matrix's turned round; the upper part's are `-4` times these.
"""

import numpy as np
import onnx_ir as ir
import onnxruntime
from packaging.version import Version

from ...configuration.stages import QuantizationConfig
from ...errors import Problem
from ..rounding.matrices import SIX_BITS, parts_of_six_bits
from .file import store_tensor, stored_shape, stored_tensor

LEAST_ONNXRUNTIME = "1.30"
"""The first version that was measured to have fast products of 2 bits: docs/onnx_lab_notes.md, "Between 4 and 8 bits"."""

_CONTRIB = "com.microsoft"
_PRODUCT, _LOOK_UP = "MatMulNBits", "GatherBlockQuantized"
# bits of the parts of an integer, the upper one first
_PARTS = (4, 2)


def six_bits_obstacle(quantization: QuantizationConfig) -> Problem | None:
    """Why the ONNX Runtime that is installed is none for such files, if they are asked for."""
    if not quantization.six_bits or Version(onnxruntime.__version__) >= Version(LEAST_ONNXRUNTIME):
        return None
    rule = f"ONNX Runtime has fast products of this kind from {LEAST_ONNXRUNTIME} on, and {onnxruntime.__version__} is installed"
    return Problem("quantization.six_bits", True, rule, "Upgrade onnxruntime, or leave it out")


def split_six_bits(graph: ir.Model) -> int:
    """Replace the products and look-ups whose integers have 6 bits, which no runtime knows, by such as it has; in place.

    Args:
        graph (`onnx_ir.Model`): From [`~exporters.graph.quantize.quantize_graph`] in the format `"contrib"`, its projections packed.

    Returns:
        `int`: How many there were.
    """
    nodes = [
        node for node in graph.graph if node.domain == _CONTRIB and node.attributes.get_int("bits", 0) == SIX_BITS
    ]
    splitter = _Splitter(graph.graph, {node.inputs[0] for node in nodes if node.op_type == _LOOK_UP})
    for node in nodes:
        splitter.split(node)
    for name in splitter.done:
        del graph.graph.initializers[name]
    return len(nodes)


class _Splitter:
    """Replaces nodes of one graph; what several of them share is split once."""

    def __init__(self, graph: ir.Graph, looked_up: set[ir.Value | None]):
        self.graph = graph
        self.looked_up = looked_up
        self.done: dict[str, list[ir.Value]] = {}
        self.factor: ir.Value | None = None

    def split(self, node: ir.Node) -> None:
        is_look_up = node.op_type == _LOOK_UP
        # (integers, ids, scales), or (inputs, integers, scales)
        integers, scales = node.inputs[0 if is_look_up else 1], node.inputs[2]
        assert integers is not None and scales is not None
        if self.factor is None:
            self.factor = store_tensor(self.graph, "six_bits_upper", np.array(-4, dtype=np.float32))
        larger = ir.node("Mul", [scales, self.factor], name=f"{node.name}_upper_scales")
        new, terms = [larger], list[ir.Value]()
        for bits, part, of_part in zip(
            _PARTS, self._parts(integers, scales), (larger.outputs[0], scales), strict=True
        ):
            name = f"{node.name}_{bits}_bits"
            if integers in self.looked_up and not is_look_up:
                new.append(self._in_blocks(name, part, scales))
                part = new[-1].outputs[0]
            inputs = [part, node.inputs[1], of_part] if is_look_up else [node.inputs[0], part, of_part]
            new.append(ir.node(node.op_type, inputs, {**node.attributes, "bits": bits}, domain=_CONTRIB, name=name))
            terms.append(new[-1].outputs[0])
        new.append(ir.node("Add", terms, name=node.name))
        old, output = node.outputs[0], new[-1].outputs[0]
        output.shape, output.type, output.name = old.shape, old.type, old.name
        self.graph.insert_before(node, new)
        old.replace_all_uses_with(output, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def _parts(self, integers: ir.Value, scales: ir.Value) -> list[ir.Value]:
        """Of stored integers `[rows, bytes]`; `[rows, blocks, bytes]` if nothing is looked up in them."""
        name = str(integers.name)
        if name not in self.done:
            tensor, (rows, blocks) = stored_tensor(integers), stored_shape(stored_tensor(scales))
            width = stored_shape(tensor)[1]
            self.done[name] = []
            for place, bits in enumerate(_PARTS):
                size = width * bits // SIX_BITS
                shape = (rows, size) if integers in self.looked_up else (rows, blocks, size // blocks)
                self.done[name].append(self._part(f"{name}_{bits}_bits", tensor, place, shape))
        return self.done[name]

    def _part(self, name: str, tensor: ir.TensorProtocol, place: int, shape: tuple[int, ...]) -> ir.Value:
        def numbers() -> ir.TensorProtocol:
            return ir.tensor(np.ascontiguousarray(parts_of_six_bits(tensor.numpy())[place]).reshape(shape))

        return store_tensor(
            self.graph, name, ir.LazyTensor(numbers, dtype=tensor.dtype, shape=ir.Shape(shape), name=name)
        )

    def _in_blocks(self, name: str, part: ir.Value, scales: ir.Value) -> ir.Node:
        """A view of what is looked up in as a product takes it, made when the file is loaded."""
        rows, blocks = stored_shape(stored_tensor(scales))
        shape = store_tensor(self.graph, f"{name}_blocks", np.array([rows, blocks, -1], dtype=np.int64))
        return ir.node("Reshape", [part, shape], name=f"{name}_reshape")
