"""Fused operators of ONNX Runtime in place of the parts that a trace takes to pieces: attention, rotary embedding, norms.

`GroupQueryAttention` appends to the cache itself; `RotaryEmbedding` and `SimplifiedLayerNormalization` stand for a dozen
small nodes each. They are put in while the model is traced, as symbolic operators, where the model's own code asks for
attention (transformers' `AttentionInterface`) or calls a function or a module that computes the same. Whether it does is
tried on numbers, not read from names; and every file is compared with PyTorch afterwards.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, cast
from unittest import mock

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...forward.decoding import cache_keyword, cache_of
from ..obstacle import key_value_layers, takes_position_ids

_NAME = "optimum_clp_group_query_attention"
_FLOAT = ir.DataType.FLOAT.value
_CONTRIB = "com.microsoft"
_SWAP = [0, 2, 1, 3]
# what GroupQueryAttention has no input for
_UNKNOWN = ("s_aux", "position_bias", "head_mask", "indices", "alibi")
_ROTARY = "apply_rotary_pos_emb"


class FusedAttention:
    """The attention function of one trace: it takes the past of each layer, and keeps its present.

    Args:
        symbolic (`bool`): Put the operator into the trace; otherwise compute the same in PyTorch, to see whether the model
            can be written this way.

    Attributes:
        past (`list[Tensor]`): Keys and values of each cache entry in turn, `[batch, heads, past, size]`.
        present (`dict[int, tuple[Tensor, Tensor]]`): By cache entry: what the pass has made of them.
    """

    def __init__(self, symbolic: bool):
        self.symbolic = symbolic
        self.past: list[Tensor] = []
        self.present: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, past: list[Tensor], past_length: int) -> DynamicCache:
        """A cache for one pass, which knows the past's length and hands new keys and values on as they are.

        Args:
            past (`list[Tensor]`): As in the attributes; may have room behind the past.
            past_length (`int`): Tokens in the past. It is not read from the shape of `past`, so that a file takes a cache
                with room for what is to come, into which the operator writes without a copy.
        """
        self.past, self.present = past, {}
        cache = DynamicCache([(past[i], past[i + 1]) for i in range(0, len(past), 2)])
        # on these objects, which are gone after the pass: the operator appends to the past itself
        cache.update = lambda keys, values, *args, **kwargs: (keys, values)  # type: ignore[method-assign]
        for layer in cache.layers:
            cast(Any, layer).get_seq_length = lambda: past_length
        return cache

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention interface: `[batch, heads, length, size]` in, `[batch, length, heads, size]` out."""
        # what is raised here is caught by fused_obstacle, and is its answer
        given = [name for name in _UNKNOWN if kwargs.get(name) is not None]
        if given or attention_mask is None or query.shape[-1] != value.shape[-1]:
            raise NotImplementedError(f"attention with {given or 'no mask, or values of another size than the keys'}")
        index = int(module.layer_idx)  # type: ignore[arg-type]  # a number in every attention module, unknown to nn.Module
        if index in self.present:
            raise NotImplementedError("a cache entry that is used twice")
        past = self.past[2 * index], self.past[2 * index + 1]
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        compute = self._operator if self.symbolic else _attention
        output, *present = compute(query, key, value, *past, attention_mask, scale, float(softcap or 0.0))
        self.present[index] = (present[0], present[1])
        return output, None

    @staticmethod
    def _operator(query, key, value, past_key, past_value, bias, scale, softcap):
        batch, heads, length, size = query.shape
        groups = key.shape[1]
        flat = [states.transpose(1, 2).reshape(batch, length, -1) for states in (query, key, value)]
        # of all rows the same: which columns are padding is in the bias
        columns = torch.ones(batch + 1, dtype=torch.int32) * bias.shape[3]
        last, whole = (columns[:batch] - 1).to(torch.int32), columns[batch:].to(torch.int32)
        shapes = ([batch, length, heads * size], *[[batch, groups, bias.shape[3], size]] * 2)
        output, keys, values = torch.onnx.ops.symbolic_multi_out(
            f"{_CONTRIB}::GroupQueryAttention",
            (*flat, past_key, past_value, last, whole, None, None, None, bias),
            attrs={"num_heads": heads, "kv_num_heads": groups, "scale": scale, "softcap": softcap},
            dtypes=(_FLOAT,) * 3,
            shapes=shapes,
            version=1,
        )
        return output.reshape(batch, length, heads, size), keys, values


def _attention(query, key, value, past_key, past_value, bias, scale, softcap):
    """What `GroupQueryAttention` computes, in PyTorch."""
    keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    groups = query.shape[1] // key.shape[1]
    scores = query @ keys.repeat_interleave(groups, 1).transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    output = (scores + bias).softmax(-1) @ values.repeat_interleave(groups, 1)
    return output.transpose(1, 2).contiguous(), keys, values


def fused_obstacle(model: PreTrainedModel) -> str | None:
    """Why a model's attention cannot be written as `GroupQueryAttention`, or `None`.

    A pass of four tokens, two of them cached, with padding, is compared with the model's own.

    Args:
        model ([`~transformers.PreTrainedModel`]): From [`~exporters.float32_copy.float32_copy`].
    """
    ids = torch.arange(3, 11).view(2, 4) % len(cast(Tensor, model.get_input_embeddings().weight))
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    attention = FusedAttention(symbolic=False)
    try:
        with torch.no_grad():
            options = {"position_ids": positions} if takes_position_ids(model) else {}
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits[:, 2:]
            first = {name: value[:, :2] for name, value in options.items()}
            cache = cache_of(model(input_ids=ids[:, :2], attention_mask=mask[:, :2], use_cache=True, **first))
            past = [cast(Tensor, s) for layer in key_value_layers(cache) for s in (layer.keys, layer.values)]
            rest = {name: value[:, 2:] for name, value in options.items()}
            with attention_by(model, attention):
                found = model(
                    input_ids=ids[:, 2:],
                    attention_mask=mask,
                    use_cache=True,
                    **{cache_keyword(model): attention.begin(past, 2)},
                    **rest,
                ).logits
    except Exception as error:  # whatever a model does when its cache or attention is another
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if not past or len(attention.present) != len(past) // 2:
        return "its attention does not go through transformers' attention interface"
    difference = (found - expected).abs().max() / expected.abs().max()
    return None if difference < 1e-4 else f"it gives other logits (relative difference {difference:.1e})"


@contextmanager
def attention_by(model: PreTrainedModel, attention: FusedAttention) -> Iterator[None]:
    """Let `model` call `attention`, with a mask of numbers to be added, until the block ends."""
    configs: Any = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, getattr(config, "_attn_implementation", None)) for config in configs]
    # not register(), which cannot be undone; and masks are looked for in the shared table alone
    with (
        mock.patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, {_NAME: attention}),
        mock.patch.dict(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, {_NAME: _additive_mask}),
    ):
        try:
            for config, _ in before:
                config._attn_implementation = _NAME
            yield
        finally:
            for config, implementation in before:
                config._attn_implementation = implementation


def _additive_mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """transformers' mask of numbers; it looks padding up cell by cell, which is a dozen nodes in a graph, and here one is."""
    mask = eager_mask(attention_mask=None, **kwargs)
    if attention_mask is None:
        return mask
    return torch.where(attention_mask[:, None, None, :].bool(), mask, torch.finfo(mask.dtype).min)


@contextmanager
def fused(model: PreTrainedModel, attention: FusedAttention) -> Iterator[None]:
    """Trace `model` with fused operators until the block ends.

    Args:
        model ([`~transformers.PreTrainedModel`]): A float32 copy without [`fused_obstacle`].
        attention ([`FusedAttention`]): The symbolic one.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if (forward := _norm_operator(module)) is not None:
                stack.enter_context(mock.patch.object(module, "forward", forward))
        for namespace in {sys.modules[type(m).__module__] for m in model.modules()}:
            if _rotates_halves(namespace):
                stack.enter_context(mock.patch.object(namespace, _ROTARY, _rotary_operator))
        stack.enter_context(attention_by(model, attention))
        yield


def _norm_operator(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A forward with the fused operator, if `module` is a root-mean-square norm over the last axis."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(epsilon, float):
        return None
    if len(list(module.parameters())) > 1 or list(module.children()) or weight.is_meta:
        return None
    sample = torch.linspace(-2, 3, 2 * len(weight)).view(1, 2, -1) + torch.linspace(0, 1, len(weight))
    try:
        with torch.no_grad():
            found = module(sample)
    except Exception:  # it takes something else
        return None
    for offset in (0.0, 1.0):  # Gemma's weights are deviations from 1
        expected = nn.functional.rms_norm(sample, (len(weight),), weight.detach() + offset, epsilon)
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
            return lambda states: _symbolic_norm(states, weight + offset if offset else weight, epsilon)
    return None


def _symbolic_norm(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.onnx.ops.symbolic(
        "SimplifiedLayerNormalization",
        (states, weight),
        attrs={"axis": -1, "epsilon": epsilon, "stash_type": 1},
        dtype=_FLOAT,
        shape=list(states.shape),
        version=1,
    )


def _rotates_halves(namespace: ModuleType) -> bool:
    """Whether a module of transformers has the usual function that rotates queries and keys, first half with second."""
    function = getattr(namespace, _ROTARY, None)
    if function is None:
        return False
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 3, 8, generator=generator) for heads in (4, 2))
    angles = torch.rand(2, 3, 4, generator=generator) * math.pi
    cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))

    def rotated(states: Tensor) -> Tensor:
        swapped = torch.cat([-states[..., 4:], states[..., :4]], -1)
        return states * cos.unsqueeze(1) + swapped * sin.unsqueeze(1)

    try:
        found = function(query, key, cos, sin)
        return all(torch.allclose(a, rotated(b), atol=1e-6) for a, b in zip(found, (query, key), strict=True))
    except Exception:  # it takes something else
        return False


def _rotary_operator(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any):
    """The angles come token by token, as the model computes them: whatever its kind of rope, and no table in the file."""
    half = cos.shape[-1] // 2
    return tuple(_rotate(states, cos[..., :half], sin[..., :half]) for states in (query, key))


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, heads, length, size = states.shape
    rows, half = cos.shape[0] * length, cos.shape[-1]
    numbers = torch.arange(rows).reshape(cos.shape[0], length).expand(batch, length)
    flat = states.transpose(1, 2).reshape(batch, length, heads * size)
    output = torch.onnx.ops.symbolic(
        f"{_CONTRIB}::RotaryEmbedding",
        (flat, numbers, cos.reshape(rows, half), sin.reshape(rows, half)),
        # 0: the whole head is rotated
        attrs={"num_heads": heads, "rotary_embedding_dim": 0 if 2 * half == size else 2 * half},
        dtype=_FLOAT,
        shape=list(flat.shape),
        version=1,
    )
    return output.reshape(batch, length, heads, size).transpose(1, 2)


def fuse_graph(graph: ir.Model) -> None:
    """Remove what the operators were wrapped in, and let each residual sum be a part of the norm behind it, in place."""
    _cancel_round_trips(graph)
    _fuse_skips(graph)


def _is_swap(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Transpose" and list(node.attributes.get_ints("perm", ())) == _SWAP


def _cancel_round_trips(graph: ir.Model) -> None:
    """Heads are taken apart for the model's code, and put together again for the operator, and the reverse behind it."""
    for node in list(graph.graph):
        second = _producer(node) if node.op_type == "Reshape" else None
        if second is not None and second.op_type == "Reshape":
            source = second.inputs[0]
            if source is not None and _width(source) is not None and _width(source) == _width(node.outputs[0]):
                node.outputs[0].replace_all_uses_with(source)
            continue
        first = _producer(second) if _is_swap(second) else None
        if first is None or not _is_swap(first):
            continue
        inner = first.inputs[0]
        assert inner is not None
        apart = inner.producer()
        source = apart.inputs[0] if apart is not None and apart.op_type == "Reshape" else None
        if source is not None and _width(source) is not None and _width(source) == _width(node.outputs[0]):
            node.outputs[0].replace_all_uses_with(source)
        else:
            node.replace_input_with(0, inner)


def _fuse_skips(graph: ir.Model) -> None:
    for node in list(graph.graph):
        add = _producer(node) if node.op_type == "SimplifiedLayerNormalization" else None
        if add is None or add.op_type != "Add" or None in (_width(v) for v in add.inputs):
            continue
        if _width(add.inputs[0]) != _width(add.inputs[1]):
            continue
        new = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, node.inputs[1]],
            {"epsilon": node.attributes.get_float("epsilon")},
            domain=_CONTRIB,
            num_outputs=4,
            name=f"{node.name}_skip",
        )
        for value, old in ((new.outputs[0], node.outputs[0]), (new.outputs[3], add.outputs[0])):
            value.shape, value.type, value.name = old.shape, old.type, old.name
        new.outputs[1].name = new.outputs[2].name = ""
        graph.graph.insert_after(add, new)
        for value, old in ((new.outputs[0], node.outputs[0]), (new.outputs[3], add.outputs[0])):
            old.replace_all_uses_with(value, replace_graph_outputs=True)
        graph.graph.remove([node, add], safe=True)


def _producer(node: ir.Node | None) -> ir.Node | None:
    value = node.inputs[0] if node is not None and node.inputs else None
    return None if value is None else value.producer()


def _width(value: ir.Value | None) -> int | None:
    """The last axis of a tensor of three axes, if it is known."""
    if value is None or value.shape is None or len(value.shape) != 3:
        return None
    return value.shape[2] if isinstance(value.shape[2], int) else None
