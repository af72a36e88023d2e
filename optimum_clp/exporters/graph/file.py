"""Writing an ONNX graph to disk, one weight in memory at a time."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir as ir

from ...runtime.in_place import varint

# protobuf ends at 2 GiB; the graph without its weights takes some of that
MAX_SINGLE_FILE_BYTES = 1_800_000_000
# Tags of length-delimited protobuf fields: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data
_GRAPH, _INITIALIZER, _RAW_DATA = b"\x3a", b"\x2a", b"\x4a"


def save_graph(graph: ir.Model, file: Path, *, max_single_file_bytes: int = MAX_SINGLE_FILE_BYTES) -> list[Path]:
    """Write a graph as one self-contained file, or with its weights in `<file>_data` beside it if it is too large.

    Args:
        graph (`onnx_ir.Model`): The graph; left as it is.
        file (`Path`): Target, in a folder that exists.
        max_single_file_bytes (`int`): Weights above this size go to the second file.

    Returns:
        `list[Path]`: The files written.
    """
    weights = [stored_tensor(value) for value in graph.graph.initializers.values()]
    if stored_bytes(graph) > max_single_file_bytes:
        data = file.with_name(file.name + "_data")
        ir.save(graph, file, external_data=data.name)
        return [file, data]
    bare = graph.clone()
    drop_weights(bare)
    bare.graph.initializers.clear()
    proto = ir.to_proto(bare)
    graph_bytes = proto.graph.SerializeToString()
    proto.ClearField("graph")
    headers = [_tensor_header(tensor) for tensor in weights]
    sizes = [len(header) + tensor.nbytes for header, tensor in zip(headers, weights, strict=True)]
    with file.open("wb") as stream:
        stream.write(proto.SerializeToString())
        stream.write(_GRAPH + varint(len(graph_bytes) + sum(len(_INITIALIZER + varint(n)) + n for n in sizes)))
        stream.write(graph_bytes)
        for header, size, tensor in zip(headers, sizes, weights, strict=True):
            stream.write(_INITIALIZER + varint(size) + header)
            _write_weight(stream, tensor)
    return [file]


def stored_bytes(graph: ir.Model) -> int:
    """Bytes of the weights in a graph's file; what is around them is not counted."""
    return sum(stored_tensor(value).nbytes for value in graph.graph.initializers.values())


def drop_weights(graph: ir.Model) -> None:
    """Let go of the weights of a graph that is not needed any more.

    Its values and nodes refer to one another, so without this the weights stay until Python's collector comes by.
    """
    for value in graph.graph.initializers.values():
        value.const_value = None


def store_tensor(graph: ir.Graph, name: str, content: np.ndarray | ir.TensorProtocol) -> ir.Value:
    """Store a tensor in the graph under a new name.

    Args:
        graph (`onnx_ir.Graph`): The graph.
        name (`str`): Of the tensor and its value.
        content (`np.ndarray` or `onnx_ir.TensorProtocol`): The numbers, or a tensor that has them when it is written.

    Returns:
        `onnx_ir.Value`: The initializer.
    """
    tensor = ir.tensor(content)
    tensor.name = name
    shape = ir.Shape(stored_shape(tensor))
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def stored_tensor(value: ir.Value | None) -> ir.TensorProtocol:
    """The tensor that the graph stores for an initializer."""
    assert value is not None and value.const_value is not None
    return value.const_value


def stored_shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a stored tensor, which has no symbolic size."""
    return tuple(size for size in tensor.shape if isinstance(size, int))


def _tensor_header(tensor: ir.TensorProtocol) -> bytes:
    """A serialized TensorProto up to its data."""
    proto = onnx.TensorProto(name=tensor.name, data_type=tensor.dtype.value, dims=stored_shape(tensor))
    return proto.SerializeToString() + _RAW_DATA + varint(tensor.nbytes)


def _write_weight(stream: BinaryIO, tensor: ir.TensorProtocol) -> None:
    data = tensor.tobytes()
    assert len(data) == tensor.nbytes
    stream.write(data)
