"""The search that a recipe asks for: a given number of layers, or as many as a quality budget lets go."""

import logging
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..architecture.lookup import allowed_segments, num_layers
from ..configuration.clp_config import CLPConfig
from ..errors import ConfigurationError
from ..forward.layer_major import Residence
from ..processes import is_first
from ..segments import number_of_layers_to_remove
from .result import SearchResult
from .segment_search import search_segments, search_within_budget

logger = logging.getLogger(__name__)


def layers_to_remove(recipe: CLPConfig, config: PretrainedConfig) -> int | None:
    """How many layers a recipe removes from a model; `None` if its quality budget decides.

    Args:
        recipe ([`CLPConfig`]): With a ratio or a budget.
        config (`PretrainedConfig`): Of the dense model.

    Raises:
        ConfigurationError: If the ratio removes no layer or all of them.
        ModelError: If one segment is asked for, and none of that length can be removed exactly.
    """
    if recipe.perplexity_bound() is not None:
        return None
    ratio = recipe.pruning_ratio
    if not isinstance(ratio, (int, float)):
        rule, remedy = "a search needs a number of layers, and none was chosen for it", "Give a pruning_ratio"
        name = "target_size_mb" if recipe.target_size_mb is not None else "target_tokens_per_second"
        raise ConfigurationError.of(name, getattr(recipe, name), rule, remedy)
    count = number_of_layers_to_remove(ratio, num_layers(config))
    if recipe.num_segments == 1:
        allowed_segments(config, count)
    return count


def search_by_recipe(
    model: PreTrainedModel,
    tokens: Tensor,
    validation_tokens: Tensor,
    recipe: CLPConfig,
    *,
    journal: Path | None = None,
    residence: Residence | None = None,
    quiet: bool = False,
) -> SearchResult:
    """Find the layers that a recipe removes.

    Args:
        model (`PreTrainedModel`): The dense model; not changed.
        tokens (`Tensor`): int64 `[rows, length]`: searched on, the first `recipe.search.num_sequences`.
        validation_tokens (`Tensor`): int64 `[rows, length]`: a quality budget holds on these.
        recipe ([`CLPConfig`]): Its ratio or budget, number of segments, seed and `search`.
        journal, residence, quiet: As in [`search_segments`].

    Raises:
        ConfigurationError, ModelError: As [`layers_to_remove`].
        SearchError: If no cut has a finite score, or if not even one layer fits the quality budget.
    """
    options: dict[str, Any] = {
        "num_segments": recipe.num_segments,
        "seed": recipe.seed,
        "journal": journal,
        "residence": residence,
        "quiet": quiet,
    }
    count, bound = layers_to_remove(recipe, model.config), recipe.perplexity_bound()
    if count is not None:
        found = search_segments(model, tokens, count, recipe.search, **options)
    else:
        assert bound is not None
        found = search_within_budget(model, tokens, validation_tokens, bound, recipe.search, **options)
    if is_first():
        segments = ", ".join(f"{segment.start}:{segment.stop}" for segment in found.segments)
        logger.info(f"search: layers {segments} of {found.num_layers} go; KL to the dense model {found.score:.4f}")
    return found
