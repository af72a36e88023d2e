"""The key-value cache of an exported file: names and shapes in the graph, and layers with room for more tokens."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..errors import ModelError
from .names import CACHE_KINDS

NUMPY = {torch.long: np.int64, torch.float32: np.float32, torch.float16: np.float16}
"""What ONNX Runtime calls the types of tensors that it is given."""
PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


def shared_tensor(value: onnxruntime.OrtValue) -> Tensor:
    # before ONNX Runtime 1.25 an output can only be copied
    return torch.from_dlpack(value) if hasattr(value, "__dlpack__") else torch.from_numpy(value.numpy())


class Room:
    """Memory for all keys and values of a cache, with room for more tokens behind them, which ONNX Runtime writes into.

    What binds a session to it is made once, and not for each token.

    Args:
        past (`Mapping[str, Tensor]`): For each cache input, keys before values, layer by layer: `[batch, heads, room, size]`, float32 or
            float16.
        present (`Sequence[str]`): The cache outputs, in the same order.

    Attributes:
        written (`int`): Tokens that have been written.
        is_shared (`bool`): Somebody may look at memory behind the tokens of a layer: a copy of it went on, or its states were handed out.
    """

    def __init__(self, past: Mapping[str, Tensor], present: Sequence[str]):
        self.past, self.present = dict(past), tuple(present)
        self.batch, _, self.size, _ = next(iter(self.past.values())).shape
        self.written, self.is_shared = 0, False
        self._bound: tuple[onnxruntime.InferenceSession, onnxruntime.IOBinding] | None = None
        # what one token of one row is told by, bound as long as nothing else is
        self._told = {name: np.ones((1, 1), dtype=np.int64) for name in ("input_ids", "position_ids")}
        self._ones = np.ones(self.size, dtype=np.int64)
        self._last = np.array(1, dtype=np.int64)
        self._all_ones = 0
        self._tells_one = False

    def binding(self, session: onnxruntime.InferenceSession) -> onnxruntime.IOBinding:
        """The session's binding in which this memory is the cache, before and after."""
        if self._bound is None or self._bound[0] is not session:
            binding = session.io_binding()
            for (name, tensor), output in zip(self.past.items(), self.present, strict=True):
                place = "cpu", 0, NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()
                binding.bind_input(name, *place)
                binding.bind_output(output, *place)
            self._bound = session, binding
            self._all_ones = self._ones.ctypes.data
        self._tells_one = False
        return self._bound[1]

    def step(
        self,
        session: onnxruntime.InferenceSession,
        inputs: Collection[str],
        token: int,
        position: int,
        mask: Tensor | None,
        width: int,
    ) -> Tensor:
        """Run one token of one row behind those that have been written. Nothing but mask and logits is bound anew.

        Args:
            session (`onnxruntime.InferenceSession`): Of the file.
            inputs (`Collection[str]`): Its inputs of one number each: `"input_ids"`, and what else it has of `"position_ids"` and
                `"num_logits_to_keep"`.
            token, position (`int`): The token, and where it stands.
            mask (`Tensor` of shape `[1, written + 1]`, int64, *optional*): Contiguous; all 1 if not given.
            width (`int`): Of the vocabulary.

        Returns:
            `Tensor`: Logits `[1, 1, width]`, float32, in memory of their own.
        """
        is_told = self._tells_one and self._bound is not None and self._bound[0] is session
        binding = self._bound[1] if is_told and self._bound is not None else self.binding(session)
        if not is_told:
            for name in inputs:
                told = self._told.get(name, self._last)
                binding.bind_input(name, "cpu", 0, np.int64, told.shape, told.ctypes.data)
            self._tells_one = True
        self._told["input_ids"][0, 0], self._told["position_ids"][0, 0] = token, position
        place = self._all_ones if mask is None else mask.data_ptr()
        binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, self.written + 1), place)
        logits = torch.empty(1, 1, width, dtype=torch.float32, device="cpu")
        binding.bind_output("logits", "cpu", 0, np.float32, (1, 1, width), logits.data_ptr())
        session.run_with_iobinding(binding)
        self.written += 1
        return logits

    def layers(self) -> list["LayerWithRoom"]:
        """The layers of a cache that lies here, with no token yet."""
        states = list(self.past.values())
        return [LayerWithRoom(self, *states[i : i + 2]) for i in range(0, len(states), 2)]

    def __getstate__(self) -> dict[str, Any]:
        # a copy has memory of its own
        return {**self.__dict__, "_bound": None, "_tells_one": False}


class LayerWithRoom(DynamicLayer):
    """Keys and values that begin a larger piece of memory, which ONNX Runtime writes the next ones into.

    `keys` and `values` are views of it as long as nobody replaces them, made when somebody asks for them.

    Args:
        room ([`Room`]): Shared by all layers of a cache.
        key_memory, value_memory (`Tensor` of shape `[batch, heads, room, size]`, float32 or float16): This layer's part of it.
    """

    def __init__(self, room: Room, key_memory: Tensor, value_memory: Tensor):
        self.room, self.memory, self.length = room, {"keys": key_memory, "values": value_memory}, 0
        self.replaced: dict[str, Tensor] = {}
        super().__init__()
        self.dtype, self.device = key_memory.dtype, key_memory.device
        self.is_initialized = True

    @property
    def keys(self) -> Any:  # type: ignore[override]  # plain attributes in transformers
        return self._states("keys")

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self._replace("keys", states)

    @property
    def values(self) -> Any:  # type: ignore[override]
        return self._states("values")

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self._replace("values", states)

    def get_seq_length(self) -> int:
        if self.replaced:
            return super().get_seq_length()
        return self.length if self.is_initialized else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens. Their memory is written again if nobody can look at it."""
        if self.replaced or self.room.is_shared or not -self.length < tokens_to_remove < 0:
            super().crop(tokens_to_remove)
        else:
            self.length += tokens_to_remove

    def begins(self, past_length: int) -> bool:
        """Whether its states are the first `past_length` tokens of its memory."""
        return self.length == past_length and not self.replaced and self.is_initialized

    def _states(self, name: str) -> Tensor | None:
        if name in self.replaced:
            return self.replaced[name]
        if not self.__dict__.get("is_initialized"):
            return None
        self.room.is_shared = True
        return self.memory[name][:, :, : self.length]

    def _replace(self, name: str, states: Tensor | None) -> None:
        if states is None:
            self.replaced.pop(name, None)
        else:
            self.replaced[name] = states

    def __copy__(self) -> "LayerWithRoom":
        self.room.is_shared = True
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, replaced=dict(self.replaced))
        return other


def have_room(layers: Sequence[Any], past_length: int, length: int) -> bool:
    """Whether `length` tokens can be written behind the past of a cache, without harm to anyone who looks at its memory.

    Args:
        layers (`Sequence`): Of the cache.
        past_length (`int`): Tokens in it.
        length (`int`): Tokens to come.
    """
    room = layers[0].room if layers and isinstance(layers[0], LayerWithRoom) else None
    if room is None or past_length + length > room.size or len(layers) != len(room.past) // 2:
        return False
    # a cache that was cut shorter, or a shallow copy whose other copy went on
    if room.written != past_length and room.is_shared:
        return False
    # reordered by a beam search, or selected from
    return all(
        isinstance(layer, LayerWithRoom) and layer.room is room and layer.begins(past_length) for layer in layers
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
