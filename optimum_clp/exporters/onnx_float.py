"""A causal LM as one float32 ONNX graph with a key-value cache, under Optimum's input and output names.

Inputs are `input_ids`, `attention_mask`, `position_ids` and `past_key_values.{i}.key` / `.value`; outputs are `logits`
and `present.{i}.key` / `.value`. Batch, sequence and past are dynamic, and the past may be empty.
"""

import copy
import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import torch
from accelerate import init_empty_weights
from onnx_ir.passes import common
from onnxscript import optimizer
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..errors import ExportError, Problem
from .onnx_file import stored_shape, stored_tensor

# The rotary frequencies of these types depend on the length of the text, which a traced graph would freeze.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_PREFIX = "causal_lm."


class _FlatCacheModel(nn.Module):
    """`model` with its cache as a flat list of tensors, keys and values in turn."""

    def __init__(self, model: PreTrainedModel, num_layers: int):
        super().__init__()
        self.causal_lm = model
        self.num_layers = num_layers

    def forward(self, input_ids, attention_mask, position_ids, *past):
        cache = DynamicCache([(past[2 * i], past[2 * i + 1]) for i in range(self.num_layers)])
        output = self.causal_lm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [states for layer in output.past_key_values.layers for states in (layer.keys, layer.values)]
        return output.logits, *present


def cache_names(prefix: str, num_layers: int) -> list[str]:
    """Names of the cache's tensors in the graph's order: `{prefix}.0.key`, `{prefix}.0.value`, `{prefix}.1.key`, ..."""
    return [f"{prefix}.{layer}.{kind}" for layer in range(num_layers) for kind in ("key", "value")]


def float32_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in float32 on the CPU, in evaluation mode, with SDPA attention; `model` is left as it is.

    The twin is built from a copy of the configuration. It shares the storage of every weight that is in float32 on the
    CPU already; only other weights are copied, at 4 bytes for each parameter.

    Args:
        model ([`~transformers.PreTrainedModel`]): Any dtype, device and mode.

    Returns:
        [`~transformers.PreTrainedModel`]: Not to be trained: its weights may be those of `model`.

    Raises:
        ExportError: If weights are offloaded, or the weights are not those of the configuration.
    """
    offloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if offloaded:
        raise ExportError(
            Problem(
                "model",
                offloaded[0],
                f"{len(offloaded)} of its weights are offloaded and cannot be read",
                "Load the model without device_map",
            )
        )
    config = copy.deepcopy(model.config)
    config._attn_implementation = "sdpa"
    # Buffers such as the rotary frequencies are computed anew: they are not in the state dict, and a model that was
    # cast to 16 bits has lost half of their digits.
    with init_empty_weights(include_buffers=False):
        twin = type(model)(config)
    copies: dict[tuple, torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        # tied weights come under two names: one copy serves both
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
        state[name] = copies[key]
    try:
        twin.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(
            Problem(
                "model",
                type(model).__name__,
                f"its weights are not those that its configuration describes ({reason})",
                "Save it, load it with AutoModelForCausalLM and export that",
            )
        ) from error
    twin.tie_weights()
    return twin.requires_grad_(False).eval()


def export_float_graph(twin: PreTrainedModel, opset: int) -> ir.Model:
    """Trace a model into an ONNX graph.

    Each linear layer stays `MatMul(x, Transpose(weight))`, with the weight under its PyTorch name and in its PyTorch
    storage: nothing is copied. [`fold_weight_transposes`] makes of it what is written to the float file.

    Args:
        twin ([`~transformers.PreTrainedModel`]): From [`float32_twin`].
        opset (`int`): ONNX opset, 21 to 23.

    Returns:
        `onnx_ir.Model`: Without metadata, documentation strings or paths of this machine.

    Raises:
        ExportError: If the model's rotary embedding depends on the length of the text, or torch cannot trace it.
    """
    _refuse_length_dependent_rope(twin)
    inputs, dynamic_shapes = _sample(twin)
    num_layers = len(dynamic_shapes[3]) // 2
    try:
        # torch warns about each axis name that equals another one, which is what is meant here
        with torch.no_grad(), _collector_paused(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _FlatCacheModel(twin, num_layers),
                inputs,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                input_names=[
                    "input_ids",
                    "attention_mask",
                    "position_ids",
                    *cache_names("past_key_values", num_layers),
                ],
                output_names=["logits", *cache_names("present", num_layers)],
                dynamic_shapes=dynamic_shapes,
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            Problem(
                "model",
                type(twin).__name__,
                f"torch.onnx.export cannot trace it ({reason[:300]})",
                "Set export.enabled to False to do without the ONNX files",
            )
        ) from error
    assert program is not None
    graph = program.model
    _simplify(graph)
    _strip(graph)
    return graph


def fold_weight_transposes(graph: ir.Model) -> None:
    """Turn `MatMul(x, Transpose(weight))` into `MatMul(x, weight)` with the transposed weight, in place.

    A weight with another use, which is the embedding of a tied head, keeps its `Transpose`, so that it is stored once;
    ONNX Runtime folds that one when it loads the file. The new weights are transposed only while they are written.
    """
    for node in list(graph.graph):
        old = transposed_weight(node)
        if old is None or len(old.uses()) > 1:
            continue
        tensor = stored_tensor(old)
        new = _initializer_like(old, _lazy_transpose(tensor))
        node.outputs[0].replace_all_uses_with(new)
        graph.graph.remove(node, safe=True)
        del graph.graph.initializers[str(old.name)]
        graph.graph.register_initializer(new)


def transposed_weight(node: ir.Node) -> ir.Value | None:
    """The matrix stored in the graph that `node` transposes, if it is such a node."""
    if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
        return None
    return node.inputs[0] if is_stored_matrix(node.inputs[0]) else None


def is_stored_matrix(value: ir.Value | None) -> bool:
    """Whether `value` is a float32 matrix that is stored in the graph."""
    return (
        value is not None
        and value.is_initializer()
        and value.const_value is not None
        and value.const_value.dtype == ir.DataType.FLOAT
        and len(value.const_value.shape) == 2
    )


def _lazy_transpose(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    shape = ir.Shape(stored_shape(tensor)[::-1])
    return ir.LazyTensor(lambda: ir.tensor(tensor.numpy().T), dtype=tensor.dtype, shape=shape, name=tensor.name)


def _initializer_like(old: ir.Value, tensor: ir.LazyTensor) -> ir.Value:
    return ir.Value(name=old.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def _refuse_length_dependent_rope(model: PreTrainedModel) -> None:
    rope = getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind in _LENGTH_DEPENDENT_ROPE:
        raise ExportError(
            Problem(
                "rope_type",
                kind,
                "its rotary frequencies change with the length of the text, which an ONNX graph cannot follow",
                "Use a model with rope type default, linear, llama3 or yarn",
            )
        )


def _sample(model: PreTrainedModel) -> tuple[tuple, tuple]:
    """Example inputs, and which of their axes are dynamic.

    No dynamic axis has length 0 or 1, which torch.export would take for a constant, and the mask has zeros, without
    which transformers leaves it out of the graph.
    """
    batch, length, past_length = 2, 3, 5
    input_ids = torch.ones(batch, length, dtype=torch.long)
    with torch.no_grad():
        layers = model(input_ids=input_ids, use_cache=True).past_key_values.layers
    past = []
    for layer in layers:
        for states in (layer.keys, layer.values):
            past.append(torch.zeros(batch, states.shape[1], past_length, states.shape[3]))
    attention_mask = torch.ones(batch, past_length + length, dtype=torch.long)
    attention_mask[0, :2] = 0
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past_length:]
    dynamic_shapes = (
        {0: "batch_size", 1: "sequence_length"},
        {0: "batch_size", 1: "total_sequence_length"},
        {0: "batch_size", 1: "sequence_length"},
        tuple({0: "batch_size", 2: "past_sequence_length"} for _ in past),
    )
    return (input_ids, attention_mask, position_ids, *past), dynamic_shapes


def _simplify(graph: ir.Model) -> None:
    """Fold constants, but not the transposes of weights, and drop what is stored or computed twice.

    This is onnxscript's own optimizer without its rewrite rules, which take a third of the export's time for a graph
    that ONNX Runtime brings to the same size when it loads it.
    """
    optimizer.fold_constants_ir(graph, should_fold=lambda node: False if transposed_weight(node) is not None else None)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(graph)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without garbage collection, which takes a quarter of the time while a trace makes millions of objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _strip(graph: ir.Model) -> None:
    """Remove stack traces and paths; give the weights the names that they have in the checkpoint."""
    common.ClearMetadataAndDocStringPass()(graph)
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    values = [*graph.graph.inputs, *graph.graph.initializers.values()]
    for node in graph.graph:
        values += node.outputs
    for value in values:
        value.metadata_props.clear()
    for name in list(graph.graph.initializers):
        value = graph.graph.initializers[name]
        value.name = name.removeprefix(_PREFIX)
        stored_tensor(value).name = value.name
