"""A causal LM as one float32 ONNX graph with a key-value cache, under Optimum's input and output names.

Inputs are `input_ids`, `attention_mask`, `position_ids` and `past_key_values.{i}.key` / `.value`; outputs are `logits`
and `present.{i}.key` / `.value`. Batch, sequence and past are dynamic, and the past may be empty.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ...errors import ExportError
from ...forward.decoding import cache_keyword, cache_of
from ...runtime.names import FUSED_ATTENTION, cache_names
from ..experts import unrolled_experts
from ..layer_kinds import short_model
from ..obstacle import key_value_layers, takes_position_ids
from .file import stored_shape, stored_tensor
from .fused import FusedAttention, fuse_graph, fused
from .ordered_names import name_in_order, order_by_use
from .repeated_layers import NotRepeatable, repeat_layers
from .trace import traceable

logger = logging.getLogger(__name__)

_PREFIX = "causal_lm."
_COUNTED_SIZE = re.compile(r"\bu\d+\b")


class _FlatCacheModel(nn.Module):
    """`model` with its cache as a flat list of tensors, keys and values in turn, after the other inputs."""

    def __init__(self, model: PreTrainedModel, inputs: tuple[str, ...], attention: FusedAttention | None):
        super().__init__()
        self.causal_lm = model
        self.inputs = inputs
        self.cache_keyword = cache_keyword(model)
        self.attention = attention

    def forward(self, *tensors):
        named = dict(zip(self.inputs, tensors, strict=False))
        past = tensors[len(named) :]
        if self.attention is not None:
            past_length = named["attention_mask"].shape[1] - named["input_ids"].shape[1]
            cache = self.attention.begin(list(past), past_length)
            output = self.causal_lm(**named, **{self.cache_keyword: cache}, use_cache=True)
            present = self.attention.present
            return output.logits, *(states for index in sorted(present) for states in present[index])
        cache = DynamicCache([(past[i], past[i + 1]) for i in range(0, len(past), 2)])
        output = self.causal_lm(**named, **{self.cache_keyword: cache}, use_cache=True)
        layers = key_value_layers(cache_of(output))
        return output.logits, *(states for layer in layers for states in (layer.keys, layer.values))


def input_names(model: PreTrainedModel) -> tuple[str, ...]:
    """The graph's inputs before the cache; `position_ids` only where the model takes them, as in Optimum."""
    return (
        ("input_ids", "attention_mask", "position_ids")
        if takes_position_ids(model)
        else ("input_ids", "attention_mask")
    )


def export_float_graph(model: PreTrainedModel, opset: int, *, fuse: bool = False, repeat: bool = True) -> ir.Model:
    """Trace a model into an ONNX graph.

    Each linear layer stays `MatMul(x, Transpose(weight))`, with the weight under its PyTorch name and in its PyTorch
    storage: nothing is copied. [`fold_weight_transposes`] makes of it what is written to the float file.

    Args:
        model ([`~transformers.PreTrainedModel`]): From [`~exporters.float32_copy.float32_copy`].
        opset (`int`): ONNX opset, 21 to 23.
        fuse (`bool`): With ONNX Runtime's fused operators, for a model without
            [`~exporters.graph.fused.fused_obstacle`].
        repeat (`bool`): Trace three layers of each kind and repeat one of them, where that is the same graph; otherwise, and
            where it is not, all layers.

    Returns:
        `onnx_ir.Model`: Without metadata, documentation strings or paths of this machine.

    Raises:
        ExportError: If the model's rotary embedding depends on the length of the text, or torch cannot trace it.
    """
    short = short_model(model) if repeat else None
    graph = None
    if short is not None:
        try:
            graph = _traced(short.model, opset, fuse)
            with unrolled_experts(model), unrolled_experts(short.model):
                repeat_layers(graph, short, model, _PREFIX)
        except (NotRepeatable, ExportError) as reason:
            logger.debug(f"export: all layers are traced, since {reason}")
            graph = None
    if graph is None:
        graph = _traced(model, opset, fuse)
    _simplify(graph)
    _split_gemms(graph)
    if fuse:
        fuse_graph(graph)
        _simplify(graph)
    _strip(graph, model)
    if fuse:
        graph.metadata_props[FUSED_ATTENTION] = "GroupQueryAttention"
    return graph


def _traced(model: PreTrainedModel, opset: int, fuse: bool) -> ir.Model:
    """What torch makes of a model, without what each layer computes again; weights that are equal are not made one yet."""
    names = input_names(model)
    attention = FusedAttention(symbolic=True) if fuse else None
    try:
        with torch.no_grad(), unrolled_experts(model), traceable(model), ExitStack() as stack:
            inputs, dynamic_shapes = _sample(model, names)
            num_layers = (len(inputs) - len(names)) // 2
            if attention is not None:
                stack.enter_context(fused(model, attention))
            program = torch.onnx.export(
                _FlatCacheModel(model, names, attention),
                inputs,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                input_names=[*names, *cache_names("past_key_values", num_layers)],
                output_names=["logits", *cache_names("present", num_layers)],
                dynamic_shapes=(dynamic_shapes,),
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError.of(
            "model",
            type(model).__name__,
            f"torch.onnx.export cannot trace it ({reason[:300]})",
            "Set export.enabled to False to do without the ONNX files",
        ) from error
    assert program is not None
    graph = program.model
    _forget_counted_sizes(graph)
    _read_sizes_of_first_inputs(graph)
    _simplify(graph, weights=False)
    return graph


def _read_sizes_of_first_inputs(graph: ir.Model) -> None:
    """Let a size that several inputs have, such as the past's, be read from the first of these: torch takes any of them."""
    first: dict[tuple, ir.Value] = {}
    for value in graph.graph.inputs:
        shape = value.shape or ir.Shape(())
        for axis, size in enumerate(shape):
            first.setdefault((len(shape), axis, str(size)), value)
    for node in graph.graph:
        source = node.inputs[0] if node.op_type == "Shape" else None
        start = node.attributes.get_int("start", 0)
        if source is None or not source.is_graph_input() or source.shape is None:
            continue
        if node.attributes.get_int("end", len(source.shape)) == start + 1:
            node.replace_input_with(0, first[len(source.shape), start, str(source.shape[start])])


def _forget_counted_sizes(graph: ir.Model) -> None:
    """Forget the names of sizes that depend on numbers, such as how many tokens chose an expert: torch counts them through all layers."""
    for node in graph.graph:
        for value in node.outputs:
            for axis, size in enumerate(value.shape or ()):
                if value.shape is not None and _COUNTED_SIZE.search(str(size)):
                    value.shape[axis] = None


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Without torch's notes on packages that the export does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


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
    # the trace of an indexed table has a Transpose that changes nothing
    permutation = node.attributes.get_ints("perm", (1, 0))
    return node.inputs[0] if is_stored_matrix(node.inputs[0]) and list(permutation) == [1, 0] else None


def is_stored_matrix(value: ir.Value | None) -> bool:
    """Whether `value` is a float32 matrix that is stored in the graph."""
    return (
        value is not None
        and value.is_initializer()
        and value.const_value is not None
        and value.const_value.dtype == ir.DataType.FLOAT
        and len(value.const_value.shape) == 2
    )


def stored_weight(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """The stored matrix that a product's second input is or transposes, and whether it is stored as `[outputs, inputs]`."""
    if is_stored_matrix(value):
        return value, False
    producer = value.producer() if value is not None else None
    return (transposed_weight(producer), True) if producer is not None else (None, False)


def _lazy_transpose(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    shape = ir.Shape(stored_shape(tensor)[::-1])
    return ir.LazyTensor(lambda: ir.tensor(tensor.numpy().T), dtype=tensor.dtype, shape=shape, name=tensor.name)


def _initializer_like(old: ir.Value, tensor: ir.LazyTensor) -> ir.Value:
    return ir.Value(name=old.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def _sample(model: PreTrainedModel, names: tuple[str, ...]) -> tuple[tuple, tuple]:
    """Example inputs, and which of their axes are dynamic.

    No dynamic axis has length 0 or 1, which torch.export would take for a constant, and the mask has zeros, without
    which transformers leaves it out of the graph.
    """
    batch, length, past_length = 2, 3, 5
    input_ids = torch.ones(batch, length, dtype=torch.long)
    attention_mask = torch.ones(batch, past_length + length, dtype=torch.long)
    attention_mask[0, :2] = 0
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past_length:].contiguous()
    tokens = {0: "batch_size", 1: "sequence_length"}
    mask = {0: "batch_size", 1: "total_sequence_length"}
    inputs, shapes = [input_ids, attention_mask, position_ids][: len(names)], [tokens, mask, tokens][: len(names)]
    for layer in key_value_layers(cache_of(model(input_ids=input_ids, use_cache=True))):
        assert layer.keys is not None and layer.values is not None
        for states in (layer.keys, layer.values):
            inputs.append(torch.zeros(batch, states.shape[1], past_length, states.shape[3]))
            shapes.append({0: "batch_size", 2: "past_sequence_length"})
    return tuple(inputs), tuple(shapes)


def _simplify(graph: ir.Model, weights: bool = True) -> None:
    """Fold constants, but not the transposes of weights, and drop what is stored or computed twice.

    This is onnxscript's own optimizer without its rewrite rules, which take a third of the export's time for a graph
    that ONNX Runtime brings to the same size when it loads it.

    Args:
        graph (`onnx_ir.Model`): The graph, changed in place.
        weights (`bool`): Small weights that are equal become one, too.
    """

    def folds(node: ir.Node) -> bool | None:
        """What is computed of weights alone stays where these are to be told apart; `None` leaves it to the optimizer."""
        kept = transposed_weight(node) is not None or (not weights and any(map(_is_weight, node.inputs)))
        return False if kept else None

    optimizer.fold_constants_ir(graph, should_fold=folds)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    )(graph)
    if weights:
        # of several that are equal the first one stays
        order_by_use(graph)
        common.DeduplicateInitializersPass()(graph)
    else:
        _merge_constants(graph)
    ir.passes.Sequential(
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(graph)


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and str(value.name).startswith(_PREFIX)


def _merge_constants(graph: ir.Model) -> None:
    """Store constants once that are equal, and leave the model's tensors alone, in place."""
    known: dict[tuple, ir.Value] = {}
    for value in [value for value in graph.graph.initializers.values() if not _is_weight(value)]:
        tensor = stored_tensor(value)
        first = known.setdefault((tensor.dtype, stored_shape(tensor), tensor.tobytes()), value)
        if first is not value and not value.is_graph_output():
            value.replace_all_uses_with(first)
            del graph.graph.initializers[str(value.name)]


def _split_gemms(graph: ir.Model) -> None:
    """Turn `Gemm` by a stored matrix into `MatMul` and `Add`, in place.

    Layers whose input is a matrix (experts, OPT), and `Conv1D`, are traced as `Gemm`, for which there is no form with
    quantized weights.
    """
    for node in list(graph.graph):
        if node.op_type != "Gemm" or node.domain not in ("", "ai.onnx"):
            continue
        weight, scales = node.inputs[1], [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
        if stored_weight(weight)[0] is None or scales != [1.0, 1.0] or node.attributes.get_int("transA"):
            continue
        new = []
        if node.attributes.get_int("transB"):
            new.append(ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{node.name}_transpose"))
            weight = new[-1].outputs[0]
        new.append(ir.node("MatMul", [node.inputs[0], weight], name=f"{node.name}_matmul"))
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            new.append(ir.node("Add", [new[-1].outputs[0], node.inputs[2]], name=f"{node.name}_add"))
        for part in new:
            part.outputs[0].name = f"{part.name}_output"
        old, result = node.outputs[0], new[-1].outputs[0]
        result.shape, result.type, result.name = old.shape, old.type, old.name
        graph.graph.insert_before(node, new)
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        graph.graph.remove(node, safe=True)


def _strip(graph: ir.Model, model: PreTrainedModel) -> None:
    """Remove stack traces and paths; give the weights the names that they have in the checkpoint."""
    common.ClearMetadataAndDocStringPass()(graph)
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    values = [*graph.graph.inputs, *graph.graph.initializers.values()]
    for node in graph.graph:
        values += node.outputs
    for value in values:
        value.metadata_props.clear()
    # a norm's weight reaches a fused operator as a tensor without a name
    known = {(tensor.data_ptr(), tensor.shape): name for name, tensor in model.named_parameters()}
    names: dict[int, str] = {}
    for name, value in graph.graph.initializers.items():
        raw = getattr(stored_tensor(value), "raw", None)
        place = (raw.data_ptr(), raw.shape) if isinstance(raw, torch.Tensor) else None
        if ".lifted_tensor_" in name and place in known:
            names[id(value)] = known[place]
        elif name.startswith(_PREFIX) and ".lifted_tensor_" not in name:
            names[id(value)] = name.removeprefix(_PREFIX)
    name_in_order(graph, names)
