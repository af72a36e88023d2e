"""Kinds of layers that alternate, and whether they still do by the model type's own rule after a cut.

A config stores a list of kinds (`layer_types` and its like), which a cut rewrites and transformers reads. Other runtimes
compute it anew from a layer's number: every sixth layer of a Gemma 3 without a window, every second one of a gpt-oss. What
they make of a cut model is wrong without a word, unless what is left follows that rule too.
"""

import math
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from .fields import PerLayer
from .lookup import find_architecture, num_layers, text_config
from .table import COMMON_FIELDS


def follows_type_rule(config: PretrainedConfig, kept: Sequence[int]) -> bool:
    """Whether layer `j` of what is left is of the kind that layer `j` of the dense model is of, for all `j`.

    Only kinds that alternate count: what a list says of the first layers alone has a number of its own in the config.

    Args:
        config (`PretrainedConfig`): Of the dense model.
        kept (`Sequence[int]`): Layers that are left, in the dense model's numbering, ascending.
    """
    return all([kinds[i] for i in kept] == kinds[: len(kept)] for kinds in _alternating(config))


def layer_period(config: PretrainedConfig) -> int | None:
    """After how many layers the kinds that alternate come again; `None` where none do.

    A cut of that many layers, or of a multiple, leaves the kinds as [`follows_type_rule`] asks, wherever it is.

    Args:
        config (`PretrainedConfig`): Of the dense model.
    """
    periods = [_period(kinds) for kinds in _alternating(config)]
    return math.lcm(*filter(None, periods)) if periods else None


def _alternating(config: PretrainedConfig) -> list[list[Any]]:
    """The lists of a config, one entry for each layer, whose entries come again after some layers."""
    inner, count = text_config(config), num_layers(config)
    rules = (*COMMON_FIELDS, *find_architecture(config).fields)
    lists = [rule.describe(inner, count) for rule in rules if isinstance(rule, PerLayer)]
    return [kinds for kinds in lists if kinds is not None and _period(kinds) is not None]


def _period(kinds: Sequence[Any]) -> int | None:
    """The least period of a list of more than one kind that is in it twice at least."""
    if all(kind == kinds[0] for kind in kinds):
        return None
    periods = range(2, len(kinds) // 2 + 1)
    return next((p for p in periods if all(kind == kinds[i % p] for i, kind in enumerate(kinds))), None)
