"""Where a model keeps its decoder layers, and which fields of its config depend on how many there are.

An architecture is data: one row of `ARCHITECTURES` for each `model_type`.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .errors import ModelError, Problem


@dataclass(frozen=True)
class Architecture:
    """What structure alone does not tell about a `model_type`.

    Args:
        model_type (`str`): As in `config.json`.
        layers (`str`): Dotted path of the `ModuleList` of decoder layers.
        count (`str`): Config field with the number of layers.
        per_layer (`tuple[str, ...]`): Config lists with one entry for each layer.
        counts_below (`tuple[str, ...]`): Config fields that say "the first k layers".
    """

    model_type: str
    layers: str = "model.layers"
    count: str = "num_hidden_layers"
    per_layer: tuple[str, ...] = ("layer_types",)
    counts_below: tuple[str, ...] = ()


ARCHITECTURES = {
    a.model_type: a
    for a in (
        Architecture("llama"),
        Architecture("mistral"),
        Architecture("qwen2", counts_below=("max_window_layers",)),
        Architecture("qwen3", counts_below=("max_window_layers",)),
    )
}


def find_architecture(config: PretrainedConfig) -> Architecture:
    """The row for a model's config.

    Raises:
        ModelError: If the `model_type` is not supported, or the config describes layers one by one in a way that no
            rule here rewrites (transformers' `per_layer_config`).
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in ARCHITECTURES:
        raise ModelError(
            Problem(
                "model_type",
                model_type,
                f"the supported architectures are {', '.join(sorted(ARCHITECTURES))}",
                "Use a model of one of these types; cutting others could corrupt them silently",
            )
        )
    if getattr(config, "is_heterogeneous", False):
        raise ModelError(
            Problem(
                "per_layer_config",
                sorted(config.per_layer_attributes or ()),
                "a config that describes single layers cannot be renumbered exactly",
                "Use a checkpoint whose layers are all alike",
            )
        )
    return ARCHITECTURES[model_type]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder layers, in order."""
    layers = model.get_submodule(find_architecture(model.config).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def num_layers(config: PretrainedConfig) -> int:
    """Number of decoder layers."""
    return getattr(config, find_architecture(config).count)


def cut_config(config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    """The config of the model that keeps only some layers; `config` itself stays as it is.

    Args:
        config (`PretrainedConfig`): Of the dense model.
        kept (`Sequence[int]`): Old indices of the layers that stay, ascending.

    Returns:
        `PretrainedConfig`: A copy with every depth-dependent field rewritten.
    """
    architecture = find_architecture(config)
    before = getattr(config, architecture.count)
    new = copy.deepcopy(config)
    # lists first: transformers 5 checks their lengths against the count when the config is saved
    for name in architecture.per_layer:
        values = getattr(config, name, None)
        if values is not None:
            if len(values) != before:
                raise ModelError(
                    Problem(
                        f"config.{name}",
                        values,
                        f"it must have one entry for each of the {before} layers",
                        "Repair the checkpoint's config.json",
                    )
                )
            setattr(new, name, [values[i] for i in kept])
    for name in architecture.counts_below:
        value = getattr(config, name, None)
        if value is not None:
            setattr(new, name, sum(i < value for i in kept))
    setattr(new, architecture.count, len(kept))
    return new
