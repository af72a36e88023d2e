"""What keeps a model from becoming an ONNX file, found before any work: from its structure and one short forward pass."""

import inspect
from contextlib import ExitStack
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..architecture.lookup import text_config
from ..errors import Problem
from ..forward.decoding import cache_argument, cache_of
from ..forward.hooks import evaluation_mode, hooked
from .experts import experts_modules

# The rotary frequencies of these types depend on the length of the text, which a traced graph would freeze.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
# Operators whose result Python code looks at, or whose shape depends on the data.
_DATA_DEPENDENT = (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default)
_MAJOR = int(transformers.__version__.partition(".")[0])
_PYTORCH = "Use the PyTorch checkpoint or its quanto files, and set export.enabled to False"


def onnx_obstacle(model: PreTrainedModel) -> Problem | None:
    """Why a model cannot be exported to ONNX, or `None`.

    It costs one forward pass of two tokens. `None` is no promise: [`~exporters.export.export_onnx`] checks the files that it
    makes.

    Args:
        model ([`~transformers.PreTrainedModel`]): Any dtype, device and mode; left as it is.

    Returns:
        `Problem` or `None`: The first obstacle found.
    """
    rope = _length_dependent_rope(model)
    if rope is not None:
        return rope
    if cache_argument(model) is None:
        return _no_cache(model)
    ids = torch.tensor([[3, 2]], device=next(model.get_input_embeddings().parameters()).device)
    try:
        with evaluation_mode(model), torch.no_grad(), _Watch(model) as watch:
            cache = cache_of(model(input_ids=ids, use_cache=True))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return Problem("model", type(model).__name__, f"it cannot run two tokens with a cache ({reason})", _PYTORCH)
    return _cache_obstacle(model, cache, ids.shape[1]) or watch.obstacle()


def takes_position_ids(model: PreTrainedModel) -> bool:
    """Whether `model.forward` has a parameter `position_ids`; models with ALiBi have none."""
    return "position_ids" in inspect.signature(model.forward).parameters


def key_value_layers(cache: Any) -> list[DynamicLayer]:
    """The layers of a cache of keys and values."""
    # GPTBigCode in transformers 4 has room for cross attention, which a decoder does not use
    return getattr(cache, "self_attention_cache", cache).layers


def _length_dependent_rope(model: PreTrainedModel) -> Problem | None:
    config = text_config(model.config)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # transformers 5 may keep one set of parameters for each type of layer
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = parameters.get("rope_type", parameters.get("type"))
        if kind in _LENGTH_DEPENDENT_ROPE:
            return Problem(
                "rope_type",
                kind,
                "its rotary frequencies change with the length of the text, which an ONNX graph cannot follow",
                "Use a model with rope type default, linear, llama3 or yarn",
            )
    return None


def _no_cache(model: PreTrainedModel) -> Problem:
    rule = (
        "it gives no key-value cache, which is what an ONNX file hands on from token to token; "
        "other states would need inputs and outputs of their own"
    )
    return Problem("model", type(model).__name__, rule, _PYTORCH)


def _cache_obstacle(model: PreTrainedModel, cache: Any, length: int) -> Problem | None:
    name = type(model).__name__
    if cache is None:
        return _no_cache(model)
    plain = getattr(cache, "self_attention_cache", cache)
    layers = getattr(plain, "layers", ())
    if type(plain) is not DynamicCache or not all(_is_key_value_layer(layer) for layer in layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers} | {type(plain).__name__}))
        rule = (
            f"its cache holds more than the keys and values of each token ({kinds}); "
            "other states would need inputs and outputs of their own in the ONNX file"
        )
        return Problem("model", name, rule, _PYTORCH)
    lengths = {tensor.shape[2] for layer in layers for tensor in (layer.keys, layer.values)}
    if lengths != {length}:
        rule = f"its cache does not grow by one entry for each token ({sorted(lengths)} for {length} tokens)"
        return Problem("model", name, rule, _PYTORCH)
    return None


def _is_key_value_layer(layer: Any) -> bool:
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and all(
        isinstance(states, torch.Tensor) and states.ndim == 4 for states in (layer.keys, layer.values)
    )


class _Watch(TorchDispatchMode):
    """Records where the decoder layers look at the data, except in modules that are exported in another form."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.path: list[str] = []
        self.exempt = set(experts_modules(model))
        self.found: list[str] = []
        self.hooks = ExitStack()

    def __enter__(self):
        enter, leave = [], []
        for name, module in self.model.named_modules():
            enter.append((module, lambda *_, name=name: self.path.append(name)))
            leave.append((module, self._leave))
        self.hooks.enter_context(hooked(enter, leave, always_call=True))
        return super().__enter__()

    def __exit__(self, *error):
        self.hooks.close()
        return super().__exit__(*error)

    def _leave(self, *_):
        self.path.pop()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # outside of the layers transformers itself asks whether it is being traced
        in_layer = bool(self.path) and any(part.isdigit() for part in self.path[-1].split("."))
        if function in _DATA_DEPENDENT and in_layer and not self.exempt.intersection(self.path):
            self.found.append(self.path[-1])
        return function(*args, **(kwargs or {}))

    def obstacle(self) -> Problem | None:
        if not self.found:
            return None
        rule = (
            f"its layers compute what depends on the data, such as the experts that were chosen ({self.found[0]}), "
            "which a graph of fixed operators cannot follow"
        )
        remedy = (
            _PYTORCH
            if _MAJOR > 4
            else f"Export it with transformers 5, which has such layers in another form, or: {_PYTORCH}"
        )
        return Problem("model", type(self.model).__name__, rule, remedy)
