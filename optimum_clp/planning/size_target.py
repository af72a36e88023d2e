"""How many layers must go, and how many bits are left for a weight, so that the int4 file has a given size.

Bits go first, layers after: a file that is too large loses bits down to the plain 4-bit format, and only then layers. On a real model
rounding to 4 bits costs less than any cut that saves as much (`docs/how_to/size_target.md`).
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import reduce
from operator import add

from torch import nn
from transformers import PreTrainedModel

from ..architecture.lookup import allowed_segments, decoder_layers, num_layers, text_config
from ..configuration.clp_config import CLPConfig
from ..configuration.stages import QuantizationConfig
from ..doors import ROUNDINGS
from ..errors import ConfigurationError, ModelError
from .footprint import StoredWeights, stored_weights

MB = 10**6
TOLERANCE = 0.03
"""How far below its target a file may be, where bits can be chosen; it is never above it."""
# of a file's graph at most, once and for each layer; of 7 types of models none took more
_GRAPH_BYTES = {"contrib": (10_000, 2_500), "qdq": (10_600, 10_600), "unpacked": (12_000, 12_600)}
# for each matrix of a layer, each vector (of a norm, a bias), and each expert's matrix, which the file has one by one
_MATRIX_BYTES, _VECTOR_BYTES = 400, 950
_EXPERT_BYTES = {"contrib": 2_000, "qdq": 2_000, "unpacked": 4_000}
# a layer without experts has no more matrices
_MOST_MATRICES = 12


@dataclass(frozen=True)
class SizeTarget:
    """A size that was asked for, and what is chosen for it.

    Args:
        target_size_mb (`float`): As in the recipe.
        num_removed (`int`): Layers that go; none where a speed target beside it decides.
        bits_per_weight (`float` or `None`): For each quantized weight, scales included; `None` where the recipe or its rounding
            method has left nothing to choose.
        bytes (`int`): Of the int4 file, at most (the graph is an estimate); of the largest cut, where they differ.
    """

    target_size_mb: float
    num_removed: int
    bits_per_weight: float | None
    bytes: int


@dataclass(frozen=True)
class FileSize:
    """Bytes of a model's int4 file.

    Args:
        weights ([`StoredWeights`]): Of all its weights.
        graph (`int`): Of all else, at most.
    """

    weights: StoredWeights
    graph: int

    @property
    def fixed(self) -> int:
        """What no choice of bits changes."""
        return self.graph + self.weights.rest

    def bits_within(self, limit: float) -> float:
        """Mean bits for each quantized weight, in a file of at most `limit` bytes; no more than 8 with their scales."""
        return 8 * min(limit - self.fixed, self.weights.most) / max(1, self.weights.weights)


def size_target(dense: PreTrainedModel, recipe: CLPConfig) -> SizeTarget:
    """The fewest layers that must go from a model, so that the rest fits into the recipe's size, and the bits for it.

    Args:
        dense (`PreTrainedModel`): The model that is cut; may be on the meta device.
        recipe ([`CLPConfig`]): With `target_size_mb`.

    Raises:
        ConfigurationError: If no number of layers gives such a file; it names the nearest target that can be reached.
        ModelError: If this architecture cannot be cut.
    """
    assert recipe.target_size_mb is not None
    limit, depth = recipe.target_size_mb * MB, num_layers(dense.config)
    sizes = _Sizes(dense, recipe)
    if depth < 2:
        rule = "a model of one layer has no layer to spare"
        raise ConfigurationError.of("model", depth, rule, "Use a deeper model")
    whole = sizes.least(sizes.whole)
    if recipe.target_tokens_per_second is not None and whole <= limit:
        return SizeTarget(recipe.target_size_mb, 0, None, whole)
    for count in range(1, depth):
        # cheaper to ask than which cuts are allowed
        if sizes.without_largest(count) > limit:
            continue
        size = sizes.without(count)
        if size is None or sizes.least(size) > limit:
            continue
        if limit * (1 - TOLERANCE) > sizes.most(size) if has_choice(recipe) else limit >= sizes.least(sizes.whole):
            break
        bits = size.bits_within(limit) if has_choice(recipe) else None
        weights = sizes.least(size) - size.fixed if bits is None else int(bits * size.weights.weights / 8)
        return SizeTarget(recipe.target_size_mb, count, bits, size.fixed + weights)
    raise _infeasible(sizes, recipe, limit, depth)


def has_choice(recipe: CLPConfig) -> bool:
    """Whether the bits of the int4 file may be chosen: the recipe does not fix them, its rounding method can mix them, and no
    speed is asked for, which more bits would spoil."""
    chosen = recipe.quantization
    if chosen.bits_per_weight is not None or recipe.target_tokens_per_second is not None:
        return False
    return ROUNDINGS.get(chosen.method).budget_obstacle is None


def quantization_within(model: PreTrainedModel, recipe: CLPConfig) -> QuantizationConfig:
    """The recipe's quantization, with the bits that make the int4 file of a cut model as large as the recipe's target.

    Args:
        model (`PreTrainedModel`): The cut model; may be on the meta device.
        recipe ([`CLPConfig`]): Without a target its quantization is given back as it is.

    Raises:
        ConfigurationError: If the model takes more even in plain 4 bits.
    """
    target = recipe.target_size_mb
    if target is None:
        return recipe.quantization
    sizes = _Sizes(model, recipe)
    least = sizes.least(sizes.whole)
    if least > target * MB:
        rule = f"the int4 file of this cut model takes about {_up(least)} MB in plain 4 bits"
        raise ConfigurationError.of("target_size_mb", target, rule, f"Give at least {_up(least)}, or cut more layers")
    if not has_choice(recipe):
        return recipe.quantization
    return dataclasses.replace(recipe.quantization, bits_per_weight=sizes.whole.bits_within(target * MB))


class _Sizes:
    """Sizes of the int4 files of a model, whole and without some of its layers."""

    def __init__(self, model: PreTrainedModel, recipe: CLPConfig):
        self.recipe, self.config = recipe, model.config
        found = stored_weights(model, recipe.quantization)
        routers = _router_weights(model)
        for key in routers & found.keys():  # in 8 bits in every file
            found[key] = dataclasses.replace(found[key], least=found[key].most)
        layers = [{id(p) for p in layer.parameters()} for layer in decoder_layers(model)]
        # what several layers share stays as long as one of them does
        own = [ids - set().union(*layers[:i], *layers[i + 1 :]) for i, ids in enumerate(layers)]
        once, each = _GRAPH_BYTES[recipe.export.format]
        expert = _EXPERT_BYTES[recipe.export.format]
        graphs = [each + _graph_bytes(layer, expert) for layer in decoder_layers(model)]
        self.layers = [
            FileSize(reduce(add, (found[key] for key in ids), StoredWeights()), graph)
            for ids, graph in zip(own, graphs, strict=True)
        ]
        self.whole = FileSize(reduce(add, found.values(), StoredWeights()), once + sum(graphs))

    def least(self, size: FileSize) -> int:
        """Of a file in plain 4 bits, or in the bits that the recipe fixes."""
        bits = self.recipe.quantization.bits_per_weight
        budget = 0 if bits is None else int(bits * size.weights.weights / 8)
        return size.fixed + max(size.weights.least, budget)

    def most(self, size: FileSize) -> int:
        """Of the largest file that the choice of bits allows."""
        return size.fixed + size.weights.most if has_choice(self.recipe) else self.least(size)

    def without(self, count: int) -> FileSize | None:
        """The largest that may be left when so many layers are gone; `None` if so many cannot go."""
        if self.recipe.num_segments > 1:
            return self._rest(sorted(self.layers, key=self.least)[:count])
        try:
            segments = allowed_segments(self.config, count)
        except ModelError:
            return None
        runs = [self._rest(self.layers[segment.start : segment.stop]) for segment in segments]
        return max(runs, key=self.least)

    def without_largest(self, count: int) -> int:
        """Bytes below which no file gets by so many layers, whichever they are."""
        return self.least(self._rest(sorted(self.layers, key=self.least)[-count:]))

    def _rest(self, gone: list[FileSize]) -> FileSize:
        weights = reduce(lambda left, layer: left - layer.weights, gone, self.whole.weights)
        return FileSize(weights, self.whole.graph - sum(layer.graph for layer in gone))


def _infeasible(sizes: _Sizes, recipe: CLPConfig, limit: float, depth: int) -> ConfigurationError:
    """The error for a target that is too small or too large, with the nearest that is not."""
    counts = range(1, depth)
    fewest, most = (
        next((count for count in order if sizes.without(count) is not None), 0) for order in (counts, counts[::-1])
    )
    most_left, least_left = sizes.without(fewest), sizes.without(most)
    if most_left is None or least_left is None:
        allowed_segments(sizes.config, 1)  # says why
    assert most_left is not None and least_left is not None
    if sizes.least(least_left) > limit:
        rule = f"without {most} of {depth} layers, the most that can go, the int4 file takes more in plain 4 bits"
        remedy = f"The smallest that can be reached is {_up(sizes.least(least_left)):g}"
    else:
        largest = sizes.most(most_left) if has_choice(recipe) else sizes.least(sizes.whole) - 1
        rule = (
            f"without {fewest} of {depth} layers, the fewest that can go, the int4 file is smaller whatever its bits"
        )
        remedy = f"The largest that can be reached is {_down(largest):g}"
    return ConfigurationError.of("target_size_mb", recipe.target_size_mb, rule, remedy)


def _up(size: float) -> float:
    return math.ceil(size / MB * 100) / 100


def _down(size: float) -> float:
    return math.floor(size / MB * 100) / 100


def _router_weights(model: PreTrainedModel) -> set[int]:
    """Linear layers that choose experts: they have as many outputs as there are experts."""
    config = text_config(model.config)
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    counts = {getattr(config, name, None) for name in names} - {None}
    return {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features in counts
    }


def _graph_bytes(layer: nn.Module, of_an_expert: int) -> int:
    """Of what a file's graph says of a layer, beside what it says of every one."""
    dims = [(p.dim(), p.shape[0] if p.dim() else 0) for p in layer.parameters()]
    matrices = sum(dim == 2 for dim, _ in dims)
    experts = sum(size for dim, size in dims if dim == 3) + max(0, matrices - _MOST_MATRICES)
    vectors = sum(dim == 1 for dim, _ in dims)
    return min(matrices, _MOST_MATRICES) * _MATRIX_BYTES + vectors * _VECTOR_BYTES + experts * of_an_expert
