"""Graphs of small models, quantized in one format or another and run, for the tests of the formats."""

import collections
import functools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from tiny_onnx import onnx_test_model, small_zoo_model, traced_qwen3
from zoo import ZOO

from optimum_clp.exporters.float32_copy import float32_copy
from optimum_clp.exporters.graph.count import bits_per_weight
from optimum_clp.exporters.graph.float_graph import export_float_graph
from optimum_clp.exporters.graph.quantize import quantize_graph


@functools.cache
def traced(kind):
    """A model in float32, and its graph of standard operators."""
    if kind == "qwen3, a head of its own":
        return traced_qwen3().model, traced_qwen3().graph
    if kind == "llama, tied head":
        model = onnx_test_model("llama", tied=True, num_layers=2, initializer_range=0.3)
    elif kind == "llama, tied head, odd widths":
        sizes = {"hidden_size": 33, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16}
        model = onnx_test_model("llama", tied=True, num_layers=1, intermediate_size=51, **sizes)
    else:
        model = small_zoo_model(next(tiny for tiny in ZOO if tiny.name == kind))
    copied = float32_copy(model)
    return copied, export_float_graph(copied, opset=21)


def quantized_file(graph, bits, format, folder, **options):
    options = {"block_size": 32, "accuracy_level": 1, "quantize_embeddings": True} | options
    quantized = graph.clone()
    found = quantize_graph(quantized, bits, format=format, **options)
    file = folder / f"{format}.onnx"
    ir.save(quantized, file)
    return file, found, bits_per_weight(graph, quantized)


def logits_of(session, ids):
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}
    feeds["position_ids"] = np.arange(ids.shape[1])[None].repeat(len(ids), 0)
    inputs = session.get_inputs()
    for value in inputs:
        if value.name not in feeds:
            feeds[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
    return torch.from_numpy(session.run(["logits"], {value.name: feeds[value.name] for value in inputs})[0])


def unoptimized(file):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def operators_at_load(file):
    """What ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(file.with_suffix(".loaded"))
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
