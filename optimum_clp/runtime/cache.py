"""The key-value cache of an exported file: names and shapes in the graph, and layers with room for more tokens."""

import re

import onnxruntime
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..errors import ModelError
from .names import CACHE_KINDS

PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


def shared_tensor(value: onnxruntime.OrtValue) -> Tensor:
    # before ONNX Runtime 1.25 an output can only be copied
    return torch.from_dlpack(value) if hasattr(value, "__dlpack__") else torch.from_numpy(value.numpy())


class LayerWithRoom(DynamicLayer):
    """Keys and values that begin a larger piece of memory, which ONNX Runtime writes the next ones into.

    Args:
        key_memory, value_memory (`Tensor` of shape `[batch, heads, room, size]`, float32 or float16): `keys` and `values` are views of
            them, as long as nobody replaces them.
    """

    def __init__(self, key_memory: Tensor, value_memory: Tensor):
        super().__init__()
        self.key_memory, self.value_memory = key_memory, value_memory
        self.written = [0]
        self.dtype, self.device = key_memory.dtype, key_memory.device
        self.is_initialized = True

    def show(self, length: int) -> None:
        """Let `keys` and `values` be the first `length` tokens, which have been written."""
        self.written[0] = length
        self.keys, self.values = self.key_memory[:, :, :length], self.value_memory[:, :, :length]

    def has_room(self, past_length: int, length: int) -> bool:
        """Whether `length` tokens can be written behind the past without harm to anyone who looks at this memory."""
        views = ((self.keys, self.key_memory), (self.values, self.value_memory))
        return (
            # a cache that was cut shorter, or a shallow copy whose other copy went on
            self.written[0] == past_length
            and past_length + length <= self.key_memory.shape[2]
            # reordered by a beam search, or selected from
            and all(a is not None and a.data_ptr() == b.data_ptr() and a.shape[0] == b.shape[0] for a, b in views)
        )


# a subclass of another kind, such as a sliding window, holds a part of the past
LAYER_TYPES = (DynamicLayer, LayerWithRoom)


# tokens that a cache gets room for besides those it holds
LEAST_ROOM = 256


def cache_layer(keys: Tensor, values: Tensor) -> DynamicLayer:
    # update() would copy both tensors
    layer = DynamicLayer()
    layer.keys, layer.values = keys, values
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.is_initialized = True
    return layer


def past_shapes(session: onnxruntime.InferenceSession) -> dict[str, tuple[int, int]]:
    """Heads and head size of each cache input, in the order of the layers, keys before values."""
    inputs = {value.name: value for value in session.get_inputs()}
    matches = [match for name in inputs if (match := PAST.fullmatch(name))]
    past = [match[0] for match in sorted(matches, key=lambda match: (int(match[1]), match[2]))]
    missing = sorted({*REQUIRED_INPUTS, "past_key_values.0.key"} - set(inputs))
    unknown = sorted(set(inputs) - {*TOKEN_INPUTS, *past})
    wanted = {"logits", *(name.replace("past_key_values", "present") for name in past)}
    missing += sorted(wanted - {value.name for value in session.get_outputs()})
    if missing or unknown or len({inputs[name].type for name in past}) != 1 or inputs[past[0]].type not in CACHE_KINDS:
        raise ModelError.of(
            "inputs",
            sorted(inputs),
            "the file is not a causal LM with a cache of float32 or float16 as this package exports it"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; unknown: {', '.join(unknown)}" if unknown else ""),
            "Give a file that CLPPruner.export wrote",
        )
    return {name: (inputs[name].shape[1], inputs[name].shape[3]) for name in past}


def cache_dtype(session: onnxruntime.InferenceSession) -> torch.dtype:
    """What a file, checked by [`past_shapes`], takes and gives keys and values in: float32 or float16."""
    kind = next(value.type for value in session.get_inputs() if PAST.fullmatch(value.name))
    return getattr(torch, CACHE_KINDS[kind])


TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")


# models with ALiBi have no position_ids, and their files, like Optimum's, no such input
REQUIRED_INPUTS = ("input_ids", "attention_mask")
