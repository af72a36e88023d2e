import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from quantized_files import dequantized_model, logits_of, relative_difference
from tiny_models import random_tokens
from tiny_onnx import exported_llama, traced_qwen3

from optimum_clp.errors import QuantizationError
from optimum_clp.exporters.graph.count import QuantizedNodes, expected_nodes
from optimum_clp.exporters.graph.quantize import check_quantized_nodes, quantize_graph


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("kind", ["tied llama file", "qwen3 graph"])
def test_quantized_file_is_the_model_with_dequantized_weights(kind, bits, block_size, tmp_path):
    """Hidden 32 and intermediate 56: both end within a block of 64, intermediate also within one of 32."""
    if kind == "qwen3 graph":
        model, graph = traced_qwen3().model, traced_qwen3().graph.clone()
    else:  # from the float file, in which weights are stored as [inputs, outputs]
        model, graph = exported_llama().model, ir.load(exported_llama().folder / "onnx/model.onnx")
    found = quantize_graph(graph, bits, block_size=block_size, accuracy_level=1, quantize_embeddings=True)
    assert found == expected_nodes(model, True)
    file = tmp_path / "quantized.onnx"
    ir.save(graph, file)
    ids = random_tokens(2, 9)
    with torch.no_grad():
        reference = dequantized_model(model, file)(input_ids=ids).logits
        dense = model(input_ids=ids).logits
    assert relative_difference(logits_of(file, ids), reference) < 1e-5
    # the rounding itself is far larger than that
    assert 1e-4 < relative_difference(reference, dense) < (0.1 if bits == 8 else 1)


def test_accuracy_level_4_is_near_level_1(tmp_path):
    ids = random_tokens(2, 9)
    logits = {}
    for level in (1, 4):
        graph = traced_qwen3().graph.clone()
        quantize_graph(graph, 8, block_size=32, accuracy_level=level, quantize_embeddings=True)
        ir.save(graph, tmp_path / f"{level}.onnx")
        levels = {
            a.i for n in onnx.load(tmp_path / f"{level}.onnx").graph.node for a in n.attribute if "accur" in a.name
        }
        assert levels == {level}
        logits[level] = logits_of(tmp_path / f"{level}.onnx", ids)
    assert relative_difference(logits[4], logits[1]) < 0.1


@pytest.mark.parametrize("bits", [4, 8])
def test_float_weights_are_gone_from_the_quantized_graph(bits):
    graph = traced_qwen3().graph.clone()
    quantize_graph(graph, bits, block_size=32, accuracy_level=4, quantize_embeddings=True)
    matrices = [
        value.name
        for value in graph.graph.initializers.values()
        if value.const_value.dtype == ir.DataType.FLOAT and len(value.shape) == 2 and "scales" not in value.name
    ]
    assert matrices == []
    assert not any(node.op_type == "MatMul" and node.inputs[1].is_initializer() for node in graph.graph)
    norms = {n: p for n, p in traced_qwen3().model.named_parameters() if p.dim() == 1}
    for name, parameter in norms.items():
        stored = graph.graph.initializers[name].const_value.numpy()
        np.testing.assert_array_equal(stored, parameter.detach().numpy())


def test_embedding_and_its_tied_head_stay_in_float_if_asked(tmp_path):
    model = exported_llama().model
    graph = ir.load(exported_llama().folder / "onnx/model.onnx")
    found = quantize_graph(graph, 4, block_size=32, accuracy_level=1, quantize_embeddings=False)
    assert found == expected_nodes(model, False) == QuantizedNodes(matmuls=14, embeddings=0)
    ir.save(graph, tmp_path / "quantized.onnx")
    copied = dequantized_model(model, tmp_path / "quantized.onnx")
    assert torch.equal(copied.lm_head.weight, model.lm_head.weight)
    ids = random_tokens(2, 9)
    with torch.no_grad():
        reference = copied(input_ids=ids).logits
    assert relative_difference(logits_of(tmp_path / "quantized.onnx", ids), reference) < 1e-5


def test_head_of_its_own_is_quantized_without_the_embedding():
    model, graph = traced_qwen3().model, traced_qwen3().graph.clone()
    found = quantize_graph(graph, 8, block_size=32, accuracy_level=4, quantize_embeddings=False)
    assert found == expected_nodes(model, False) == QuantizedNodes(matmuls=7 * 2 + 1, embeddings=0)


def test_expected_counts_come_from_the_model():
    assert expected_nodes(exported_llama().model, True) == QuantizedNodes(matmuls=7 * 2 + 1, embeddings=1)
    assert expected_nodes(traced_qwen3().model, True) == QuantizedNodes(matmuls=7 * 2 + 1, embeddings=1)


def test_a_layer_left_in_float_is_named():
    graph = traced_qwen3().graph.clone()
    expected = expected_nodes(traced_qwen3().model, True)
    node = next(node for node in graph.graph if "q_proj" in str(node.inputs[0].name if node.inputs else ""))
    hidden = ir.node("Identity", [node.outputs[0]])
    node.outputs[0].replace_all_uses_with(hidden.outputs[0])
    hidden.replace_input_with(0, node.outputs[0])
    graph.graph.insert_after(node, hidden)
    found = quantize_graph(graph, 4, block_size=32, accuracy_level=4, quantize_embeddings=True)
    assert found == QuantizedNodes(expected.matmuls - 1, expected.embeddings)
    with pytest.raises(
        QuantizationError, match="14 linear layers and 1 embeddings are quantized, the model has 15 and 1"
    ):
        check_quantized_nodes(graph, found, expected)
    untouched = traced_qwen3().graph.clone()
    with pytest.raises(QuantizationError, match=r"MatMul \w+ \(model\.layers\.0\.self_attn\.q_proj\.weight\)"):
        check_quantized_nodes(untouched, QuantizedNodes(0, 0), expected)
