"""Integers of 6 bits as products and look-ups that ONNX Runtime has: the numbers are those of the integers."""

import collections
import copy
import dataclasses
import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from quantized_files import logits_of, relative_difference
from quantized_graphs import traced
from tiny_models import random_tokens, tiny_model

from optimum_clp import CLPConfig, CLPPruner, OnnxCausalLM
from optimum_clp.configuration.stages import ExportConfig, QuantizationConfig
from optimum_clp.errors import ExportError
from optimum_clp.exporters.export import export_onnx
from optimum_clp.exporters.graph.packing import pack_projections
from optimum_clp.exporters.graph.quantize import graph_matrices, quantize_graph
from optimum_clp.exporters.graph.six_bits import split_six_bits
from optimum_clp.exporters.rounding import weights
from optimum_clp.exporters.rounding.matrices import IntegerForm, RoundedMatrix, pack

IDS = random_tokens(2, 9)


def drawn(rows, columns, generator):
    """Integers and scales of 6 bits, and the matrix that they stand for, from the definition."""
    blocks = -(-columns // 32)
    codes = generator.integers(0, 64, (rows, blocks * 32), dtype=np.uint8)
    codes[:, columns:] = 33
    scales = generator.uniform(0.002, 0.01, (rows, blocks)).astype(np.float16).astype(np.float32)
    weight = (codes.astype(np.float32) - 33) * scales.repeat(32, axis=1)
    return RoundedMatrix(pack(codes, 6), scales, 6, columns), torch.from_numpy(weight[:, :columns])


@pytest.mark.parametrize("kind", ["llama, tied head", "llama, tied head, odd widths", "qwen3, a head of its own"])
def test_a_file_says_what_the_integers_say(kind, tmp_path):
    """With a table that is looked up and multiplied by, and with rows whose last block is filled up."""
    model, graph = traced(kind)
    matrices, generator, rounded = copy.deepcopy(model), np.random.default_rng(0), {}
    parameters = dict(matrices.named_parameters(remove_duplicate=False))
    for name, matrix in graph_matrices(graph, True).items():
        rounded[name], weight = drawn(matrix.rows, matrix.columns, generator)
        parameters[name].data.copy_(weight)
    with torch.no_grad():
        expected = matrices(input_ids=IDS).logits
        assert relative_difference(model(input_ids=IDS).logits, expected) > 0.1
    quantized = graph.clone()
    quantize_graph(quantized, 4, block_size=32, accuracy_level=1, quantize_embeddings=True, rounded=rounded)
    split_six_bits(quantized)
    ir.save(quantized, tmp_path / "six.onnx")
    assert relative_difference(logits_of(tmp_path / "six.onnx", IDS), expected) < 1e-5
    bits = collections.Counter(
        (node.op_type, attribute.i)
        for node in onnx.load(tmp_path / "six.onnx").graph.node
        for attribute in node.attribute
        if attribute.name == "bits"
    )
    assert {key[1] for key in bits} == {2, 4}
    assert bits["MatMulNBits", 2] == bits["MatMulNBits", 4] and bits["GatherBlockQuantized", 2] == 1


def test_nothing_is_stored_twice(tmp_path):
    """6 bits for a weight and one scale for each block: a tied table, and packed projections too."""
    model, graph = traced("llama, tied head")
    quantized = graph.clone()
    matrices = graph_matrices(quantized, True)
    planned = dict.fromkeys(matrices, IntegerForm(6, 32))
    quantize_graph(quantized, 4, block_size=32, accuracy_level=4, quantize_embeddings=True, planned=planned)
    before = set(graph.graph.initializers)
    split_six_bits(quantized)
    stored = {name: value for name, value in quantized.graph.initializers.items() if name not in before}
    integers = sum(value.const_value.nbytes for value in stored.values() if value.dtype == ir.DataType.UINT8)
    scales = sum(np.prod(value.shape) for value in stored.values() if value.dtype == ir.DataType.FLOAT) - 1
    blocks = sum(matrix.rows * -(-matrix.columns // 32) for matrix in matrices.values())
    assert (integers, scales) == (blocks * 32 * 6 // 8, blocks)


def test_packed_projections_stay_packed(tmp_path, monkeypatch):
    """And scales stay in 16 bits: 6.25 bits for a weight, and the graph's own small tensors."""
    monkeypatch.setattr(weights, "plan_bits", lambda matrices, *_: dict.fromkeys(matrices, IntegerForm(6, 64)))
    settings = QuantizationConfig(weights=["int4"], method="gptq", bits_per_weight=7.5, six_bits=True)
    model = tiny_model(num_layers=2, hidden_size=64, intermediate_size=128)
    result = export_onnx(model, tmp_path, ExportConfig(), settings, calibration=random_tokens(8, 24), quiet=True)
    nodes = list(onnx.load(tmp_path / "onnx/model_q4.onnx").graph.node)
    made = {name: node for node in nodes for name in node.output}
    sums = [made[node.input[0]] for node in nodes if node.op_type == "Split"]
    assert len(sums) == 2
    for node in sums:
        assert node.op_type == "Add" and {made[name].op_type for name in node.input} == {"MatMulNBits"}
    assert result.files[1].bits_per_weight == pytest.approx(6.25)
    assert result.files[1].max_relative_error < 0.3


def test_a_graph_without_them_is_left_alone():
    _, graph = traced("llama, tied head")
    quantized = graph.clone()
    quantize_graph(quantized, 4, block_size=32, accuracy_level=4, quantize_embeddings=True)
    pack_projections(quantized)
    names = [node.name for node in quantized.graph], list(quantized.graph.initializers)
    split_six_bits(quantized)
    assert ([node.name for node in quantized.graph], list(quantized.graph.initializers)) == names


@pytest.mark.parametrize("format", ["qdq", "unpacked"])
def test_other_formats_have_4_and_8_bits(format, tmp_path):
    settings = QuantizationConfig(weights=["int4"], method="rtn", bits_per_weight=7.0, six_bits=True)
    model = tiny_model(num_layers=2, hidden_size=64, intermediate_size=128)
    export_onnx(model, tmp_path, ExportConfig(format=format), settings, calibration=random_tokens(8, 24), quiet=True)
    names = [tensor.name for tensor in onnx.load(tmp_path / "onnx/model_q4.onnx").graph.initializer]
    assert {name.rsplit("_int", 1)[1][0] for name in names if "_int" in name} == {"4", "8"}


def test_an_onnx_runtime_without_fast_products_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_clp.exporters.graph.six_bits.onnxruntime.__version__", "1.29.0")
    settings = QuantizationConfig(weights=["int4"], method="rtn", bits_per_weight=6.5, six_bits=True)
    told = (
        "quantization.six_bits is True: ONNX Runtime has fast products of this kind from 1.30 on, and 1.29.0 is installed. "
        "Upgrade onnxruntime, or leave it out."
    )
    model, tokens = tiny_model(num_layers=2, hidden_size=64), random_tokens(8, 24)
    with pytest.raises(ExportError) as error:
        export_onnx(model, tmp_path, ExportConfig(), settings, calibration=tokens, quiet=True)
    assert str(error.value) == told and list(tmp_path.iterdir()) == []
    pruner = CLPPruner.from_pretrained(model, quiet=True)
    with pytest.raises(ExportError) as error:
        pruner.prune(CLPConfig(0.5, quantization=dataclasses.asdict(settings)), tmp_path / "out")
    assert str(error.value) == told and list(tmp_path.iterdir()) == []


def test_a_folder_says_what_its_file_needs(tmp_path):
    """In the report and the card; transformers.js is not led to it."""
    text = {"sequence_length": 24, "train_sequences": 12, "validation_sequences": 4, "test_sequences": 4}
    config = CLPConfig(
        0.5,
        calibration={**text, "cache_dir": str(tmp_path / "cache")},
        tuning={"enabled": False},
        evaluation={"generation": False},
        quantization={"method": "rtn", "weights": ["int4"], "bits_per_weight": 7.0, "six_bits": True},
    )
    pruner = CLPPruner(tiny_model(num_layers=4, hidden_size=64, intermediate_size=128), quiet=True)
    pruner.prune(config, tmp_path / "out")
    report = json.loads((tmp_path / "out/clp_report.json").read_text())
    assert [file["least_onnxruntime"] for file in report["export"]["files"]] == [None, "1.30"]
    assert report["export"]["runtimes"]["transformers_js"] == (
        "onnx/model_q4.onnx has products of 2 bits, which are for ONNX Runtime 1.30 on CPUs: transformers.js has others"
    )
    assert "transformers.js_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert "In ONNX Runtime 1.30 or later, with optimum-clp:" in (tmp_path / "out/README.md").read_text()
    model = OnnxCausalLM.from_pretrained(tmp_path / "out", "onnx/model_q4.onnx")
    assert model.generate(random_tokens(1, 5), max_new_tokens=4).shape == (1, 9)
