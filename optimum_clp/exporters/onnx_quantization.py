"""Weight-only int8 and int4 for an ONNX graph: symmetric round-to-nearest in blocks along the input axis.

Linear layers become `MatMulNBits`, the embedding becomes `GatherBlockQuantized` (both are operators of ONNX Runtime).
Everything else, such as the norms' weights, stays in float32.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir

from ..errors import Problem, QuantizationError
from .onnx_count import QuantizedNodes
from .onnx_file import stored_shape, stored_tensor
from .onnx_float import is_stored_matrix, transposed_weight

_CONTRIB = "com.microsoft"
# Rows are quantized together up to this many weights, which bounds the working memory to a few of its copies.
_CHUNK = 4 * 1024 * 1024
# Shares of the largest weight that are tried as the end of the int4 range beside 1, which ONNX Runtime's tool takes.
_INT4_RANGES = (0.95, 0.9, 0.85, 0.8)
# Nodes that may lie between the token ids and the embedding.
_SAME_TOKENS = ("Cast", "Identity", "Reshape", "ScatterND", "Where")


def quantize_blocks(weight: np.ndarray, bits: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a matrix to unsigned integers with one scale for each block of a row.

    A weight is `(integer - 2**(bits - 1)) * scale`. The scale maps the block's largest weight to the integer range's
    longer end; in 4 bits also somewhat smaller scales are tried and the one with the least squared error is taken.

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
    for start in range(0, rows, step):
        part = slice(start, start + step)
        padded = np.zeros((weight[part].shape[0], blocks * block_size), dtype=np.float32)
        padded[:, :columns] = weight[part]
        codes, scales[part] = _round_blocks(padded.reshape(-1, blocks, block_size), bits)
        codes = codes.reshape(codes.shape[0], -1)
        integers[part] = codes if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)
    return integers, scales


def dequantize_blocks(integers: np.ndarray, scales: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The matrix that [`quantize_blocks`] has stored.

    Args:
        integers (`np.ndarray`): Packed integers, from [`quantize_blocks`].
        scales (`np.ndarray` of shape `[rows, blocks]`): From [`quantize_blocks`].
        bits (`int`): 4 or 8.
        columns (`int`): Columns of the matrix, without the filling.

    Returns:
        `np.ndarray` of shape `[rows, columns]`, float32.
    """
    codes = integers if bits == 8 else np.stack([integers & 15, integers >> 4], axis=-1)
    codes = codes.reshape(*scales.shape, -1).astype(np.float32) - 2 ** (bits - 1)
    return (codes * scales[..., None]).reshape(len(scales), -1)[:, :columns]


def _round_blocks(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (uint8, the shape of `weight`) and scales (its shape without the last axis) of `[rows, blocks, size]`."""
    half = 2 ** (bits - 1)
    largest = np.take_along_axis(weight, np.abs(weight).argmax(-1, keepdims=True), -1)
    best_codes, best_scale, best_error = _round_to(weight, largest * np.float32(-1 / half), half)
    for share in _INT4_RANGES if bits == 4 else ():
        codes, scale, error = _round_to(weight, largest * np.float32(-share / half), half)
        better = error < best_error
        np.copyto(best_codes, codes, where=better)
        np.copyto(best_scale, scale, where=better)
        np.copyto(best_error, error, where=better)
    return (best_codes + half).astype(np.uint8), best_scale[..., 0]


def _round_to(weight: np.ndarray, scale: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed codes of `weight` at `scale`, the scale itself, and the squared error of each block."""
    # a block of zeros, or of numbers too small to divide by, becomes zeros
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) > np.finfo(np.float32).tiny)
    codes = np.clip(np.rint(weight * inverse), -half, half - 1)
    return codes, scale, np.square(codes * scale - weight).sum(-1, keepdims=True)


def quantize_graph(
    graph: ir.Model, bits: int, *, block_size: int, accuracy_level: int, quantize_embeddings: bool
) -> QuantizedNodes:
    """Quantize the weights of every `MatMul` and of the embedding, in place.

    The head of a model with tied embeddings takes the embedding's integers and stores none of its own; without
    `quantize_embeddings` both stay in float32. The matrices that choose the experts always get 8 bits: they are small,
    and a rounding error there sends tokens to other experts.

    Args:
        graph (`onnx_ir.Model`): From [`~exporters.onnx_float.export_float_graph`].
        bits (`int`): 4 or 8.
        block_size (`int`): Weights that share a scale: a power of two, at least 16.
        accuracy_level (`int`): Of `MatMulNBits`: 4 multiplies in int8, 1 in float32, 0 is ONNX Runtime's choice.
        quantize_embeddings (`bool`): Also the embedding.

    Returns:
        [`QuantizedNodes`]: What was quantized, counted in the graph.
    """
    embeddings = [node for node in graph.graph if _is_embedding(node)]
    tables = {_name(node.inputs[0]) for node in embeddings}
    quantizer = _GraphQuantizer(graph, tables, bits, block_size, accuracy_level)
    routers = _routers(graph.graph)
    for node in list(graph.graph):
        weight, transposed = _matmul_weight(node)
        if weight is None or (weight.name in tables and not quantize_embeddings):
            continue
        quantizer.quantize_matmul(node, weight, transposed, 8 if node in routers else bits)
    if quantize_embeddings:
        for node in embeddings:
            quantizer.quantize_embedding(node)
    quantizer.remove_unused()
    graph.opset_imports[_CONTRIB] = 1
    operators = [node.op_type for node in graph.graph if node.domain == _CONTRIB]
    return QuantizedNodes(operators.count("MatMulNBits"), operators.count("GatherBlockQuantized"))


def check_quantized_nodes(graph: ir.Model, found: QuantizedNodes, expected: QuantizedNodes) -> None:
    """Check that nothing was left in float.

    Raises:
        QuantizationError: If the counts differ; names the nodes whose weights are still in float32.
    """
    if found == expected:
        return
    left = [f"{node.op_type} {node.name} ({weight})" for node, weight in _float_nodes(graph.graph)]
    raise QuantizationError(
        Problem(
            "quantized graph",
            ", ".join(left) or "no weight in float32",
            f"{found.matmuls} linear layers and {found.embeddings} embeddings are quantized, "
            f"the model has {expected.matmuls} and {expected.embeddings}; the value lists what is still in float32",
            "Set quantization.weights to [] to export the float32 file alone",
        )
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
    """Whether a node looks tokens up; tables of positions stay in float32, they are small."""
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
    weight = node.inputs[1]
    if is_stored_matrix(weight):
        return weight, False
    producer = weight.producer() if weight is not None else None
    return (transposed_weight(producer), True) if producer is not None else (None, False)


def _name(value: ir.Value | None) -> str:
    return str(value.name) if value is not None else ""


class _GraphQuantizer:
    """Replaces nodes of one graph; a weight with several uses is quantized and stored once."""

    def __init__(self, graph: ir.Model, tables: set[str], bits: int, block_size: int, accuracy_level: int):
        self.graph = graph.graph
        self.tables = tables
        self.bits = bits
        self.block_size = block_size
        self.accuracy_level = accuracy_level
        self.done: dict[str, tuple[ir.Value, ir.Value]] = {}

    def quantize_matmul(self, node: ir.Node, weight: ir.Value, transposed: bool, bits: int) -> None:
        integers, scales = self._quantize(weight, transposed, bits)
        shape = stored_shape(stored_tensor(weight))
        outputs, inputs = shape if transposed else shape[::-1]
        new = ir.node(
            "MatMulNBits",
            [node.inputs[0], self._in_blocks(integers, scales) if weight.name in self.tables else integers, scales],
            {
                "K": inputs,
                "N": outputs,
                "bits": bits,
                "block_size": self.block_size,
                "accuracy_level": self.accuracy_level,
            },
            domain=_CONTRIB,
            name=node.name,
        )
        self._replace(node, new)

    def quantize_embedding(self, node: ir.Node) -> None:
        table = node.inputs[0]
        assert table is not None
        integers, scales = self._quantize(table, True, self.bits)
        columns = stored_shape(stored_tensor(table))[1]
        new = ir.node(
            "GatherBlockQuantized",
            [integers, node.inputs[1], scales],
            {
                "bits": self.bits,
                "block_size": self.block_size,
                "gather_axis": 0,
                "quantize_axis": 1,
            },
            domain=_CONTRIB,
            name=node.name,
        )
        if columns % self.block_size == 0:
            self._replace(node, new)
            return
        # The last block is filled up with zeros, so that the head can use the same bytes: cut them off.
        new.outputs[0].dtype = ir.DataType.FLOAT
        self.graph.insert_before(node, new)
        bounds = [
            self._constant(f"{node.name}_{key}", [v]) for key, v in (("start", 0), ("end", columns), ("axis", -1))
        ]
        self._replace(node, ir.node("Slice", [new.outputs[0], *bounds], name=f"{node.name}_slice"))

    def remove_unused(self) -> None:
        """Remove the float weights that no node uses any more, and their `Transpose` nodes."""
        for node in list(self.graph):
            if transposed_weight(node) is not None and not node.outputs[0].uses():
                self.graph.remove(node, safe=True)
        for name in self.done:
            if not self.graph.initializers[name].uses():
                del self.graph.initializers[name]

    def _quantize(self, weight: ir.Value, transposed: bool, bits: int) -> tuple[ir.Value, ir.Value]:
        name = str(weight.name)
        if name not in self.done:
            matrix = stored_tensor(weight).numpy()
            integers, scales = quantize_blocks(matrix if transposed else matrix.T, bits, self.block_size)
            if name not in self.tables:
                integers = integers.reshape(*scales.shape, -1)
            self.done[name] = (
                self._initializer(f"{name}_int{bits}", integers),
                self._initializer(f"{name}_scales", scales),
            )
        return self.done[name]

    def _in_blocks(self, integers: ir.Value, scales: ir.Value) -> ir.Value:
        """An embedding's integers for a tied head: a view `[outputs, blocks, bytes]`, made when the file is loaded."""
        shape = self._constant(f"{integers.name}_shape", [*stored_shape(stored_tensor(scales)), -1])
        reshape = ir.node("Reshape", [integers, shape], name=f"{integers.name}_reshape")
        reshape.outputs[0].name = f"{integers.name}_blocks"
        self.graph.insert_before(self.graph[0], reshape)
        return reshape.outputs[0]

    def _initializer(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _constant(self, name: str, integers: list[int]) -> ir.Value:
        return self._initializer(name, np.array(integers, dtype=np.int64))

    def _replace(self, node: ir.Node, new: ir.Node) -> None:
        old_output, output = node.outputs[0], new.outputs[0]
        output.shape, output.type, output.name = old_output.shape, old_output.type, old_output.name
        self.graph.insert_before(node, new)
        old_output.replace_all_uses_with(output, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
