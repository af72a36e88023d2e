"""One product for queries, keys and values: where, and that no number changes."""

import collections
import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_models import tiny_model

from optimum_clp.configuration.stages import ExportConfig, QuantizationConfig
from optimum_clp.exporters.export import export_onnx
from optimum_clp.exporters.graph import packing as onnx_packing
from optimum_clp.exporters.graph import scales as onnx_scales
from optimum_clp.exporters.graph.file import save_graph
from optimum_clp.runtime.names import cache_names

TOKENS = np.array([[5, 9, 23, 4, 71]])


@functools.cache
def exported(model_type):
    """One export: `packed`, the int4 file; `single`, the file without packing; `before`, the graph just before it."""
    found = SimpleNamespace(temporary=tempfile.TemporaryDirectory())
    folder = Path(found.temporary.name)
    pack, store = onnx_packing.pack_projections, onnx_scales.store_scales_in_16_bits

    def packing(quantized):
        found.before = quantized.clone()
        pack(quantized)

    def storing(quantized, graph, *keep):
        single = found.before.clone()
        store(single, graph)
        (found.single,) = save_graph(single, folder / "single.onnx")
        store(quantized, graph, *keep)

    settings = QuantizationConfig(weights=["int4"], method="rtn", group_size=16, accuracy_level=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optimum_clp.exporters.weight_files.pack_projections", packing)
        patch.setattr("optimum_clp.exporters.weight_files.store_scales_in_16_bits", storing)
        export_onnx(tiny_model(model_type, num_layers=2), folder, ExportConfig(), settings, quiet=True)
    found.packed = folder / "onnx/model_q4.onnx"
    return found


def logits(file, optimized=True):
    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    shapes = {value.name: value.shape for value in session.get_inputs()}
    past = cache_names("past_key_values", sum("past" in name for name in shapes) // 2)
    feeds = {"input_ids": TOKENS, "attention_mask": np.ones_like(TOKENS)}
    feeds["position_ids"] = np.arange(TOKENS.shape[1])[None]
    feeds |= {name: np.zeros((1, shapes[name][1], 0, shapes[name][3]), np.float32) for name in past}
    return session.run(["logits"], feeds)[0]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_packed_products_are_the_single_ones(model_type):
    """With biases (Qwen2), and with norms between projection and attention (Qwen3)."""
    packed, single = exported(model_type).packed, exported(model_type).single
    counts = [collections.Counter(node.op_type for node in onnx.load(file).graph.node) for file in (packed, single)]
    assert counts[1]["MatMulNBits"] - counts[0]["MatMulNBits"] == 4 and counts[0]["Split"] == 2
    stored = [sum(len(tensor.raw_data) for tensor in onnx.load(file).graph.initializer) for file in (packed, single)]
    # the widths of the splits, and the three constants of the norms that are spelled out in a finished file
    assert stored[0] - stored[1] <= 2 * 3 * 8 + 4 + 8 + 4
    for optimized in (True, False):
        np.testing.assert_allclose(logits(packed, optimized), logits(single, optimized), rtol=0, atol=1e-5)


def test_projections_of_different_kinds_stay_apart():
    graph = exported("llama").before.clone()
    products = [node for node in graph.graph if node.op_type == "MatMulNBits"]
    first = next(node for node in products if "k_proj" in str(node.inputs[1].name))
    first.attributes["accuracy_level"] = onnx_packing.ir.AttrInt64("accuracy_level", 0)
    onnx_packing.pack_projections(graph)
    assert collections.Counter(node.op_type for node in graph.graph)["Split"] == 1


@pytest.mark.parametrize("six_bits", [False, True])
def test_a_size_budget_gives_projections_that_can_be_packed_the_same_bits(six_bits, tmp_path):
    settings = QuantizationConfig(
        weights=["int4"], method="rtn", group_size=16, bits_per_weight=6.5, six_bits=six_bits
    )
    model = tiny_model("llama", num_layers=6)
    export_onnx(model, tmp_path, ExportConfig(), settings, calibration=torch.from_numpy(TOKENS), quiet=True)
    nodes = onnx.load(tmp_path / "onnx/model_q4.onnx").graph.node
    bits = {attribute.i for node in nodes for attribute in node.attribute if attribute.name == "bits"}
    assert collections.Counter(node.op_type for node in nodes)["Split"] == 6
    assert bits == ({2, 4, 8} if six_bits else {4, 8})
