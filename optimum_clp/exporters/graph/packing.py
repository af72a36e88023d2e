"""One product for the queries, keys and values of an attention, which read the same input."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from .file import store_tensor, stored_shape, stored_tensor
from .float_graph import stored_weight

_CONTRIB = "com.microsoft"
# what may lie between a projection and the attention
_BETWEEN = ("Add", "Reshape", "RotaryEmbedding", "SimplifiedLayerNormalization")
_NUMBERS = ("K", "bits", "block_size", "accuracy_level")


def packable_weights(graph: ir.Model) -> list[frozenset[str]]:
    """The weights whose products [`pack_projections`] makes one if they are rounded alike, by their names.

    Args:
        graph (`onnx_ir.Model`): From [`~exporters.graph.float_graph.export_float_graph`], not quantized.
    """
    found = []
    for node in graph.graph:
        products = _projections(node, "MatMul")
        weights = [stored_weight(product.inputs[1])[0] for product in products]
        names = frozenset(str(weight.name) for weight in weights if weight is not None)
        if len(names) == 3 and len({product.inputs[0] for product in products}) == 1:
            found.append(names)
    return found


def pack_projections(graph: ir.Model) -> None:
    """Let one `MatMulNBits` and a `Split` make the queries, keys and values of each `GroupQueryAttention`, in place.

    Where the three have the same input, bits, block size and kind of zero points. Then the input is rounded to int8 once, and
    a decoding step starts one product instead of three. The stored integers and scales are joined when they are written, so
    nothing is rounded again.

    Args:
        graph (`onnx_ir.Model`): From [`~exporters.graph.quantize.quantize_graph`].
    """
    for node in list(graph.graph):
        products = _projections(node, "MatMulNBits")
        if len(set(products)) == 3 and len({_kind(product) for product in products}) == 1:
            _pack(graph, products)


def _projections(attention: ir.Node, kind: str) -> list[ir.Node]:
    """The products of a kind that make an attention's queries, keys and values; of any other node none."""
    if attention.op_type != "GroupQueryAttention":
        return []
    found = [_projection(value, kind) for value in attention.inputs[:3]]
    return [product for product in found if product is not None]


def _projection(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _BETWEEN:
        # a bias may be on either side of its Add
        computed = [value for value in node.inputs if value is not None and value.producer() is not None]
        node = computed[0].producer() if computed else None
    return node if node is not None and node.op_type == kind else None


def _kind(product: ir.Node) -> tuple:
    """What must be the same in products that become one."""
    return product.inputs[0], len(product.inputs), *(product.attributes.get_int(name) for name in _NUMBERS)


def _pack(graph: ir.Model, products: Sequence[ir.Node]) -> None:
    first = min(products, key=list(graph.graph).index)
    columns = zip(*(product.inputs[1:] for product in products), strict=True)
    parts = [[value for value in column if value is not None] for column in columns]
    if any(len(part) != 3 or not all(value.is_initializer() for value in part) for part in parts):
        return
    widths = [product.attributes.get_int("N") for product in products]
    packed = ir.node(
        "MatMulNBits",
        [first.inputs[0], *(_joined(graph, part) for part in parts)],
        {**{name: first.attributes.get_int(name) for name in _NUMBERS}, "N": sum(widths)},
        domain=_CONTRIB,
        name=f"{first.name}_packed",
    )
    split = ir.node(
        "Split",
        [packed.outputs[0], store_tensor(graph.graph, f"{first.name}_widths", np.array(widths, dtype=np.int64))],
        {"axis": -1},
        num_outputs=3,
        name=f"{first.name}_split",
    )
    packed.outputs[0].name, packed.outputs[0].type = f"{packed.name}_output", first.outputs[0].type
    graph.graph.insert_before(first, [packed, split])
    for product, value in zip(products, split.outputs, strict=True):
        old = product.outputs[0]
        value.shape, value.type, value.name = old.shape, old.type, old.name
        old.replace_all_uses_with(value)
    graph.graph.remove(products, safe=True)
    for value in [value for part in parts for value in part]:
        if not value.uses():
            del graph.graph.initializers[str(value.name)]


def _joined(graph: ir.Model, values: Sequence[ir.Value]) -> ir.Value:
    """Stored tensors one below the other, joined when they are written."""
    tensors = [stored_tensor(value) for value in values]
    shapes = [stored_shape(tensor) for tensor in tensors]
    name = "+".join(str(value.name) for value in values)
    joined = ir.LazyTensor(
        lambda: ir.tensor(np.concatenate([part.numpy() for part in tensors])),
        dtype=tensors[0].dtype,
        shape=ir.Shape([sum(shape[0] for shape in shapes), *shapes[0][1:]]),
        name=name,
    )
    return store_tensor(graph.graph, name, joined)
