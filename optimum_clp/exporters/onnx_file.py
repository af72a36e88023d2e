"""Writing an ONNX graph to disk."""

from pathlib import Path

import onnx_ir as ir

# protobuf ends at 2 GiB; the graph itself and its value names take some of that
MAX_SINGLE_FILE_BYTES = 1_800_000_000


def save_graph(graph: ir.Model, file: Path, *, max_single_file_bytes: int = MAX_SINGLE_FILE_BYTES) -> list[Path]:
    """Write a graph as one self-contained file, or with its weights in `<file>_data` beside it if it is too large.

    Args:
        graph (`onnx_ir.Model`): The graph; left as it is.
        file (`Path`): Target, in a folder that exists.
        max_single_file_bytes (`int`): Weights above this size go to the second file.

    Returns:
        `list[Path]`: The files written.
    """
    weights = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    if weights <= max_single_file_bytes:
        ir.save(graph, file)
        return [file]
    data = file.with_name(file.name + "_data")
    ir.save(graph, file, external_data=data.name)
    return [file, data]
