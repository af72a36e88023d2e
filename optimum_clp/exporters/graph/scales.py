"""Scales of quantized weights, stored in 16 bits where that loses nothing."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from .file import store_tensor, stored_tensor


def store_scales_in_16_bits(
    graph: ir.Model, float_graph: ir.Model, keep: Callable[[np.ndarray], np.ndarray] | None = None
) -> None:
    """Store in float16 what the quantization has added in float32, where every number survives that; in place.

    A `Cast` makes float32 of it again. ONNX Runtime computes it once, when it loads the file, so that its kernels find
    constants as before.

    Args:
        graph (`onnx_ir.Model`): With quantized weights.
        float_graph (`onnx_ir.Model`): What it was made from.
        keep (`Callable`, *optional*): Puts an array where it may stay until the graph is written; main memory if not given.
    """
    # in the graph's order, not a set's: the same model gives the same bytes
    for name in [name for name in graph.graph.initializers if name not in float_graph.graph.initializers]:
        old = graph.graph.initializers[name]
        tensor = stored_tensor(old)
        if tensor.dtype != ir.DataType.FLOAT:
            continue
        numbers = tensor.numpy()
        with np.errstate(over="ignore"):
            narrow = numbers.astype(np.float16)
        if not np.array_equal(narrow, numbers):
            continue
        new = store_tensor(graph.graph, f"{name}_float16", narrow if keep is None else keep(narrow))
        cast = ir.node("Cast", [new], {"to": ir.DataType.FLOAT}, name=f"{name}_float32")
        cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = f"{name}_cast", old.shape, old.type
        graph.graph.insert_before(graph.graph[0], cast)
        old.replace_all_uses_with(cast.outputs[0])
        del graph.graph.initializers[name]
