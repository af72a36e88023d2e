"""The tuning that a recipe asks for: which layers next to the cut, on which rows."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from ..architecture.lookup import num_layers
from ..calibration.rows import CalibrationData
from ..configuration.clp_config import CLPConfig
from ..forward.layer_major import Residence
from ..segments import LayerSegment, endpoint_layers, kept_layers
from .endpoints import tune_layers
from .result import TuningResult


def tune_by_recipe(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    segments: Sequence[LayerSegment],
    data: CalibrationData,
    recipe: CLPConfig,
    *,
    folder: Path | None = None,
    residence: Residence | None = None,
    quiet: bool = False,
) -> TuningResult:
    """Train the layers next to a cut towards the dense model.

    Args:
        model (`PreTrainedModel`): The cut model; its endpoint layers are trained.
        dense (`PreTrainedModel`): The dense model; not changed.
        segments (`Sequence[LayerSegment]`): What was cut, in the dense model's numbering.
        data ([`CalibrationData`]): Rows to train on, and rows that choose the weights.
        recipe ([`CLPConfig`]): Its seed and `tuning`.
        folder, residence, quiet: As in [`tune_layers`].

    Raises:
        TuningError: If the loss is not finite; the last good weights are in `model`.
    """
    depth = num_layers(dense.config)
    return tune_layers(
        model,
        dense,
        endpoint_layers(segments, depth, recipe.tuning.endpoint_width),
        data.train,
        data.validation,
        recipe.tuning,
        kept=kept_layers(segments, depth),
        validation_kinds=data.validation_kinds,
        masks=(data.train_mask, data.validation_mask),
        seed=recipe.seed,
        folder=folder,
        residence=residence,
        quiet=quiet,
    )
