"""Names and order of what a graph holds that depend on the graph alone, not on how it was traced."""

from collections import Counter

import onnx_ir as ir

from .file import stored_tensor


def name_in_order(graph: ir.Model, weights: dict[int, str]) -> None:
    """Name nodes, values and constants by their place, and bring weights into the order of their use, in place.

    A node is `MatMul_12`, what it puts out `MatMul_12_output_0`, a constant `constant_3`. Inputs and outputs of the graph keep their names.

    Args:
        graph (`onnx_ir.Model`): The graph.
        weights (`dict[int, str]`): Names of the initializers that are no constants, by the `id` of their value.
    """
    order_by_use(graph)
    outputs = {id(value) for value in graph.graph.outputs}
    count: Counter[str] = Counter()
    for node in ir.traversal.RecursiveGraphIterator(graph.graph):
        node.name = f"{node.op_type}_{count[node.op_type]}"
        count[node.op_type] += 1
        for index, value in enumerate(node.outputs):
            if id(value) not in outputs:
                value.name = f"{node.name}_output_{index}"
    stored, constants = list(graph.graph.initializers.values()), 0
    graph.graph.initializers.clear()
    for value in stored:
        if id(value) not in weights:
            constants += 1
        value.name = weights.get(id(value), f"constant_{constants - 1}")
        stored_tensor(value).name = value.name
        graph.graph.register_initializer(value)


def order_by_use(graph: ir.Model) -> None:
    """Bring what a graph stores into the order of its use, in place."""
    stored = {id(value): value for value in graph.graph.initializers.values()}
    used: dict[int, ir.Value] = {}
    for node in ir.traversal.RecursiveGraphIterator(graph.graph):
        used |= {id(value): value for value in node.inputs if value is not None and id(value) in stored}
    # what is put out, or has a default, is used by no node
    used |= stored
    graph.graph.initializers.clear()
    for value in used.values():
        graph.graph.register_initializer(value)
