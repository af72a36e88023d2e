"""How many positions of a text get logits: an input of the graph with a default, which a runtime need not know of.

The head is the largest product of a small model, and a text of thousands of tokens has gigabytes of logits, of which
`generate()` reads the last row.
"""

import numpy as np
import onnx_ir as ir

from ...runtime.names import LOGITS_TO_KEEP
from .file import store_tensor
from .float_graph import stored_weight

# what models do with their logits, number by number: biases, scales, soft caps
_NUMBER_BY_NUMBER = ("Add", "Cast", "Div", "Identity", "Mul", "Tanh")
_END = np.iinfo(np.int64).max


def choose_positions(graph: ir.Model, default: int) -> bool:
    """Let the head multiply the last `num_logits_to_keep` positions alone, in place.

    The input, an int64 scalar, is an initializer as well: a session that is not given it takes `default`. 0 means all
    positions, as in transformers' `logits_to_keep`. A graph whose logits are not a product with a stored matrix, followed
    by operators that take each number by itself, is left as it is.

    Args:
        graph (`onnx_ir.Model`): From [`~exporters.graph.float_graph.export_float_graph`].
        default (`int`): At least 0.

    Returns:
        `bool`: Whether the graph has the input now.
    """
    found = _head(graph.graph)
    if found is None:
        return False
    head, behind = found
    count = store_tensor(graph.graph, LOGITS_TO_KEEP, np.array(default, np.int64))
    graph.graph.inputs.append(count)
    axes = [
        store_tensor(graph.graph, f"{LOGITS_TO_KEEP}_{name}", np.array([n])) for name, n in (("rank", 0), ("axis", 1))
    ]
    end = store_tensor(graph.graph, f"{LOGITS_TO_KEEP}_end", np.array([_END]))
    # minus 0 is the beginning, so 0 keeps all
    negative = ir.node("Neg", [count], name=f"{LOGITS_TO_KEEP}_neg")
    start = ir.node("Unsqueeze", [negative.outputs[0], axes[0]], name=f"{LOGITS_TO_KEEP}_start")
    kept = ir.node("Slice", [head.inputs[0], start.outputs[0], end, axes[1]], name=f"{LOGITS_TO_KEEP}_slice")
    nodes = [negative, start, kept]
    for node in nodes:
        node.outputs[0].name = f"{node.name}_output"
    kept.outputs[0].dtype = ir.DataType.FLOAT
    graph.graph.insert_before(head, nodes)
    head.replace_input_with(0, kept.outputs[0])
    for value in behind:
        if value.shape is not None:
            value.shape = ir.Shape([value.shape[0], "num_logits", *value.shape[2:]])
    if default == 1:
        # onnxruntime-genai goes by the declared size when it sets memory aside
        logits = behind[0]
        assert logits.shape is not None
        logits.shape = ir.Shape([logits.shape[0], 1, *logits.shape[2:]])
    return True


def _head(graph: ir.Graph) -> tuple[ir.Node, list[ir.Value]] | None:
    """The product that makes the logits, and what lies between it and them, both ends included."""
    value: ir.Value | None = next(output for output in graph.outputs if output.name == "logits")
    behind: list[ir.Value] = []
    while value is not None and (node := value.producer()) is not None:
        behind.append(value)
        if node.op_type == "MatMul":
            return (node, behind) if stored_weight(node.inputs[1])[0] is not None else None
        changing = [other for other in node.inputs if other is not None and not _is_vector(other)]
        if node.op_type not in _NUMBER_BY_NUMBER or len(changing) != 1:
            return None
        (value,) = changing
    return None


def _is_vector(value: ir.Value) -> bool:
    """Whether a value is stored and has no axis for positions."""
    return value.is_initializer() and value.shape is not None and len(value.shape) <= 1
