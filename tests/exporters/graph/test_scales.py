"""Scales in 16 bits: what is stored, and that the numbers are the ones that weights were rounded with."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tiny_models import tiny_model

from optimum_clp.configuration.stages import ExportConfig, QuantizationConfig
from optimum_clp.exporters.export import export_onnx
from optimum_clp.exporters.graph.scales import store_scales_in_16_bits
from optimum_clp.exporters.rounding.gptq import FeedbackRounding
from optimum_clp.exporters.rounding.nearest import round_to_nearest
from optimum_clp.runtime.session import open_session


def floats_of(file):
    """The stored float tensors that belong to quantized weights, by type."""
    tensors = onnx.load(file).graph.initializer
    return {kind: [t.name for t in tensors if t.data_type == kind and "scales" in t.name] for kind in (1, 10)}


@pytest.mark.parametrize("format", ["contrib", "qdq"])
def test_a_weight_takes_four_and_a_half_bits(format, tmp_path):
    quantization = QuantizationConfig(method="rtn", group_size=32)
    result = export_onnx(tiny_model("llama", 2), tmp_path, ExportConfig(format=format), quantization, quiet=True)
    int8, int4 = result.files[1:]
    # widths of 32, 56 and 64, and the blocks of the second are filled up (not in "qdq")
    assert 4.5 <= int4.bits_per_weight < 4.8 and 8.5 <= int8.bits_per_weight < 9.1
    for file in (int8, int4):
        stored = floats_of(tmp_path / file.file)
        assert stored[10] and not stored[1]
        # ONNX Runtime computes the casts when it loads the file, and finds its fast kernels
        optimized = tmp_path / f"{file.weights}.onnx"
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(optimized)
        open_session(tmp_path / file.file, options)
        operators = [node.op_type for node in onnx.load(optimized).graph.node]
        assert operators.count("MatMulNBits") >= 9
        fp16 = [t.name for t in onnx.load(optimized).graph.initializer if t.data_type == 10]
        assert not fp16


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("fed_back", [False, True])
def test_weights_are_rounded_with_the_scale_that_is_stored(bits, fed_back):
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((6, 96)).astype(np.float32) * 0.02
    inputs = generator.standard_normal((200, 96))
    if fed_back:
        matrix = FeedbackRounding(inputs.T @ inputs).round(weight, bits, 32)
    else:
        matrix = round_to_nearest(weight, bits, 32)
    assert np.array_equal(matrix.scales.astype(np.float16).astype(np.float32), matrix.scales)
    if not fed_back:
        # to the nearest multiple, but for the ends of the range
        steps = np.repeat(np.abs(matrix.scales), 32, axis=1)
        error = np.abs(matrix.dequantize() - weight) / steps
        assert np.quantile(error, 0.9) <= 0.5 and error.max() <= (2.5 if bits == 4 else 1.0)


@pytest.mark.parametrize("size", [1e-5, 1e9])
def test_scales_that_do_not_fit_stay_in_32_bits(size):
    weight = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32) * np.float32(size)
    matrix = round_to_nearest(weight, 8, 32)
    with np.errstate(over="ignore"):
        assert not np.array_equal(matrix.scales.astype(np.float16).astype(np.float32), matrix.scales)
    assert np.abs(matrix.dequantize() - weight).max() < 0.01 * np.abs(weight).max()


def test_numbers_that_would_change_are_left_alone():
    def graph(**floats):
        values = {}
        for name, array in floats.items():
            tensor = ir.tensor(np.array(array, dtype=np.float32), name=name)
            values[name] = ir.Value(
                name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape
            )
        nodes = [ir.node("Identity", [value]) for value in values.values()]
        inner = ir.Graph([], [node.outputs[0] for node in nodes], nodes=nodes, initializers=list(values.values()))
        return ir.Model(inner, ir_version=10)

    before, after = graph(norm=[0.5]), graph(norm=[0.5], exact=[0.25, -3.0], other=[0.1], large=[1e6])
    store_scales_in_16_bits(after, before)
    found = {name: value.const_value.dtype for name, value in after.graph.initializers.items()}
    single = ir.DataType.FLOAT
    assert found == {"norm": single, "other": single, "large": single, "exact_float16": ir.DataType.FLOAT16}
    (cast,) = [node for node in after.graph if node.op_type == "Cast"]
    assert cast.attributes.get_int("to") == single and cast.outputs[0].uses()


def test_the_dequantized_model_is_the_file(tmp_path):
    """PyTorch with the matrices that were rounded says what the file says."""
    model = tiny_model("llama", 1)
    quantization = QuantizationConfig(weights=["int4"], method="rtn", accuracy_level=1)
    export_onnx(model, tmp_path, ExportConfig(), quantization, quiet=True)
    session = open_session(tmp_path / "onnx/model_q4.onnx")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.from_numpy(round_to_nearest(parameter.numpy(), 4, 32).dequantize()))
        ids = torch.tensor([[5, 9, 23, 4, 71]])
        expected = model(input_ids=ids).logits.numpy()
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 5), np.int64)}
    feeds["position_ids"] = np.arange(5)[None]
    for value in session.get_inputs():
        if "past" in value.name:
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    found = session.run(["logits"], feeds)[0]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
