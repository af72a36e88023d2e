"""A graph of float32 made one of float16: weights, activations and cache in 16 bits, as graphics processors want it.

What 16 bits would spoil stays in float32, with a `Cast` at the border: the angles of positions, which float16 cannot count
beyond 2048; powers, means and roots of norms, whose squares end at 65504; the softmax; and the logits that come out.
"""

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from ...errors import ExportError
from .file import store_tensor, stored_shape, stored_tensor

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
LARGEST = float(np.finfo(np.float16).max)
# products, and what ONNX Runtime computes inside with more digits than it takes and gives
_IN_16_BITS = (
    "DequantizeLinear",
    "GatherBlockQuantized",
    "Gemm",
    "GroupQueryAttention",
    "MatMul",
    "MatMulNBits",
    "RotaryEmbedding",
)
_SUMS = ("Add", "LayerNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
_IN_32_BITS = (
    "Cos",
    "CumSum",
    "Exp",
    "Log",
    "Pow",
    "Range",
    "Reciprocal",
    "ReduceMean",
    "ReduceSum",
    "Sin",
    "Softmax",
    "Softplus",
    "Sqrt",
)
# of operators whose first input is another: the one that has the numbers
_NUMBERS_AT = {"DequantizeLinear": 1, "GatherBlockQuantized": 2, "Where": 1}
# what these give is no number of the model's
_NO_NUMBERS = (
    "Shape",
    "Size",
    "NonZero",
    "TopK",
    "ArgMax",
    "IsNaN",
    "Not",
    "Equal",
    "Less",
    "LessOrEqual",
    "Greater",
    "GreaterOrEqual",
)


def to_float16(graph: ir.Model, *, wide_sums: bool = False) -> None:
    """Let a graph compute in float16, in place; what is stored is rounded while it is written.

    Inputs and outputs of the cache become float16; logits stay float32.

    Args:
        graph (`onnx_ir.Model`): The graph of a file, in float32; quantized or not.
        wide_sums (`bool`): Also keep sums and norms in float32, and with them the residual stream: for models whose hidden states leave
            float16's range. Costs a `Cast` before and behind each product.
    """
    _Halving(graph, wide_sums).run()


class _Halving:
    """One pass over a graph, from its inputs on: which values are in 16 bits, and which must be cast where."""

    def __init__(self, graph: ir.Model, wide_sums: bool):
        self.graph = graph.graph
        self.wide = {*_IN_32_BITS, *(_SUMS if wide_sums else ())}
        self.narrow_nodes = {*_IN_16_BITS, *(() if wide_sums else _SUMS[1:])}
        self.angles = self._before(node for node in self.graph if node.op_type in ("Cos", "Sin"))
        self.narrow: set[ir.Value] = set()
        # the same value in the other type, made once
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.float: dict[ir.Value, bool] = {}

    def run(self) -> None:
        for given in self.graph.inputs:
            if not given.is_initializer() and self._is_float(given):
                self._make_narrow(given)
        for node in list(self.graph):
            if self._is_stored_cast(node):
                # scales that were stored in 16 bits, and were to be cast at load
                output, source = node.outputs[0], node.inputs[0]
                assert source is not None
                self.narrow.add(output)
                self.casts |= {(output, _HALF): source, (output, _FLOAT): output}
                continue
            in_16_bits = self._in_16_bits(node)
            for index, value in enumerate(node.inputs):
                if value is not None and self._is_float(value):
                    node.replace_input_with(index, self._as(value, _HALF if in_16_bits else _FLOAT))
            if in_16_bits and node.op_type == "Cast" and self._is_float(node.outputs[0]):
                node.attributes["to"] = ir.AttrInt64("to", _HALF)
            for index, output in enumerate(node.outputs):
                # a norm's second and third output, its mean and deviation, are float32 whatever it takes
                if in_16_bits and self._is_float(output) and not (index in (1, 2) and node.op_type in _SUMS):
                    self._make_narrow(output)
        self._keep_outputs()
        self._remove_unused()

    def _in_16_bits(self, node: ir.Node) -> bool:
        if node in self.angles or node.op_type in self.wide:
            return False
        if node.op_type in self.narrow_nodes:
            return True
        computed = [value for value in node.inputs if value is not None and self._is_float(value)]
        computed = [value for value in computed if not value.is_initializer()]
        if node.op_type == "Concat":
            # the past is never cast for the sake of one more token
            return not computed or any(value in self.narrow for value in computed)
        if node.op_type == "Cast" and not computed:
            # codes of weights are small numbers; positions and lengths are not
            return _is_of_codes(node.inputs[0])
        return all(value in self.narrow for value in computed)

    def _before(self, nodes: Iterable[ir.Node]) -> set[ir.Node]:
        """These nodes and all that they are computed from."""
        found, waiting = set[ir.Node](), list(nodes)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += [p for value in node.inputs if value is not None and (p := value.producer()) is not None]
        return found

    def _is_float(self, value: ir.Value) -> bool:
        """Whether a value was float32 in the graph that was given, or would have been."""
        if value not in self.float:
            self.float[value] = self._was_float(value)
        return self.float[value]

    def _was_float(self, value: ir.Value) -> bool:
        if value.is_initializer():
            return stored_tensor(value).dtype in (_FLOAT, _HALF)
        if value.dtype is not None:
            return value.dtype == _FLOAT
        node = value.producer()
        if node is None or node.op_type in _NO_NUMBERS:
            return False
        if node.op_type == "Cast":
            return node.attributes.get_int("to") == _FLOAT
        # an operator's numbers come from what it computes with, not from where it looks or what it asks
        first = node.inputs[_NUMBERS_AT.get(node.op_type, 0)]
        return first is not None and self._is_float(first)

    def _is_stored_cast(self, node: ir.Node) -> bool:
        source = node.inputs[0] if node.op_type == "Cast" else None
        return source is not None and source.is_initializer() and stored_tensor(source).dtype == _HALF

    def _make_narrow(self, value: ir.Value) -> None:
        # a new one: values that took over from another share its type
        value.type = ir.TensorType(_HALF)
        self.narrow.add(value)

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if value.is_initializer():
            return self._stored_as(value, dtype)
        if (value in self.narrow) == (dtype == _HALF) and (value, dtype) not in self.casts:
            return value
        if (value, dtype) not in self.casts:
            cast = ir.node("Cast", [value], {"to": dtype}, name=f"{value.name}_{dtype.name.lower()}")
            output = cast.outputs[0]
            output.name, output.shape, output.type = cast.name, value.shape, ir.TensorType(dtype)
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(self.graph[0], cast)
            else:
                self.graph.insert_after(producer, cast)
            self.casts[value, dtype], self.float[output] = output, True
        return self.casts[value, dtype]

    def _stored_as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if dtype == _FLOAT or stored_tensor(value).dtype == _HALF:
            return value
        if (value, dtype) not in self.casts:
            self.casts[value, dtype] = store_tensor(self.graph, f"{value.name}_float16", _rounded(value))
        return self.casts[value, dtype]

    def _keep_outputs(self) -> None:
        """The logits are given in float32, the cache in 16 bits."""
        for index, value in enumerate(list(self.graph.outputs)):
            wanted = _FLOAT if value.name == "logits" else _HALF
            if not self._is_float(value) or (value in self.narrow) == (wanted == _HALF):
                continue
            name = str(value.name)
            value.name = f"{name}_{'float16' if wanted == _FLOAT else 'float32'}"
            output = self._as(value, wanted)
            output.name = name
            self.graph.outputs[index] = output

    def _remove_unused(self) -> None:
        outputs, inputs = set(self.graph.outputs), set(self.graph.inputs)
        for node in reversed(list(self.graph)):
            if node.op_type == "Cast" and not any(value.uses() or value in outputs for value in node.outputs):
                self.graph.remove(node, safe=True)
        stored = self.graph.initializers
        for name in [name for name, value in stored.items() if not value.uses() and value not in inputs]:
            del stored[name]
            # a weight keeps its name where it is stored once
            if (narrow := stored.get(f"{name}_float16")) is not None:
                narrow.name = name
                stored_tensor(narrow).name = name


def _is_of_codes(value: ir.Value | None) -> bool:
    """Whether an integer value has at most 8 bits."""
    while value is not None and value.dtype is None and (node := value.producer()) is not None:
        value = node.inputs[0]
    return value is not None and value.dtype is not None and value.dtype.bitwidth <= 8


def _rounded(value: ir.Value) -> np.ndarray | ir.LazyTensor:
    """A stored tensor in float16, made when it is written."""
    tensor = stored_tensor(value)
    shape = stored_shape(tensor)
    if not shape:
        # such as the smallest number of float32, which masks
        number = np.asarray(tensor.numpy())
        return (
            np.clip(number, -LARGEST, LARGEST).astype(np.float16) if np.isfinite(number) else number.astype(np.float16)
        )
    name = str(value.name)
    return ir.LazyTensor(
        lambda: ir.tensor(_in_range(name, tensor.numpy())), dtype=_HALF, shape=ir.Shape(shape), name=name
    )


def _in_range(name: str, numbers: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        narrow = numbers.astype(np.float16)
    if not np.isfinite(narrow).all():
        largest = float(np.abs(numbers).max())
        rule = f"a number of {largest:g} does not fit into float16, which ends at {LARGEST:g}"
        raise ExportError.of(name, largest, rule, "Leave float16 files out of quantization.weights")
    return narrow
