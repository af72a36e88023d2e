"""Where a model keeps its decoder layers, which layers may go, and the config of what is left.

Layers are found by structure: the one list of as many modules as the config has layers. What structure cannot tell is
data: the rules of `fields` for config fields, and the rows of `table` and of other packages.
"""

import copy
import tempfile
from collections.abc import Sequence

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..doors import ARCHITECTURES
from ..errors import ConfigurationError, CutError, ModelError
from ..segments import LayerSegment, candidate_segments, kept_layers
from .containers import container_class, fed_layers, text_type
from .fields import DepthField, NotRepresentable, PerLayer, unknown_lists
from .table import BUILT_IN, COMMON_CONDITIONS, COMMON_FIELDS, CONTAINED, REFUSED, Architecture

# where a model has positions for so many tokens and no more, in the order of lm-eval; transformers' attribute_map lets
# GPT-2's n_positions and DBRX's max_seq_len answer to the second name as well
_POSITIONS = ("n_positions", "max_position_embeddings", "n_ctx")
# where models with ALiBi (MPT, BLOOM), which have a position for every token, keep the length that they were trained on
_TRAINED_ON = ("max_seq_len", "seq_length")
# how a model computes; kept in the config object, not in its file
_RUNTIME_SETTINGS = ("_attn_implementation_internal", "_experts_implementation_internal", "_name_or_path")


def find_architecture(config: PretrainedConfig) -> Architecture:
    """The row for a model's config.

    Raises:
        ModelError: If the `model_type` is refused, with the reason, or unknown; or if no cut of this model can be exact.
        ConfigurationError: If another package's entry point for the `model_type` does not give an [`Architecture`].
    """
    model_type = str(getattr(config, "model_type", None))
    if model_type in REFUSED:
        raise ModelError.of("model_type", model_type, *REFUSED[model_type])
    architecture = BUILT_IN.get(model_type) or _added(model_type) or _contained(config)
    if architecture is None:
        raise ModelError.of(
            "model_type",
            model_type,
            "it is not one of the architectures whose cuts are tested; cutting it could corrupt it silently",
            f"Use one of: {', '.join(sorted({*BUILT_IN, *ARCHITECTURES}))}; or add it, see docs/architectures.md",
        )
    inner = text_config(config)
    for condition in architecture.conditions:
        reason = condition.refusal(inner)
        if reason is not None:
            raise ModelError.of("model_type", model_type, *reason)
    return architecture


def _contained(config: PretrainedConfig) -> Architecture | None:
    """The row of the text decoder in a container, whose other parts hand it embeddings and are left alone.

    Raises:
        ModelError: If its text decoder is of a type that cannot be cut.
    """
    kind, whole = text_type(config), container_class(str(config.model_type))
    if kind is None or whole is None:
        return None
    found = BUILT_IN.get(kind) or CONTAINED.get(kind) or _added(kind)
    if found is None:
        rule, remedy = REFUSED.get(
            kind, ("that type is not one whose cuts are tested", "Add it, see docs/architectures.md")
        )
        raise ModelError.of(
            "model_type",
            config.model_type,
            f"{whole} holds a text decoder of type {kind!r}: {rule}",
            f"{remedy}; `model.get_decoder()` takes it out of the loaded model",
        )
    return found


def _added(model_type: str) -> Architecture | None:
    """The row of a type that is not in our table, if somebody has added one; where we have a row, nobody is asked."""
    if model_type not in ARCHITECTURES:
        return None
    row = ARCHITECTURES.get(model_type)
    if not isinstance(row, Architecture):
        raise ConfigurationError.of(
            "architecture",
            model_type,
            f"what {ARCHITECTURES.row(model_type).package or 'was registered'} adds for it is a {type(row).__name__}, "
            "and it must be an Architecture of optimum_clp.architecture.table",
            "Let the entry point name an Architecture",
        )
    return row


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a config that describes the text decoder: the config itself, or one nested in it."""
    return config.get_text_config(decoder=True)


def num_layers(config: PretrainedConfig) -> int:
    """Number of decoder layers."""
    return getattr(text_config(config), find_architecture(config).count)


def context_limit(config: PretrainedConfig) -> int | None:
    """Longest text that a model can take, in tokens; `None` where any length can be given, as with ALiBi."""
    return _first_length(config, _POSITIONS)


def within_context(length: int, config: PretrainedConfig) -> int:
    """`length` tokens, or as many as the model can take if these are fewer."""
    return min(length, context_limit(config) or length)


def declared_context_length(config: PretrainedConfig) -> int | None:
    """Longest text that a model is made for, in tokens; `None` if its config declares none.

    It is the [`context_limit`]; for a model without one, the length that it was trained on, which it can go beyond: a
    runtime that sets memory aside goes by it, and calibration rows are not shortened to it.
    """
    return context_limit(config) or _first_length(config, _TRAINED_ON)


def _first_length(config: PretrainedConfig, names: Sequence[str]) -> int | None:
    found = (getattr(text_config(config), name, None) for name in names)
    return next((int(length) for length in found if length and length > 0), None)


def decoder_path(model: PreTrainedModel) -> str:
    """Dotted path of the list of decoder layers in the model.

    Raises:
        ModelError: If not exactly one list of modules in the text decoder has as many members as the config has layers.
    """
    count = num_layers(model.config)
    inner = text_config(model.config)
    found = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    # a list of experts may be as long as the stack, but it lies inside a layer
    found = [n for n in found if not any(n.startswith(f"{other}.") for other in found)]
    if len(found) > 1:
        owners = {n: getattr(model.get_submodule(n.rpartition(".")[0]), "config", None) for n in found}
        found = [n for n, owner in owners.items() if isinstance(owner, type(inner))]
    if len(found) != 1:
        raise ModelError.of(
            "model",
            type(model).__name__,
            f"its decoder layers were not found: lists of {count} modules are {found or 'nowhere'}",
            "Use a model whose config.json and layers belong together",
        )
    return found[0]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder layers, in order."""
    layers = model.get_submodule(decoder_path(model))
    assert isinstance(layers, nn.ModuleList)
    return layers


def depth_fields(config: PretrainedConfig) -> tuple[DepthField, ...]:
    """The rules for all fields of this config that may say something about single layers."""
    rules = COMMON_FIELDS + find_architecture(config).fields
    known = [name for rule in rules for name in rule.names]
    return rules + tuple(map(PerLayer, unknown_lists(text_config(config), num_layers(config), known)))


def describe_layers(config: PretrainedConfig) -> dict[str, list]:
    """What the config says about each of its layers: for each rule, by its fields' names, a list with an entry for each layer."""
    inner, count = text_config(config), num_layers(config)
    described = {", ".join(field.names): field.describe(inner, count) for field in depth_fields(config)}
    return {names: values for names, values in described.items() if values is not None}


def cut_obstacle(config: PretrainedConfig, kept: Sequence[int]) -> str | None:
    """Why a cut is not exact, or `None` if it is.

    Args:
        config (`PretrainedConfig`): Of the dense model.
        kept (`Sequence[int]`): Old indices of the layers that stay, ascending.
    """
    try:
        _rewritten(config, kept)
    except NotRepresentable as reason:
        return str(reason)
    return None


def allowed_segments(config: PretrainedConfig, length: int) -> list[LayerSegment]:
    """The segments of `length` layers whose removal is exact, by start; for most architectures all of them.

    Raises:
        ModelError: If there is none; names the reason for the first.
    """
    count = num_layers(config)
    reasons: dict[LayerSegment, str | None] = {
        segment: cut_obstacle(config, kept_layers([segment], count)) for segment in candidate_segments(count, length)
    }
    allowed = [segment for segment, reason in reasons.items() if reason is None]
    if allowed:
        return allowed
    raise ModelError.of(
        "num_removed",
        length,
        f"no run of {length} of the model's {count} layers can be removed exactly ({next(iter(reasons.values()))})",
        f"Remove another number of layers: {_lengths_that_work(config, length) or 'none works'}",
    )


def _lengths_that_work(config: PretrainedConfig, length: int) -> str:
    count = num_layers(config)
    works = [
        n
        for n in range(1, count)
        if n != length
        and any(cut_obstacle(config, kept_layers([s], count)) is None for s in candidate_segments(count, n))
    ]
    return ", ".join(map(str, sorted(works, key=lambda n: abs(n - length))[:4]))


def cut_config(config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    """The config of the model that keeps only some layers; `config` itself stays as it is.

    It is written and read once, so that it is what a saved checkpoint's config will be.

    Args:
        config (`PretrainedConfig`): Of the dense model.
        kept (`Sequence[int]`): Old indices of the layers that stay, ascending.

    Returns:
        `PretrainedConfig`: A copy with every depth-dependent field rewritten.

    Raises:
        ModelError: If the architecture is not supported.
        CutError: If no config describes the model that would be left.
    """
    try:
        return _reread(_rewritten(config, kept))
    except NotRepresentable as reason:
        removed = sorted(set(range(num_layers(config))) - set(kept))
        raise CutError.of(
            "removed layers",
            removed,
            f"{reason}; no config describes what would be left",
            "Choose other layers: search() looks only at those that can go, optimum_clp.architecture.lookup."
            "allowed_segments lists them",
        ) from None


def _rewritten(config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    architecture = find_architecture(config)
    old, count = text_config(config), num_layers(config)
    for condition in COMMON_CONDITIONS + architecture.conditions:
        condition.check(old, kept, count)
    fed = fed_layers(config)
    if list(kept[:fed]) != [*range(fed)]:
        raise NotRepresentable(f"the first {fed} layers must stay, because the image is added to what leaves them")
    new = copy.deepcopy(config)
    # only plain weights are cut: it speaks of files that they were made from
    vars(new).pop("quantization_config", None)
    inner = text_config(new)
    # lists first: transformers 5 checks their lengths against the count when the config is saved
    for field in depth_fields(config):
        field.rewrite(old, inner, kept, count)
    setattr(inner, architecture.count, len(kept))
    return new


def _reread(config: PretrainedConfig) -> PretrainedConfig:
    """The config as it comes back from its file, with the settings that are not in the file."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        reread = type(config).from_pretrained(folder)
    for before, after in zip(_with_nested(config), _with_nested(reread), strict=True):
        for name in _RUNTIME_SETTINGS:
            if name in vars(before):
                setattr(after, name, vars(before)[name])
    return reread


def _with_nested(config: PretrainedConfig) -> list[PretrainedConfig]:
    nested = [getattr(config, name, None) for name in sorted(config.sub_configs)]
    return [config, *(c for n in nested if isinstance(n, PretrainedConfig) for c in _with_nested(n))]
