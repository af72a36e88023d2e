"""Graphs that compute in float16: what is stored, what is cast, and what comes out beside PyTorch in float32."""

import collections
import functools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from quantized_files import read_file
from tiny_models import random_tokens
from tiny_onnx import onnx_test_model, small_zoo_model, traced_qwen3
from zoo import ZOO

from optimum_clp.errors import ExportError
from optimum_clp.exporters.check import FileCheck
from optimum_clp.exporters.float32_copy import float32_copy
from optimum_clp.exporters.graph.file import save_graph
from optimum_clp.exporters.graph.float_graph import export_float_graph, fold_weight_transposes
from optimum_clp.exporters.graph.half import to_float16
from optimum_clp.exporters.graph.logits import choose_positions
from optimum_clp.exporters.graph.norms import spell_out_norms
from optimum_clp.exporters.graph.packing import pack_projections
from optimum_clp.exporters.graph.quantize import quantize_graph

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


@functools.cache
def traced(kind):
    if kind == "qwen3":
        return traced_qwen3().model, traced_qwen3().graph
    if kind == "llama, fused":
        model = float32_copy(onnx_test_model("llama", tied=True, num_layers=2))
        return model, export_float_graph(model, 21, fuse=True)
    model = float32_copy(small_zoo_model(next(tiny for tiny in ZOO if tiny.name == kind)))
    return model, export_float_graph(model, 21)


def half_file(graph, folder, bits=None, format="contrib", **options):
    graph = graph.clone()
    choose_positions(graph, 0)
    if bits is None:
        fold_weight_transposes(graph)
    else:
        settings = {"block_size": 32, "accuracy_level": 1, "quantize_embeddings": True}
        quantize_graph(graph, bits, format=format, **settings)
        pack_projections(graph)
    spell_out_norms(graph)
    to_float16(graph, **options)
    save_graph(graph, folder / "half.onnx")
    onnx.checker.check_model(str(folder / "half.onnx"), full_check=True)
    return folder / "half.onnx"


@pytest.mark.parametrize("wide_sums", [False, True])
@pytest.mark.parametrize("kind", ["llama, fused", "qwen3", "gpt2"])
def test_logits_are_pytorchs_to_the_digits_of_float16(kind, wide_sums, tmp_path):
    model, graph = traced(kind)
    file = half_file(graph, tmp_path, wide_sums=wide_sums)
    # a few steps of 2^-11 one after the other
    assert 1e-6 < FileCheck(model, tmp_path).error(file) < 1e-2


def test_a_file_takes_half_of_the_bytes_and_gives_its_cache_in_16_bits(tmp_path):
    model, graph = traced("llama, fused")
    file = half_file(graph, tmp_path)
    found = onnx.load(file).graph
    stored = [tensor for tensor in found.initializer if tensor.data_type in (FLOAT, HALF)]
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert {tensor.data_type for tensor in stored if len(tensor.dims) == 2} == {HALF}
    # a tied table once, and every matrix under its own name
    assert sum(int(np.prod(t.dims)) for t in stored if len(t.dims) == 2) == sum(w.numel() for w in weights.values())
    by_name = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in stored}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight.dim() == 2 and name in by_name:
            expected = weight.detach().half().numpy()
            assert np.array_equal(by_name[name], expected) or np.array_equal(by_name[name], expected.T)
            weights.pop(name, None)
    # all but the table, which the graph knows under the head's name
    assert len(weights) <= 1
    kinds = {value.name: value.type.tensor_type.elem_type for value in [*found.input, *found.output]}
    assert {kinds[name] for name in kinds if name.startswith(("past_key_values", "present"))} == {HALF}
    assert kinds["logits"] == FLOAT


def test_angles_of_late_positions_keep_their_digits(tmp_path):
    # float16 counts to 2048 one by one: behind that two neighbours would be one
    model, graph = traced("llama, fused")
    file = half_file(graph, tmp_path)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    ids = random_tokens(1, 6)
    positions = torch.arange(4095, 4101)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 6), np.int64), "position_ids": positions.numpy()}
    for value in session.get_inputs():
        if value.name not in feeds:
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float16)
    found = torch.from_numpy(session.run(["logits"], feeds)[0])
    assert (found - expected).abs().max() / expected.abs().max() < 1e-2


@pytest.mark.parametrize("format", ["contrib", "qdq", "unpacked"])
def test_integers_stay_and_what_they_meet_takes_16_bits(format, tmp_path):
    model, graph = traced("llama, fused")
    file = half_file(graph, tmp_path, bits=8, format=format)
    assert FileCheck(model, tmp_path).error(file) < 0.05
    found = onnx.load(file).graph
    # the frequencies of the positions, a dozen numbers, are a matrix in transformers 4
    tables = [tensor for tensor in found.initializer if len(tensor.dims) >= 2 and np.prod(tensor.dims) > 16]
    assert {tensor.data_type for tensor in tables} <= {HALF, onnx.TensorProto.UINT8, onnx.TensorProto.INT8}
    if format == "contrib":
        operators = collections.Counter(node.op_type for node in found.node)
        assert operators["MatMulNBits"] and operators["GatherBlockQuantized"]
        # scales that were to be cast at load are taken as they are
        weights = read_file(file)
        name, weight = "model.layers.0.mlp.up_proj.weight", model.model.layers[0].mlp.up_proj.weight
        assert np.abs(weights[name] - weight.detach().numpy()).max() < weight.abs().max() / 100


def test_hidden_states_beyond_float16_want_wide_sums(tmp_path):
    model = onnx_test_model("llama", tied=False, num_layers=3)
    with torch.no_grad():
        largest = scaled_beyond_float16(model)
    assert 65504 < largest < 150_000
    copied = float32_copy(model)
    graph = export_float_graph(copied, 21, fuse=True)
    check = FileCheck(copied, tmp_path)
    assert not check.error(half_file(graph, tmp_path)) < 0.1
    assert check.error(half_file(graph, tmp_path, wide_sums=True)) < 1e-2


def scaled_beyond_float16(model):
    """Let each MLP put out up to 50000, so that the sums of three leave float16's range; returns the largest sum."""
    ids = random_tokens(3, 20)
    for layer in model.model.layers:
        seen = []
        handle = layer.mlp.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output.abs().max())
        )
        model(input_ids=ids)
        handle.remove()
        layer.mlp.down_proj.weight.mul_(50_000 / seen[0])
    return max(
        states.abs().max().item() for states in model(input_ids=ids, output_hidden_states=True).hidden_states[:-1]
    )


def test_a_weight_beyond_float16_is_named(tmp_path):
    model = onnx_test_model("llama", tied=False, num_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = 1e5
    graph = export_float_graph(float32_copy(model), 21)
    with pytest.raises(ExportError, match=r"up_proj.*100000 does not fit into float16, which ends at 65504"):
        half_file(graph, tmp_path)
