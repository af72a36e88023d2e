"""What `prune` would do to a model, predicted from its config: no weight is read, allocated or written."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..architecture.containers import reader
from ..architecture.layer_pattern import follows_type_rule, layer_period
from ..architecture.lookup import allowed_segments, cut_config, decoder_layers, num_layers, text_config, within_context
from ..argument_types import check_arguments
from ..checkpoint.placement import floating_dtype
from ..configuration.clp_config import CLPConfig
from ..errors import ConfigurationError, ModelError
from ..exporters.result import SpeedChoice
from ..precisions import FLOAT32
from ..report.section import to_section
from ..segments import LayerSegment, endpoint_layers, kept_layers, number_of_layers_to_remove
from ..surgery.assembly import without_weights
from ..surgery.cut import cut_model
from ..surgery.guard import check_cut
from ..surgery.sizes import count_bytes, count_parameters
from ..tuning.activations import layer_activations
from .footprint import TuningMemory, onnx_weight_bytes, tuning_memory
from .size_target import SizeTarget, quantization_within, size_target
from .speed import choose_for_speed, layer_times
from .speed_target import SpeedTarget, aim, with_choice
from .streaming import PlannedStreaming, planned_streaming


@dataclass(frozen=True)
class PlannedCut:
    """One segment that can be removed, and the model that is left.

    Args:
        segment ([`LayerSegment`]): The layers that go.
        num_parameters (`int`): Distinct parameters that are left.
        bytes (`int`): Of these, in the model's dtype: `model.safetensors` without its header.
        onnx (`dict[str, int]`): Bytes of the weights in each ONNX file of the recipe, by kind of weights; empty without
            export.
        tuning ([`TuningMemory`] or `None`): What endpoint tuning holds; `None` where the recipe does without.
        follows_type_rule (`bool`): See [`~optimum_clp.architecture.layer_pattern.follows_type_rule`].
    """

    segment: LayerSegment
    num_parameters: int
    bytes: int
    onnx: dict[str, int]
    tuning: TuningMemory | None
    follows_type_rule: bool


@dataclass(frozen=True)
class PruningPlan:
    """What `prune` would do.

    Args:
        name_or_path (`str` or `None`): Where the config came from.
        model_type (`str`): As in `config.json`.
        model_class (`str`): The class that transformers builds.
        dtype (`str`): Of the weights.
        pruning_ratio (`float`): As in the recipe, or what its size target comes to.
        num_layers (`int`): Decoder layers of the dense model.
        num_removed (`int`): Layers that go.
        num_parameters (`int`): Distinct parameters of the dense model.
        bytes (`int`): Of these.
        layer_parameters (`tuple[int, ...]`): Distinct parameters of each decoder layer.
        layer_bytes (`tuple[int, ...]`): Of these.
        layer_period (`int` or `None`): After how many layers their kinds come again, where they do.
        memory ([`PlannedStreaming`]): What passes over the dense model hold, and how often its weights are read.
        size_target ([`SizeTarget`] or `None`): What is chosen for the recipe's size target, if it has one.
        speed_target ([`SpeedTarget`] or `None`): What is chosen for its speed target, likewise.
        speed_choice ([`SpeedChoice`] or `None`): What was measured for `quantization.tune_for="speed"`.
        cuts (`tuple[PlannedCut, ...]`): Every segment of that length which the config allows, by start. Each was cut on
            the meta device and has passed the guard of [`~optimum_clp.surgery.cut.cut_model`].
    """

    name_or_path: str | None
    model_type: str
    model_class: str
    dtype: str
    pruning_ratio: float
    num_layers: int
    num_removed: int
    num_parameters: int
    bytes: int
    layer_parameters: tuple[int, ...]
    layer_bytes: tuple[int, ...]
    layer_period: int | None
    memory: PlannedStreaming
    size_target: SizeTarget | None
    speed_target: SpeedTarget | None
    speed_choice: SpeedChoice | None
    cuts: tuple[PlannedCut, ...]

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values; `docs/dry_run.md` describes every key."""
        return {
            "base_model": {
                "name_or_path": self.name_or_path,
                "model_type": self.model_type,
                "class": self.model_class,
                "dtype": self.dtype,
                "num_layers": self.num_layers,
                "num_parameters": self.num_parameters,
                "bytes": self.bytes,
                "layer_parameters": list(self.layer_parameters),
                "layer_bytes": list(self.layer_bytes),
                "layer_period": self.layer_period,
            },
            "pruning_ratio": self.pruning_ratio,
            "num_removed": self.num_removed,
            "size_target": None if self.size_target is None else vars(self.size_target),
            "speed_target": None if self.speed_target is None else vars(self.speed_target),
            "speed_choice": None if self.speed_choice is None else to_section(self.speed_choice),
            "memory": self.memory.to_dict(),
            "cuts": [
                {
                    "start": cut.segment.start,
                    "stop": cut.segment.stop,
                    "num_parameters": cut.num_parameters,
                    "bytes": cut.bytes,
                    "follows_type_rule": cut.follows_type_rule,
                    "onnx": dict(cut.onnx),
                    "tuning": None if cut.tuning is None else cut.tuning.to_dict(),
                }
                for cut in self.cuts
            ],
        }


@check_arguments
def plan_pruning(
    config: PretrainedConfig,
    recipe: CLPConfig | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    quiet: bool = True,
) -> PruningPlan:
    """Predict what pruning does to the model that a config describes, without its weights.

    The dense model is built on the meta device, and every allowed segment is cut from it there: the config is rewritten
    and the guard compares every layer, as in the real cut, but for what a model hands to its layers while it runs.
    Segments whose rewritten configs are equal share one built model; the guard looks at each.

    Args:
        config (`PretrainedConfig`): Of the dense model; not changed.
        recipe ([`CLPConfig`], *optional*): Pruning ratio, and what tuning, quantization and export are to do.
        dtype (`torch.dtype` or `str`, *optional*): Of the weights; `None` or `"auto"` takes the config's, or float32 where
            it names none.
        quiet (`bool`): No progress bar while speeds are measured, for a speed target or `quantization.tune_for="speed"`: small models
            of drawn weights are run then, and a model as large as the dense one is held in float32 for a speed target.

    Returns:
        [`PruningPlan`]

    Raises:
        ConfigurationError: If the ratio removes no layer or all or is `"auto"`, no file has the size that is asked for, `dtype` is
            no floating-point type, or the bound on memory is too small.
        ModelError: If the architecture is not supported, no segment of that length can be cut from it, or transformers
            cannot build the model.
        CutError: If a cut model is not the dense model without those layers.
    """
    recipe = recipe or CLPConfig()
    recipe.validate()
    if recipe.perplexity_bound() is not None:
        rule = "how many layers a quality budget lets go is not known before the search has run"
        remedy = "Give a number, such as 0.2, to see what it would leave"
        raise ConfigurationError.of("pruning_ratio", recipe.pruning_ratio, rule, remedy)
    depth, weight_dtype = num_layers(config), _weight_dtype(config, dtype)
    targets = recipe.target_size_mb, recipe.target_tokens_per_second
    choice = times = found = None
    if recipe.quantization.tune_for == "speed" and recipe.export.enabled:
        choice = choose_for_speed(config, recipe, quiet=quiet)
        recipe = with_choice(recipe, choice)
    if targets != (None, None):
        dense = build_on_meta(config, weight_dtype)
        if recipe.target_tokens_per_second is not None:
            times = layer_times(config, recipe, quiet=quiet)
        found = aim(dense, recipe, times)
    ratio = recipe.pruning_ratio if found is None else found.recipe.pruning_ratio
    assert isinstance(ratio, (int, float))
    removed = number_of_layers_to_remove(ratio, depth)
    segments = allowed_segments(config, removed)
    if found is None:  # built when it is known that such a cut can be
        dense = build_on_meta(config, weight_dtype)
    return PruningPlan(
        name_or_path=getattr(config, "name_or_path", None) or None,
        model_type=config.model_type,
        model_class=type(dense).__name__,
        dtype=str(dense.dtype).removeprefix("torch."),
        pruning_ratio=float(ratio),
        num_layers=depth,
        num_removed=removed,
        num_parameters=count_parameters(dense),
        bytes=count_bytes(dense),
        layer_parameters=tuple(count_parameters(layer) for layer in decoder_layers(dense)),
        layer_bytes=tuple(count_bytes(layer) for layer in decoder_layers(dense)),
        layer_period=layer_period(config),
        memory=planned_streaming(dense, recipe, removed),
        size_target=None if found is None else found.size,
        speed_target=None if found is None else found.speed,
        speed_choice=choice,
        cuts=tuple(_plan_cuts(dense, segments, recipe)),
    )


def planned_size(config: PretrainedConfig, recipe: CLPConfig) -> SizeTarget:
    """What is chosen for a recipe's size target, from the config of the model alone; see [`size_target`].

    Args:
        config (`PretrainedConfig`): Of the model that is cut.
        recipe ([`CLPConfig`]): With `target_size_mb`.

    Raises:
        ConfigurationError, ModelError: As there, and as [`build_on_meta`].
    """
    return size_target(build_on_meta(config, torch.float32), recipe)


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model that a config describes, in eval mode, on the meta device.

    Args:
        config (`PretrainedConfig`): Not changed.
        dtype (`torch.dtype`): Of the weights.

    Raises:
        ModelError: If transformers cannot build it.
    """
    try:
        auto = reader(config.model_type, *(config.architectures or ())[:1])
        model = without_weights(lambda: auto.from_config(copy.deepcopy(config), dtype=dtype))
    # whatever a model's class makes of a malformed config, the user gets one message
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError.of(
            "model",
            getattr(config, "name_or_path", None) or config.model_type,
            f"transformers cannot build it from its config without weights ({said})",
            "Check its config.json; a model whose constructor reads values cannot be planned",
        ) from error
    # what a constructor has made in spite of it
    nn.Module.to(model, "meta")
    return model.eval()


def _plan_cuts(dense: PreTrainedModel, segments: Sequence[LayerSegment], recipe: CLPConfig) -> list[PlannedCut]:
    depth, itemsize = num_layers(dense.config), dense.dtype.itemsize
    activations = [
        (layer_activations(layer, itemsize, trained=False), layer_activations(layer, itemsize, trained=True))
        for layer in decoder_layers(dense)
    ]
    built: dict[str, tuple[PreTrainedModel, dict[str, Any]]] = {}  # by rewritten config
    cuts = []
    for segment in segments:
        kept = kept_layers([segment], depth)
        key = json.dumps(cut_config(dense.config, kept).to_dict(), sort_keys=True, default=str)
        if key in built:
            check_cut(built[key][0], dense, kept)
        else:
            cut = cut_model(dense, [segment])
            built[key] = cut, _sizes(cut, recipe)
        tuning = _tuning(dense, kept, segment, activations, recipe) if recipe.tuning.enabled else None
        follows = follows_type_rule(dense.config, kept)
        cuts.append(PlannedCut(segment=segment, tuning=tuning, follows_type_rule=follows, **built[key][1]))
    return cuts


def _sizes(cut: PreTrainedModel, recipe: CLPConfig) -> dict[str, Any]:
    kinds = [FLOAT32.name, *recipe.quantization.weights] if recipe.export.enabled else []
    quantization = quantization_within(cut, recipe)
    return {
        "num_parameters": count_parameters(cut),
        "bytes": count_bytes(cut),
        "onnx": {kind: onnx_weight_bytes(cut, kind, quantization) for kind in kinds},
    }


def _tuning(
    dense: PreTrainedModel,
    kept: Sequence[int],
    segment: LayerSegment,
    activations: Sequence[tuple[int, int]],
    recipe: CLPConfig,
) -> TuningMemory:
    text = recipe.calibration
    return tuning_memory(
        dense,
        kept,
        endpoint_layers([segment], num_layers(dense.config), recipe.tuning.endpoint_width),
        recipe.tuning,
        activations=activations,
        train_rows=text.train_sequences,
        validation_rows=text.validation_sequences,
        sequence_length=within_context(text.sequence_length, dense.config),
    )


def _weight_dtype(config: PretrainedConfig, dtype: torch.dtype | str | None) -> torch.dtype:
    """`dtype`, or what the config names, or float32."""
    chosen: Any = None if dtype == "auto" else dtype
    for source in (config, text_config(config)):
        chosen = getattr(source, "dtype", None) if chosen is None else chosen
    return floating_dtype(torch.float32 if chosen is None else chosen)
