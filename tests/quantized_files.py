"""Quantized files read back by their operators' own text, for the tests of export and rounding."""

import copy

import numpy as np
import onnx
import onnxruntime
import torch


def read_file(file):
    """Every quantized weight of a file as `{name: float32 [outputs, inputs]}`, decoded here from the operators' text."""
    graph = onnx.load(file).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    reshaped = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Reshape"}
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in stored:
            stored[node.output[0]] = stored[node.input[0]].astype(np.float32)
    widths = {node.input[0]: stored[node.input[1]] for node in graph.node if node.op_type == "Split"}
    weights = {}
    for node in graph.node:
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        options = {a.name: a.i for a in node.attribute}
        is_embedding = node.op_type == "GatherBlockQuantized"
        name = node.input[0] if is_embedding else reshaped.get(node.input[1], node.input[1])
        rows = []
        for row, scale in zip(stored[name].reshape(len(stored[name]), -1), stored[node.input[2]], strict=True):
            codes = row.tolist()
            if options["bits"] == 4:
                codes = [half for byte in codes for half in (byte % 16, byte // 16)]
            zero = 2 ** (options["bits"] - 1)
            rows.append([(code - zero) * float(scale[i // options["block_size"]]) for i, code in enumerate(codes)])
        # queries, keys and values are one product
        keys = ["embedding"] if is_embedding else [part.rsplit("_int", 1)[0] for part in name.split("+")]
        ends = np.cumsum(widths[node.output[0]])[:-1] if len(keys) > 1 else []
        matrix = np.array(rows, dtype=np.float32)[:, : options.get("K")]
        weights |= zip(keys, np.split(matrix, ends), strict=True)
    return weights


def dequantized_model(model, file):
    """A copy of the model with the weights that the file holds."""
    copied = copy.deepcopy(model)
    parameters = dict(copied.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, weight in read_file(file).items():
            target = copied.model.embed_tokens.weight if name == "embedding" else parameters[name]
            weight = torch.from_numpy(weight[:, : target.shape[1]])
            assert weight.shape == target.shape
            target.copy_(weight)
    return copied


def logits_of(file, ids, session=None):
    session = session or onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}
    feeds["position_ids"] = np.arange(ids.shape[1])[None].repeat(len(ids), 0)
    for value in session.get_inputs():
        if value.name not in feeds:
            feeds[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
    return torch.from_numpy(session.run(["logits"], feeds)[0])


def relative_difference(logits, reference):
    return ((logits - reference).abs().max() / reference.abs().max()).item()
