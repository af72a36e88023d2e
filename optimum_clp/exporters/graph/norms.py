"""Root-mean-square norms in standard operators, where no addition was fused with them.

ONNX Runtime keeps its `SimplifiedLayerNormalization` in the standard's own domain, which does not know it: `onnx.checker`
refuses such a file. What is spelled out here ONNX Runtime puts together again when it loads the file.
"""

import numpy as np
import onnx_ir as ir

from .file import store_tensor


def spell_out_norms(graph: ir.Model) -> None:
    """Replace every `SimplifiedLayerNormalization`, in place.

    Args:
        graph (`onnx_ir.Model`): Of opset 18 or later, with norms over the last axis in float32.
    """
    constants: dict[str, ir.Value] = {}

    def constant(name: str, content: np.ndarray) -> ir.Value:
        if name not in constants:
            constants[name] = store_tensor(graph.graph, name, content)
        return constants[name]

    for node in list(graph.graph):
        if node.op_type != "SimplifiedLayerNormalization" or node.domain not in ("", "ai.onnx"):
            continue
        states, weight = node.inputs[0], node.inputs[1]
        assert states is not None
        epsilon = node.attributes.get_float("epsilon")
        new: list[ir.Node] = []

        def add(kind: str, *inputs: ir.Value | None, node: ir.Node = node, new: list[ir.Node] = new) -> ir.Value:
            new.append(ir.node(kind, inputs, name=f"{node.name}_{kind.lower()}"))
            return new[-1].outputs[0]

        square = add("Pow", states, constant("norm_two", np.array(2, np.float32)))
        mean = add("ReduceMean", square, constant("norm_axes", np.array([-1], np.int64)))
        moved = add("Add", mean, constant(f"norm_epsilon_{epsilon:g}", np.array(epsilon, np.float32)))
        add("Mul", add("Div", states, add("Sqrt", moved)), weight)
        old, output = node.outputs[0], new[-1].outputs[0]
        output.shape, output.type, output.name = old.shape, old.type, old.name
        graph.graph.insert_before(node, new)
        old.replace_all_uses_with(output, replace_graph_outputs=True)
        graph.graph.remove(node, safe=True)
