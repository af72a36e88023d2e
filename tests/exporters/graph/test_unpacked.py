"""Files of `export.format="unpacked"`: the numbers of the others, and at run time the products of the float file."""

import numpy as np
import onnx
import pytest
from quantized_files import relative_difference
from quantized_graphs import logits_of, operators_at_load, quantized_file, traced, unoptimized
from tiny_models import random_tokens

from optimum_clp.exporters.graph.count import expected_nodes
from optimum_clp.exporters.graph.quantize import graph_matrices
from optimum_clp.exporters.rounding.matrices import from_integers
from optimum_clp.runtime.session import open_session


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["llama, tied head", "qwen3, a head of its own", "llama, tied head, odd widths"])
def test_numbers_are_those_of_onnx_runtimes_operators(kind, bits, tmp_path):
    model, graph = traced(kind)
    file, found, size = quantized_file(graph, bits, "unpacked", tmp_path)
    other, other_found, other_size = quantized_file(graph, bits, "contrib", tmp_path)
    assert found == other_found == expected_nodes(model, True)
    assert size <= other_size
    onnx.checker.check_model(str(file), full_check=True)
    ids = random_tokens(2, 9)
    expected = logits_of(open_session(other), ids)
    assert relative_difference(logits_of(open_session(file), ids), expected) < 1e-5
    assert relative_difference(logits_of(unoptimized(file), ids), expected) < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_floats_once_the_file_is_loaded(bits, tmp_path):
    _, graph = traced("llama, tied head")
    file, found, _ = quantized_file(graph, bits, "unpacked", tmp_path)
    # ONNX Runtime for WebAssembly converts no int4, and has no look-up in quantized tables
    stored = onnx.load(file).graph
    assert onnx.TensorProto.INT4 not in {tensor.data_type for tensor in stored.initializer}
    assert {node.domain for node in stored.node} == {""}
    at_load = operators_at_load(file)
    assert not at_load["MatMulNBits"] and not at_load["DequantizeLinear"]
    # what is left of the unpacking is the look-up's
    assert at_load["BitShift"] == at_load["BitwiseXor"] == (bits == 4)
    assert at_load["MatMul"] + at_load["FusedMatMul"] + at_load["Gemm"] >= found.matmuls


def test_zero_points_that_are_no_integers(tmp_path):
    _, graph = traced("llama, tied head, odd widths")
    generator = np.random.default_rng(0)
    rounded = {}
    for name, matrix in graph_matrices(graph, False).items():
        codes = generator.integers(0, 16, (matrix.rows, matrix.columns), dtype=np.uint8)
        scales, shifts = (generator.random((matrix.rows, 1), dtype=np.float32) for _ in range(2))
        rounded[name] = from_integers(codes, 4, scales * np.float32(0.05), shifts)
    options = {"quantize_embeddings": False, "rounded": rounded, "only_rounded": True}
    file, found, _ = quantized_file(graph, 4, "unpacked", tmp_path, **options)
    other, other_found, _ = quantized_file(graph, 4, "contrib", tmp_path, **options)
    assert found == other_found
    ids = random_tokens(2, 9)
    difference = relative_difference(logits_of(open_session(file), ids), logits_of(open_session(other), ids))
    assert difference < 1e-4
