"""Config fields that say something about single layers, and what each of them becomes when layers go.

A field is read with `describe`, which spells out what it says about every layer, and written with `rewrite`. The two are
independent of each other, so that the guard can hold the description of the new config against that of the old one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PretrainedConfig


class NotRepresentable(Exception):
    """No value of the field describes the layers that are left; the message says which field, and why."""


class DepthField(Protocol):
    """One rule. `names` are the config fields that it reads and writes."""

    @property
    def names(self) -> tuple[str, ...]:
        """The config fields that it reads and writes."""

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        """What the field says about each of `count` layers; `None` where the config does not have it."""

    def rewrite(self, old: PretrainedConfig, new: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        """Set the field of `new`, whose layer `j` is layer `kept[j]` of the `count` layers that `old` describes."""


def stored(config: PretrainedConfig, name: str) -> Any:
    """A field that is stored in the config; `None` for one that it computes from others, or does not have."""
    name = config.attribute_map.get(name, name)
    return None if isinstance(getattr(type(config), name, None), property) else vars(config).get(name)


@dataclass(frozen=True)
class PerLayer:
    """A list with one entry for each layer."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        values = stored(config, self.name)
        return list(values) if isinstance(values, (list, tuple)) and len(values) else None

    def rewrite(self, old: PretrainedConfig, new: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        values = self.describe(old, count)
        if values is None:
            return
        if len(values) != count:
            raise NotRepresentable(
                f"config.{self.name} has {len(values)} entries, and it must have one for each of the {count} layers"
            )
        setattr(new, self.name, type(stored(old, self.name))(values[i] for i in kept))


@dataclass(frozen=True)
class LayerIndices:
    """A list of the layers that have some property, counted from `base`."""

    name: str
    base: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        values = stored(config, self.name)
        return None if values is None else [i + self.base in values for i in range(count)]

    def rewrite(self, old: PretrainedConfig, new: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        inside = self.describe(old, count)
        if inside is not None:
            setattr(new, self.name, [j + self.base for j, i in enumerate(kept) if inside[i]])


@dataclass(frozen=True)
class FirstLayers:
    """A number `k`: the first `k` layers have some property. Any run of layers may go; fewer of the first are left."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        value = stored(config, self.name)
        return None if value is None else [i < value for i in range(count)]

    def rewrite(self, old: PretrainedConfig, new: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        first = self.describe(old, count)
        if first is not None:
            setattr(new, self.name, sum(first[i] for i in kept))


@dataclass(frozen=True)
class LastLayers:
    """A number `k`: the last `k` layers have some property."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        value = stored(config, self.name)
        return None if value is None else [i >= count - value for i in range(count)]

    def rewrite(self, old: PretrainedConfig, new: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        last = self.describe(old, count)
        if last is not None:
            setattr(new, self.name, sum(last[i] for i in kept))


@dataclass(frozen=True)
class Period:
    """Every `period`-th layer, from `offset` on, has some property.

    What is left must be periodic again. Where no layer with the property is left, the period becomes a number that the
    stack does not reach.
    """

    period: str
    offset: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.period, self.offset)

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        period, offset = stored(config, self.period), stored(config, self.offset)
        return None if period is None else [i % period == offset for i in range(count)]

    def rewrite(self, old: PretrainedConfig, new: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        pattern = self.describe(old, count)
        if pattern is None:
            return
        wanted = [pattern[i] for i in kept]
        # the old period first, so that a cut of a whole period changes nothing
        for period in (stored(old, self.period), *range(1, len(kept) + 2)):
            for offset in range(period):
                if [j % period == offset for j in range(len(kept))] == wanted:
                    setattr(new, self.period, period)
                    setattr(new, self.offset, offset)
                    return
        raise NotRepresentable(
            f"config.{self.period} and config.{self.offset} describe layers at equal distances, and those left would be at "
            f"{[j for j, value in enumerate(wanted) if value]}"
        )


@dataclass(frozen=True)
class Cycle:
    """A short list that is repeated along the stack. It becomes a list with an entry for each layer that is left."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        values = stored(config, self.name)
        return [values[i % len(values)] for i in range(count)] if values else None

    def rewrite(self, old: PretrainedConfig, new: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        values = self.describe(old, count)
        if values is not None:
            setattr(new, self.name, [values[i] for i in kept])


@dataclass(frozen=True)
class SparseStep:
    """Layer `i` has experts where `(i + 1) % step == 0` and `i` is not in `dense` (Qwen2-MoE and its descendants).

    It becomes step 1 and the dense layers one by one, which describes every pattern.
    """

    step: str = "decoder_sparse_step"
    dense: str = "mlp_only_layers"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.step, self.dense)

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        step = stored(config, self.step)
        if step is None:
            return None
        dense = stored(config, self.dense) or ()
        return [i not in dense and (i + 1) % step == 0 for i in range(count)]

    def rewrite(self, old: PretrainedConfig, new: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        sparse = self.describe(old, count)
        if sparse is not None:
            setattr(new, self.step, 1)
            setattr(new, self.dense, [j for j, i in enumerate(kept) if not sparse[i]])


@dataclass(frozen=True)
class SparseRange:
    """Layer `i` has experts where `(i + 1) % interval == 0` and `start <= i <= end` (Ernie 4.5 MoE)."""

    interval: str = "moe_layer_interval"
    start: str = "moe_layer_start_index"
    end: str = "moe_layer_end_index"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.interval, self.start, self.end)

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        interval, start, end = (stored(config, name) for name in self.names)
        if interval is None:
            return None
        return [(i + 1) % interval == 0 and start <= i <= end for i in range(count)]

    def rewrite(self, old: PretrainedConfig, new: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        sparse = self.describe(old, count)
        if sparse is None:
            return
        wanted = [j for j, i in enumerate(kept) if sparse[i]]
        # with no layer left that has experts, the range starts behind the stack (-1 as an end means "the last layer")
        interval, start, end = 1, len(kept), len(kept)
        if wanted:
            start, end = wanted[0], wanted[-1]
            steps = {b - a for a, b in zip(wanted, wanted[1:], strict=False)} or {start + 1}
            interval = steps.pop()
            if steps or (start + 1) % interval:
                raise NotRepresentable(
                    f"config.{self.interval} puts experts in every n-th layer, and those left would be in {wanted}"
                )
        for name, value in zip(self.names, (interval, start, end), strict=True):
            setattr(new, name, value)


@dataclass(frozen=True)
class AttentionTypes:
    """GPT-Neo's `attention_types`, pairs of a list and how often it is repeated; it must be rewritten with what it expands to."""

    packed: str = "attention_types"
    expanded: str = "attention_layers"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.packed, self.expanded)

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        packed = stored(config, self.packed)
        if packed is None:
            return None
        return [list(pair) for pair in zip(_unpacked(packed), stored(config, self.expanded), strict=False)]

    def rewrite(self, old: PretrainedConfig, new: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        packed = stored(old, self.packed)
        if packed is not None:
            layers = [_unpacked(packed)[i] for i in kept]
            setattr(new, self.expanded, layers)
            setattr(new, self.packed, [[[layer], 1] for layer in layers])


def _unpacked(packed: Sequence[Any]) -> list[Any]:
    return [layer for layers, times in packed for _ in range(times) for layer in layers]


@dataclass(frozen=True)
class RedundantPeriod:
    """A period from which transformers once made a list that it stores and reads instead, such as `sliding_window_pattern`.

    transformers does not look at it where the list is there. For other readers it is rewritten where what is left is
    periodic, and left as it was where it is not.

    Args:
        name (`str`): Layer `i` is special where `(i + 1) % period == 0`.
        of (`str`): The list.
        special (`Any`): What the list says of special layers.
        first (`bool`): Layer `i` is special where `i % period == 0` instead.
    """

    name: str
    of: str
    special: Any
    first: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        return None

    def rewrite(self, old: PretrainedConfig, new: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        period, values = stored(old, self.name), stored(old, self.of)
        if not isinstance(period, int) or not isinstance(values, (list, tuple)) or len(values) != count:
            return
        wanted = [values[i] == self.special for i in kept]
        shift = 0 if self.first else 1
        for candidate in (period, *range(1, len(kept) + 2)):
            if candidate > 0 and [(j + shift) % candidate == 0 for j in range(len(kept))] == wanted:
                setattr(new, self.name, candidate)
                return


@dataclass(frozen=True)
class Dropped:
    """Layers that predict further tokens (multi-token prediction): transformers does not load them, so none are saved."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        return None

    def rewrite(self, old: PretrainedConfig, new: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        if stored(old, self.name):
            setattr(new, self.name, 0)


@dataclass(frozen=True)
class PerLayerOverrides:
    """transformers 5's `per_layer_config`: the settings in which single layers differ from the rest."""

    name: str = "per_layer_config"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        overrides = self._overrides(config)
        return None if overrides is None else [overrides.get(i, {}) for i in range(count)]

    def rewrite(self, old: PretrainedConfig, new: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        overrides = self._overrides(old)
        if overrides is not None:
            setattr(new, self.name, {j: dict(overrides[i]) for j, i in enumerate(kept) if i in overrides})

    def _overrides(self, config: PretrainedConfig) -> dict[int, dict[str, Any]] | None:
        if not getattr(config, "is_heterogeneous", False):
            return None
        return {int(i): value for i, value in config.to_dict()[self.name].items()}


@dataclass(frozen=True)
class Same:
    """A second name of the number of layers."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        value = stored(config, self.name)
        return None if value is None else [value == count] * count

    def rewrite(self, old: PretrainedConfig, new: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        if stored(old, self.name) is not None:
            setattr(new, self.name, len(kept))


@dataclass(frozen=True)
class ScaledByDepth:
    """A factor that the class divides by the square root of the number of layers (MiniCPM's `scale_depth`).

    The quotient must stay what it was, bit for bit, so the float nearest to the right one is looked for.
    """

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        value = stored(config, self.name)
        return None if value is None else [value / math.sqrt(count)] * count

    def rewrite(self, old: PretrainedConfig, new: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        value = stored(old, self.name)
        if value is None:
            return
        wanted = value / math.sqrt(count)
        nearest = wanted * math.sqrt(len(kept))
        for candidate in (nearest, math.nextafter(nearest, math.inf), math.nextafter(nearest, -math.inf)):
            if candidate / math.sqrt(len(kept)) == wanted:
                setattr(new, self.name, candidate)
                return
        raise NotRepresentable(f"no value of config.{self.name} gives {len(kept)} layers the factor {wanted!r}")
