"""Files of `export.format="qdq"`: standard operators alone, and the numbers of the files with ONNX Runtime's operators."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from quantized_files import relative_difference
from quantized_graphs import logits_of, operators_at_load, quantized_file, traced, unoptimized
from tiny_models import random_tokens
from tiny_onnx import onnx_test_model

from optimum_clp.configuration.stages import ExportConfig, QuantizationConfig
from optimum_clp.exporters.export import export_onnx
from optimum_clp.exporters.graph.count import QuantizedNodes, expected_nodes
from optimum_clp.exporters.graph.quantize import graph_matrices
from optimum_clp.exporters.rounding.matrices import from_integers
from optimum_clp.exporters.rounding.nearest import round_to_nearest
from optimum_clp.runtime.causal_lm import OnnxCausalLM
from optimum_clp.runtime.session import open_session

INTEGERS = {4: onnx.TensorProto.INT4, 8: onnx.TensorProto.INT8}


def check_standard(file):
    """By the package onnx alone: every operator is one of the standard's opset 21, and all shapes and types agree."""
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 21)]
    assert not model.functions
    for node in model.graph.node:
        assert node.domain == ""
        onnx.defs.get_schema(node.op_type, 21, "")
        assert not any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
    return model


KINDS = ["llama, tied head", "qwen3, a head of its own", "llama, tied head, odd widths", "gpt2"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", [*KINDS, pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_standard_operators_say_what_onnx_runtimes_say(kind, bits, tmp_path):
    model, graph = traced(kind)
    file, found, size = quantized_file(graph, bits, "qdq", tmp_path)
    other, other_found, other_size = quantized_file(graph, bits, "contrib", tmp_path)
    assert found == other_found == expected_nodes(model, True)
    # no filling, and nothing else that is stored twice
    assert size <= other_size
    check_standard(file)
    ids = random_tokens(2, 9)
    expected = logits_of(open_session(other), ids)
    assert relative_difference(logits_of(open_session(file), ids), expected) < 1e-5
    assert relative_difference(logits_of(unoptimized(file), ids), expected) < 1e-5
    assert operators_at_load(file)["MatMulNBits"] == found.matmuls


def test_integers_and_scales_are_those_that_were_rounded(tmp_path):
    _, graph = traced("llama, tied head, odd widths")
    names = graph_matrices(graph, True)
    (table,) = (name for name, matrix in names.items() if matrix.rows == 97)
    for bits in (4, 8):
        model = onnx.load(quantized_file(graph, bits, "qdq", tmp_path)[0])
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        for name in names:
            weight = graph.graph.initializers[name].const_value.numpy()
            matrix = round_to_nearest(weight, bits, 32)
            integers = stored[f"{name}_int{bits}"]
            scales = onnx.numpy_helper.to_array(stored[f"{name}_scales"])
            signed = onnx.numpy_helper.to_array(integers)
            if name != table:
                assert integers.data_type == INTEGERS[bits]
                signed, scales = signed.T, scales.T
            elif bits == 4:
                # the row's first half in the lower halves of the bytes, two's complement
                assert integers.data_type == onnx.TensorProto.UINT8 and signed.shape == (97, 17)
                halves = np.concatenate([signed & 15, signed >> 4], axis=1)[:, :33].astype(np.int8)
                signed = np.where(halves > 7, halves - 16, halves)
            np.testing.assert_array_equal(scales, matrix.scales)
            np.testing.assert_array_equal(signed.astype(int), matrix.codes().astype(int) - 2 ** (bits - 1))


def test_a_table_is_stored_once_for_embedding_and_head(tmp_path):
    _, graph = traced("llama, tied head")
    for bits in (4, 8):
        model = onnx.load(quantized_file(graph, bits, "qdq", tmp_path)[0])
        shapes = {tuple(tensor.dims) for tensor in model.graph.initializer if 97 in tensor.dims}
        assert shapes == {(97, 32 * bits // 8), (97, 1)}


def test_embedding_stays_in_float_if_asked(tmp_path):
    model, graph = traced("llama, tied head")
    file, found, _ = quantized_file(graph, 4, "qdq", tmp_path, quantize_embeddings=False)
    assert found == expected_nodes(model, False) == QuantizedNodes(matmuls=14, embeddings=0)
    other = quantized_file(graph, 4, "contrib", tmp_path, quantize_embeddings=False)[0]
    ids = random_tokens(2, 9)
    assert relative_difference(logits_of(open_session(file), ids), logits_of(open_session(other), ids)) < 1e-5


@pytest.mark.parametrize("kind", ["qwen3, a head of its own", "llama, tied head, odd widths"])
def test_zero_points_that_are_no_integers(kind, tmp_path):
    _, graph = traced(kind)
    generator = np.random.default_rng(0)
    rounded = {}
    for name, matrix in graph_matrices(graph, False).items():
        codes = generator.integers(0, 16, (matrix.rows, matrix.columns), dtype=np.uint8)
        groups = 2 if matrix.columns % 32 == 0 else 1
        scales, shifts = (generator.random((matrix.rows, groups), dtype=np.float32) for _ in range(2))
        rounded[name] = from_integers(codes, 4, scales * np.float32(0.05), shifts)
    # some end within a block
    assert any(matrix.columns % matrix.block_size for matrix in rounded.values())
    options = {"quantize_embeddings": False, "rounded": rounded, "only_rounded": True}
    file, found, size = quantized_file(graph, 4, "qdq", tmp_path, **options)
    other, other_found, other_size = quantized_file(graph, 4, "contrib", tmp_path, **options)
    assert found == other_found and size <= other_size
    check_standard(file)
    ids = random_tokens(2, 9)
    expected = logits_of(open_session(other), ids)
    assert relative_difference(logits_of(open_session(file), ids), expected) < 1e-4
    assert relative_difference(logits_of(unoptimized(file), ids), expected) < 1e-4
    assert operators_at_load(file)["MatMulNBits"] == found.matmuls


def export(folder, format, calibration=None, **quantization):
    model = onnx_test_model("llama", tied=True, num_layers=2, initializer_range=0.3)
    folder.mkdir()
    model.config.save_pretrained(folder)
    settings = QuantizationConfig(**quantization)
    return export_onnx(model, folder, ExportConfig(format=format), settings, calibration=calibration, quiet=True)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Of both formats: the folder, and what the export gave."""
    folder = tmp_path_factory.mktemp("exports")
    return folder, {form: export(folder / form, form, method="rtn", accuracy_level=1) for form in ("contrib", "qdq")}


def test_qdq_files_have_standard_operators_alone(exports):
    folder, results = exports
    for file in results["qdq"].files:
        assert {node.domain for node in ir.load(folder / "qdq" / file.file).graph} <= {"", "ai.onnx"}


def test_an_export_writes_three_standard_files_that_generate(exports):
    folder, results = exports
    ids = random_tokens(2, 7)
    for file, other in zip(results["qdq"].files, results["contrib"].files, strict=True):
        check_standard(folder / "qdq" / file.file)
        assert (file.num_quantized_matmuls, file.num_quantized_embeddings) == (
            other.num_quantized_matmuls,
            other.num_quantized_embeddings,
        )
        assert file.max_relative_error == pytest.approx(other.max_relative_error, rel=1e-3, abs=1e-5)
        texts = [
            OnnxCausalLM.from_pretrained(folder / form, file.file, num_threads=1).generate(
                ids, max_new_tokens=12, min_new_tokens=12, do_sample=False
            )
            for form in results
        ]
        assert texts[0].shape == (2, 19) and torch.equal(*texts)


def test_a_budget_mixes_4_and_8_bits(tmp_path):
    result = export(
        tmp_path / "qdq", "qdq", random_tokens(4, 16), weights=["int4"], method="gptq", bits_per_weight=6.5
    )
    assert 5.1 < result.files[1].bits_per_weight <= 6.5
    model = check_standard(tmp_path / "qdq/onnx/model_q4.onnx")
    kinds = {tensor.data_type for tensor in model.graph.initializer if tensor.name.endswith(("_int4", "_int8"))}
    assert set(INTEGERS.values()) <= kinds
    assert operators_at_load(tmp_path / "qdq/onnx/model_q4.onnx")["MatMulNBits"] == 15


@pytest.mark.slow
def test_routers_get_8_bits(tmp_path):
    _, graph = traced("qwen3_moe")
    model = onnx.load(quantized_file(graph, 4, "qdq", tmp_path)[0])
    routers = {name for name, matrix in graph_matrices(graph, True).items() if matrix.is_router}
    types = {tensor.name.rsplit("_int", 1)[0]: tensor.data_type for tensor in model.graph.initializer}
    assert routers and {types[name] for name in routers} == {onnx.TensorProto.INT8}
