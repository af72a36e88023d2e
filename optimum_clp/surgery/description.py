"""What the report says of the dense model, and of what was removed from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from transformers import PreTrainedModel

from ..architecture.layer_pattern import follows_type_rule, layer_period
from ..architecture.lookup import num_layers
from ..report.origin import Origin
from ..report.section import Key
from ..segments import LayerSegment, kept_layers
from .sizes import count_parameters


@dataclass(frozen=True)
class DenseModel:
    """The `base_model` section of the report."""

    name_or_path: Annotated[str | None, Key("Hub id or folder of the dense model, as the user gave it.")]
    revision: str | None
    model_type: str
    num_layers: Annotated[int, Key(minimum=1)]
    num_parameters: Annotated[int, Key(minimum=1)]
    dtype: str
    fingerprint: Annotated[str | None, Key("Hash of every bit of its weights.", sparse=True)] = None
    origin: Annotated[Origin | None, Key("What its own card says.", added=True, sparse=True)] = None


@dataclass(frozen=True)
class CutStep:
    """One of several cuts, one after the other."""

    model: Annotated[str | None, Key("What was cut: Hub id or folder, as the user gave it.")]
    num_layers_before: Annotated[int, Key(minimum=1)]
    segments: Annotated[tuple[LayerSegment, ...], Key("In the numbering of that model.")]


@dataclass(frozen=True)
class Cut:
    """The `cut` section of the report."""

    segments: tuple[LayerSegment, ...]
    removed_layers: Annotated[tuple[Annotated[int, Key(minimum=0)], ...], Key(min_items=1, unique=True)]
    num_layers_before: Annotated[int, Key(minimum=1)]
    num_layers_after: Annotated[int, Key(minimum=1)]
    num_parameters_before: Annotated[int, Key(minimum=1)]
    num_parameters_after: Annotated[int, Key(minimum=1)]
    chain: Annotated[
        tuple[CutStep, ...],
        Key(
            "The cuts, where a model that was cut before has been cut further; `segments` is what they come to.",
            sparse=True,
        ),
    ] = ()
    towards: Annotated[
        str | None,
        Key("Of a further cut: what it was made like, the `first dense model` or the `given model`.", sparse=True),
    ] = None
    type_rule: Annotated[
        str | None,
        Key(
            "Where kinds of layers alternate (with a sliding window and without, ...): whether those that are left come as the model "
            "type's own rule has them. A runtime that computes them from a layer's number, and does not read the config's list, is "
            "wrong where it is `broken` and not `followed`.",
            sparse=True,
        ),
    ] = None
    layer_period: Annotated[
        int | None,
        Key("After how many layers of the dense model their kinds come again, where they do.", minimum=2, sparse=True),
    ] = None
    fingerprint: Annotated[str | None, Key("Hash of every bit of the cut model's weights.", sparse=True)] = None
    seal: Annotated[
        str | None, Key("Hash of `segments` and both fingerprints: what a later stage relies on.", sparse=True)
    ] = None


def describe_dense(model: PreTrainedModel, name: str | None, revision: str | None) -> DenseModel:
    """What the report keeps of a dense model.

    Args:
        model (`PreTrainedModel`): The model.
        name (`str` or `None`): Hub id or folder that it was loaded from.
        revision (`str` or `None`): Branch, tag or commit on the Hub.
    """
    return DenseModel(
        name_or_path=name or None,
        revision=revision,
        model_type=model.config.model_type,
        num_layers=num_layers(model.config),
        num_parameters=count_parameters(model),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def describe_cut(dense: PreTrainedModel, cut: PreTrainedModel, segments: Sequence[LayerSegment]) -> Cut:
    """What the report keeps of a cut.

    Args:
        dense (`PreTrainedModel`): The dense model.
        cut (`PreTrainedModel`): What is left of it.
        segments (`Sequence[LayerSegment]`): What was removed, sorted.
    """
    total = num_layers(dense.config)
    kept, period = kept_layers(segments, total), layer_period(dense.config)
    return Cut(
        segments=tuple(segments),
        removed_layers=tuple(layer for layer in range(total) if layer not in kept),
        num_layers_before=total,
        num_layers_after=len(kept),
        num_parameters_before=count_parameters(dense),
        num_parameters_after=count_parameters(cut),
        type_rule=None if period is None else "followed" if follows_type_rule(dense.config, kept) else "broken",
        layer_period=period,
    )
