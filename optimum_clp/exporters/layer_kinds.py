"""Which layers of a model a trace has to see: of each kind the first, the second and the last one.

A trace takes a second and 6 MB for each layer, and most layers of a model are one another's equals but for their weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architecture.lookup import cut_config, cut_obstacle, decoder_layers, decoder_path, describe_layers
from ..errors import CLPError
from ..surgery.assembly import assembled

# what every module has, and what says nothing about what it computes
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_SIMPLE = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class ShortModel:
    """A model of some layers of another one, over its tensors.

    Args:
        model (`PreTrainedModel`): With the layers `traced` alone.
        traced (`tuple[int, ...]`): Their indices in the whole model, ascending.
        kinds (`tuple[int, ...]`): Of each layer of the whole model: layers of one kind differ in their weights alone.
        path (`str`): Of the list of layers, in both models.
    """

    model: PreTrainedModel
    traced: tuple[int, ...]
    kinds: tuple[int, ...]
    path: str


def short_model(model: PreTrainedModel) -> ShortModel | None:
    """The model of the layers that a trace has to see, or `None` if that is all of them, or if no config describes it.

    Args:
        model (`PreTrainedModel`): Not changed; the short model shares its tensors.
    """
    try:
        path, kinds = decoder_path(model), layer_kinds(model)
        traced = _first_second_and_last(kinds)
        if len(traced) == len(kinds):
            return None
        short = assembled(model, cut_config(model.config, traced), traced)
    except CLPError:
        return None
    return ShortModel(short, traced, kinds, path)


def traced_layers(model: PreTrainedModel) -> int:
    """How many layers a trace has to see, if those of a kind turn out to be the same nodes.

    Args:
        model (`PreTrainedModel`): May be on the meta device.
    """
    kinds = layer_kinds(model)
    traced = _first_second_and_last(kinds)
    return len(kinds) if cut_obstacle(model.config, traced) else len(traced)


def layer_kinds(model: PreTrainedModel) -> tuple[int, ...]:
    """A number for each decoder layer; two layers have the same if nothing but their weights tells them apart.

    What is looked at is the classes of their modules, what these have in their attributes, the shapes of their tensors, and what the config
    says about single layers. The number of the layer itself, which attention keeps to find its cache, does not count.
    """
    layers = [_described(layer) for layer in decoder_layers(model)]
    indices = {key for key in layers[0] if all(found.get(key) == repr(i) for i, found in enumerate(layers))}
    for names, values in describe_layers(model.config).items():
        for found, value in zip(layers, values, strict=True):
            found["config", names] = repr(value)
    told = [frozenset((key, value) for key, value in found.items() if key not in indices) for found in layers]
    return tuple(map(told.index, told))


def _first_second_and_last(kinds: tuple[int, ...]) -> tuple[int, ...]:
    """The first defines what the others share, the second is repeated, and the last shows that they are alike."""
    members = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in kinds}
    return tuple(sorted({i for found in members.values() for i in (*found[:2], found[-1])}))


def _described(layer: nn.Module) -> dict[tuple[str, ...], str]:
    found: dict[tuple[str, ...], str] = {}
    for name, module in layer.named_modules():
        found[name, "class"] = repr(type(module))
        for tensor_name, tensor in (*module._parameters.items(), *module._buffers.items()):
            found[name, tensor_name] = "None" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
        for attribute, value in vars(module).items():
            if attribute not in _OF_EVERY_MODULE:
                found[name, attribute] = _told(value)
    return found


def _told(value: Any) -> str:
    if isinstance(value, _SIMPLE):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_told, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_told(part)}' for key, part in value.items())}}}"
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(type(value))
