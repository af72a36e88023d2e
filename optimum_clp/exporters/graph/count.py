"""How many quantized nodes a graph must have, counted on the PyTorch model; and how many bits a weight takes."""

import math
from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ..experts import unrolled_experts
from .file import stored_shape, stored_tensor

_PRODUCTS = {torch.ops.aten.mm.default: 1, torch.ops.aten.addmm.default: 2, torch.ops.aten.bmm.default: 1}


@dataclass(frozen=True)
class QuantizedNodes:
    """How many nodes of the graph have quantized weights.

    Args:
        matmuls (`int`): `MatMulNBits`, or `MatMul` by a `DequantizeLinear`.
        embeddings (`int`): `GatherBlockQuantized`, or a `DequantizeLinear` of looked-up rows.
    """

    matmuls: int
    embeddings: int


def expected_nodes(
    model: PreTrainedModel, quantize_embeddings: bool, only: Collection[torch.Tensor] | None = None
) -> QuantizedNodes:
    """How many nodes a complete quantization has: each product with a weight, and each look-up of the tokens.

    One forward pass of two tokens is watched, so that linear layers, `Conv1D`, experts and routers are all counted,
    whatever their class, and a layer that runs twice counts twice; modules that never run do not count.

    Args:
        model ([`~transformers.PreTrainedModel`]): In float32 on the CPU, in evaluation mode.
        quantize_embeddings (`bool`): Whether the embedding is to be quantized, and a head that is tied to it.
        only (`Collection[Tensor]`, *optional*): Weights that are to be quantized, if it is not all of them.

    Returns:
        [`QuantizedNodes`]
    """
    # descending, so that positions are not taken for tokens
    ids = torch.tensor([[3, 2]])
    with torch.no_grad(), unrolled_experts(model), _WeightCounter(model, ids) as counter:
        model(input_ids=ids, use_cache=False)
    if only is not None:
        storages = {weight.untyped_storage().data_ptr() for weight in only}
        return QuantizedNodes(sum(weight in storages for weight in counter.products), 0)
    if quantize_embeddings:
        return QuantizedNodes(len(counter.products), len(counter.embeddings))
    return QuantizedNodes(sum(weight not in counter.embeddings for weight in counter.products), 0)


def bits_per_weight(float_graph: ir.Model, quantized: ir.Model) -> float:
    """Bits that a quantized weight takes in the file: integers, scales and zero points over the number of weights.

    Weights that are in float32 in both graphs are not counted; an embedding that is the head too counts once.

    Args:
        float_graph (`onnx_ir.Model`): Before the quantization.
        quantized (`onnx_ir.Model`): After it.

    Returns:
        `float`
    """
    before, after = float_graph.graph.initializers, quantized.graph.initializers
    weights = sum(math.prod(stored_shape(stored_tensor(before[name]))) for name in before.keys() - after.keys())
    stored = [stored_tensor(after[name]) for name in after.keys() - before.keys()]
    # shapes, bounds of slices and the like, which are no matrices, are no weights
    return 8 * sum(tensor.nbytes for tensor in stored if len(tensor.shape) > 1) / weights


class _WeightCounter(TorchDispatchMode):
    """Lists the storages of the parameters that are multiplied by, and of those in which the tokens are looked up."""

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor):
        super().__init__()
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.ids = ids.flatten()
        self.products: list[int] = []
        self.embeddings: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in _PRODUCTS:
            operand = args[_PRODUCTS[function]].untyped_storage().data_ptr()
            if operand in self.weights:
                self.products.append(operand)
        elif function is torch.ops.aten.embedding.default and torch.equal(args[1].flatten(), self.ids):
            self.embeddings.append(args[0].untyped_storage().data_ptr())
        return function(*args, **(kwargs or {}))
