"""Weight-only int8 and int4 for an ONNX graph, in blocks along the input axis.

What is quantized and with which integers is decided here; `contrib` and `qdq` say what nodes that makes.
Everything that is no linear layer and no embedding, such as the norms' weights, stays in float32.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import numpy as np
import onnx_ir as ir

from ...errors import QuantizationError
from ..rounding.matrices import GraphMatrix, IntegerForm, RoundedMatrix, Rounding
from ..rounding.nearest import NEAREST, round_to_nearest
from .contrib import ContribNodes
from .count import QuantizedNodes
from .file import store_tensor, stored_shape, stored_tensor
from .float_graph import is_stored_matrix, stored_weight, transposed_weight
from .node_format import NodeFormat, StoredMatrix
from .qdq import QdqNodes
from .unpacked import UnpackedNodes

_FORMATS: dict[str, type[ContribNodes] | type[QdqNodes]] = {
    "contrib": ContribNodes,
    "qdq": QdqNodes,
    "unpacked": UnpackedNodes,
}
# Nodes that may lie between the token ids and the embedding.
_SAME_TOKENS = ("Cast", "Identity", "Reshape", "ScatterND", "Where")


def graph_matrices(graph: ir.Model, quantize_embeddings: bool) -> dict[str, GraphMatrix]:
    """The matrices that [`quantize_graph`] stores in integers, by name.

    Args:
        graph (`onnx_ir.Model`): From [`~exporters.graph.float_graph.export_float_graph`].
        quantize_embeddings (`bool`): Also the embedding, and a head that is tied to it.

    Returns:
        `dict[str, GraphMatrix]`
    """
    embeddings = [node.inputs[0] for node in graph.graph if _is_embedding(node)]
    looked_up = {_name(value) for value in embeddings}
    routers = _routers(graph.graph)
    found: dict[str, GraphMatrix] = {}
    for node in graph.graph:
        weight, transposed = _matmul_weight(node)
        if weight is not None and _name(weight) not in looked_up:
            shape = stored_shape(stored_tensor(weight))
            rows, columns = shape if transposed else shape[::-1]
            found[_name(weight)] = GraphMatrix(rows, columns, node in routers)
    for value in embeddings if quantize_embeddings else ():
        rows, columns = stored_shape(stored_tensor(value))
        found[_name(value)] = GraphMatrix(rows, columns)
    return found


def quantize_graph(
    graph: ir.Model,
    bits: int,
    *,
    block_size: int,
    accuracy_level: int,
    quantize_embeddings: bool,
    rounded: Mapping[str, RoundedMatrix] | None = None,
    planned: Mapping[str, IntegerForm] | None = None,
    only_rounded: bool = False,
    format: str = "contrib",
    rounding: Rounding | None = None,
    keep: Callable[[np.ndarray], np.ndarray] | None = None,
) -> QuantizedNodes:
    """Quantize the weights of every `MatMul` and of the embedding, in place.

    The head of a model with tied embeddings takes the embedding's integers and stores none of its own; without
    `quantize_embeddings` both stay in float32. The matrices that choose the experts always get 8 bits: they are small,
    and a rounding error there sends tokens to other experts.

    Args:
        graph (`onnx_ir.Model`): From [`~exporters.graph.float_graph.export_float_graph`].
        bits (`int`): 4 or 8.
        block_size (`int`): Weights that share a scale: a power of two, at least 16.
        accuracy_level (`int`): Of the products: 4 multiplies in int8, 1 in float32, 0 is ONNX Runtime's choice.
        quantize_embeddings (`bool`): Also the embedding.
        rounded (`Mapping[str, RoundedMatrix]`, *optional*): Weights that were rounded before, by name; the others are
            rounded to nearest. A matrix that chooses experts is taken from here in 8 bits only.
        planned (`Mapping[str, IntegerForm]`, *optional*): Of weights that have other bits than `bits`, by their names.
        only_rounded (`bool`): Leave weights in float32 that are not in `rounded`.
        format (`str`): `"contrib"` for operators of ONNX Runtime, `"qdq"` for standard ones, `"unpacked"` for such that make float32
            of the weights at load.
        rounding (`Callable`, *optional*): `(matrix, bits, block_size)` -> [`RoundedMatrix`], for weights of `bits` bits that
            are not in `rounded`; to nearest if not given. What is looked up is rounded to nearest: that operator has no zero
            points that are no integers.
        keep (`Callable`, *optional*): Puts an array that is made here where it may stay until the graph is written; main memory
            if not given.

    Returns:
        [`QuantizedNodes`]: What was quantized, counted in the graph.

    Raises:
        QuantizationError: If a weight in `rounded` is none of the graph's.
    """
    rounded = rounded or {}
    embeddings = [node for node in graph.graph if _is_embedding(node)]
    looked_up = {_name(node.inputs[0]) for node in embeddings}
    nodes: NodeFormat = _FORMATS[format](partial(store_tensor, graph.graph), accuracy_level)
    quantizer = _GraphQuantizer(
        graph,
        nodes,
        looked_up,
        bits,
        block_size,
        rounded,
        planned or {},
        rounding or round_to_nearest,
        keep or (lambda x: x),
    )
    routers = _routers(graph.graph)
    for node in list(graph.graph):
        weight, transposed = _matmul_weight(node)
        if weight is None or (weight.name in looked_up and not quantize_embeddings):
            continue
        if not only_rounded or weight.name in rounded:
            quantizer.quantize_matmul(node, weight, transposed, node in routers)
    if quantize_embeddings:
        for node in embeddings:
            quantizer.quantize_embedding(node)
    quantizer.check_used()
    quantizer.remove_unused()
    return nodes.finish(graph)


def check_quantized_nodes(graph: ir.Model, found: QuantizedNodes, expected: QuantizedNodes) -> None:
    """Check that nothing was left in float.

    Raises:
        QuantizationError: If the counts differ; names the nodes whose weights are still in float32.
    """
    if found == expected:
        return
    left = [f"{node.op_type} {node.name} ({weight})" for node, weight in _float_nodes(graph.graph)]
    raise QuantizationError.of(
        "quantized graph",
        ", ".join(left) or "no weight in float32",
        f"{found.matmuls} linear layers and {found.embeddings} embeddings are quantized, "
        f"the model has {expected.matmuls} and {expected.embeddings}; the value lists what is still in float32",
        "Set quantization.weights to [] to export the float32 file alone",
    )


def _float_nodes(nodes: Iterable[ir.Node]) -> Iterator[tuple[ir.Node, str]]:
    """Nodes that multiply by, or look up in, a float32 matrix of the graph; with that matrix's name."""
    for node in nodes:
        weight = _matmul_weight(node)[0]
        if weight is not None:
            yield node, _name(weight)
        elif _is_embedding(node):
            yield node, _name(node.inputs[0])
        elif node.op_type == "Gemm" and is_stored_matrix(node.inputs[1]):
            yield node, _name(node.inputs[1])


def _is_embedding(node: ir.Node) -> bool:
    """Whether a node looks tokens up; embeddings of positions stay in float32, they are small."""
    if node.op_type != "Gather" or node.domain not in ("", "ai.onnx") or not is_stored_matrix(node.inputs[0]):
        return False
    waiting = [node.inputs[1]]
    while waiting:
        value = waiting.pop()
        producer = value.producer() if value is not None else None
        if producer is not None and producer.op_type in _SAME_TOKENS:
            waiting += producer.inputs
        elif value is not None and value.name == "input_ids":
            return True
    return False


def _routers(nodes: Iterable[ir.Node]) -> set[ir.Node]:
    """The `MatMul`s on whose result experts are chosen: the nearest ones before each `TopK` or `ArgMax`."""
    routers, seen = set(), set()
    waiting = [node for node in nodes if node.op_type in ("TopK", "ArgMax")]
    while waiting:
        for value in waiting.pop().inputs:
            producer = value.producer() if value is not None else None
            if producer is None or producer in seen:
                continue
            seen.add(producer)
            if producer.op_type != "MatMul":
                waiting.append(producer)
            elif _matmul_weight(producer)[0] is not None:
                routers.add(producer)
    return routers


def _matmul_weight(node: ir.Node) -> tuple[ir.Value | None, bool]:
    """The stored matrix that a `MatMul` multiplies by, and whether it is stored as `[outputs, inputs]`."""
    if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
        return None, False
    return stored_weight(node.inputs[1])


def _name(value: ir.Value | None) -> str:
    return str(value.name) if value is not None else ""


class _GraphQuantizer:
    """Replaces nodes of one graph; a weight with several uses is quantized and stored once."""

    def __init__(
        self,
        graph: ir.Model,
        nodes: NodeFormat,
        looked_up: set[str],
        bits: int,
        block_size: int,
        rounded: Mapping[str, RoundedMatrix],
        planned: Mapping[str, IntegerForm],
        rounding: Rounding,
        keep: Callable[[np.ndarray], np.ndarray],
    ):
        self.graph = graph.graph
        self.keep = keep
        self.nodes = nodes
        self.looked_up = looked_up
        self.bits = bits
        self.block_size = block_size
        self.rounded = rounded
        self.planned = planned
        self.rounding = rounding
        self.done: dict[str, StoredMatrix] = {}
        # one matrix may be given under all the names that share it
        self.used: set[int] = set()

    def quantize_matmul(self, node: ir.Node, weight: ir.Value, transposed: bool, is_router: bool) -> None:
        inputs = node.inputs[0]
        assert inputs is not None
        self._replace(node, self.nodes.product(str(node.name), inputs, self._quantize(weight, transposed, is_router)))

    def quantize_embedding(self, node: ir.Node) -> None:
        weight, ids = node.inputs
        assert weight is not None and ids is not None
        self._replace(node, self.nodes.look_up(str(node.name), ids, self._quantize(weight, True, False)))

    def remove_unused(self) -> None:
        """Remove the float weights that no node uses any more, and their `Transpose` nodes."""
        for node in list(self.graph):
            if transposed_weight(node) is not None and not node.outputs[0].uses():
                self.graph.remove(node, safe=True)
        for name in self.done:
            if not self.graph.initializers[name].uses():
                del self.graph.initializers[name]

    def check_used(self) -> None:
        """Check that every weight that was rounded before is in the graph."""
        lost = [name for name, matrix in self.rounded.items() if id(matrix) not in self.used]
        if lost:
            rule = f"{len(lost)} weights that were rounded for it are not in the exported graph under their names"
            remedy = f'Use the method "{NEAREST}", and report this with the model\'s name'
            raise QuantizationError.of("quantized graph", ", ".join(lost), rule, remedy)

    def _quantize(self, weight: ir.Value, transposed: bool, is_router: bool) -> StoredMatrix:
        name = _name(weight)
        if name not in self.done:
            matrix = self._rounded(weight, transposed, is_router)
            stored = self.nodes.layout(matrix, name in self.looked_up)
            integers, scales = self._kept(stored.integers, matrix.integers), self._kept(stored.scales, matrix.scales)
            zero_points = stored.zero_points
            self.done[name] = StoredMatrix(
                name,
                self._initializer(f"{name}_int{matrix.bits}", integers),
                self._initializer(f"{name}_scales", scales),
                None if zero_points is None else self._initializer(f"{name}_zero_points", zero_points),
                matrix.bits,
                matrix.block_size,
                matrix.scales.shape[0],
                matrix.columns,
                name in self.looked_up,
            )
        return self.done[name]

    def _rounded(self, weight: ir.Value, transposed: bool, is_router: bool) -> RoundedMatrix:
        given = self.rounded.get(_name(weight))
        if given is not None:
            self.used.add(id(given))
            if given.bits == 8 or not is_router:
                return given
        matrix = stored_tensor(weight).numpy()
        form = self.planned.get(_name(weight), IntegerForm(8 if is_router else self.bits, self.block_size))
        rounding = (
            self.rounding if form.bits == self.bits and _name(weight) not in self.looked_up else round_to_nearest
        )
        return rounding(matrix if transposed else matrix.T, form.bits, form.block_size).kept(self.keep)

    def _kept(self, array: np.ndarray | ir.TensorProtocol, of: np.ndarray) -> np.ndarray | ir.TensorProtocol:
        """What a format stores, where it may stay; a view of what was kept before is there already."""
        if isinstance(array, ir.PackedTensor):
            return ir.PackedTensor(self.keep(array.numpy_packed()), array.dtype, shape=array.shape)
        if not isinstance(array, np.ndarray) or np.may_share_memory(array, of):
            return array
        return self.keep(array)

    def _initializer(self, name: str, content: np.ndarray | ir.TensorProtocol) -> ir.Value:
        return store_tensor(self.graph, name, content)

    def _replace(self, node: ir.Node, new: list[ir.Node]) -> None:
        old_output, output = node.outputs[0], new[-1].outputs[0]
        output.shape, output.type, output.name = old_output.shape, old_output.type, old_output.name
        self.graph.insert_before(node, new)
        old_output.replace_all_uses_with(output, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
