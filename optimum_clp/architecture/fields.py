"""Config fields that say something about single layers, and what each of them becomes when layers go.

A field is read with `describe`, which spells out what it says about every layer, and written with `rewrite`. The two are
independent of each other, so that the guard can hold the description of the new config against that of the old one.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig


class NotRepresentable(Exception):
    """No value of the field describes the layers that are left; the message says which field, and why."""


class DepthField:
    """One rule. `names` are the config fields that it reads and writes: those that a row of the table gives it."""

    @property
    def names(self) -> tuple[str, ...]:
        """The config fields that it reads and writes."""
        raise NotImplementedError

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        """What the field says about each of `count` layers; `None` where the config does not have it, or nothing reads it."""
        return None

    def rewrite(self, old: PretrainedConfig, new: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        """Set the field of `new`, whose layer `j` is layer `kept[j]` of the `count` layers that `old` describes."""
        described = self.describe(old, count)
        if described is not None:
            self.write(old, new, [described[i] for i in kept])

    def write(self, old: PretrainedConfig, new: PretrainedConfig, wanted: list[Any]) -> None:
        """Set the field of `new` to a value that says `wanted[j]` about layer `j`.

        Raises:
            NotRepresentable: If there is none.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class _OneField(DepthField):
    """A rule for a single field, `name`."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)


def stored(config: PretrainedConfig, name: str) -> Any:
    """A field that is stored in the config; `None` for one that it computes from others, or does not have."""
    name = config.attribute_map.get(name, name)
    return None if isinstance(getattr(type(config), name, None), property) else vars(config).get(name)


class PerLayer(_OneField):
    """A list with one entry for each layer, or a text with one letter."""

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        values = stored(config, self.name)
        return list(values) if isinstance(values, (list, tuple, str)) and len(values) else None

    def rewrite(self, old: PretrainedConfig, new: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        values = self.describe(old, count)
        if values is not None and len(values) != count:
            raise NotRepresentable(
                f"config.{self.name} has {len(values)} entries, and it must have one for each of the {count} layers"
            )
        super().rewrite(old, new, kept, count)

    def write(self, old: PretrainedConfig, new: PretrainedConfig, wanted: list[Any]) -> None:
        kind = type(stored(old, self.name))
        setattr(new, self.name, "".join(wanted) if kind is str else kind(wanted))


_SPEAKS_OF_LAYERS = re.compile(r"layer|block|pattern|freq|hybrid|sliding|window|topk|experts|heads|theta|schedule")


def unknown_lists(config: PretrainedConfig, count: int, known: Iterable[str]) -> list[str]:
    """Fields that no rule knows and that must be lists of all layers: as long as the stack, with a name that speaks of it.

    Such fields come with checkpoints (`hybrid_layer_pattern`, `moe_layer_freq`); other readers go by them.

    Args:
        config (`PretrainedConfig`): Of the text decoder.
        count (`int`): Number of layers.
        known (`Iterable[str]`): Fields that have a rule.
    """
    covered = {config.attribute_map.get(name, name) for name in known}
    return [
        name
        for name, values in sorted(vars(config).items())
        if name not in covered and not name.startswith("_") and _lists_layers(name, values, count)
    ]


def _lists_layers(name: str, values: Any, count: int) -> bool:
    kinds = (list, tuple, str) if "pattern" in name else (list, tuple)
    named = _SPEAKS_OF_LAYERS.search(name) is not None
    return named and count > 2 and isinstance(values, kinds) and len(values) == count


class NestedLists(DepthField):
    """The same in mappings: lists inside a config's own mappings that are as long as the stack, and are called so."""

    @property
    def names(self) -> tuple[str, ...]:
        return ("lists in mappings",)

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        found = {
            place: owner[name]
            for place, owner, name in _places(vars(config))
            if _lists_layers(name, owner[name], count)
        }
        return [{place: values[i] for place, values in found.items()} for i in range(count)] if found else None

    def write(self, old: PretrainedConfig, new: PretrainedConfig, wanted: list[Any]) -> None:
        for place, owner, name in _places(vars(new)):
            if place in wanted[0]:
                values = [entry[place] for entry in wanted]
                owner[name] = "".join(values) if isinstance(owner[name], str) else values


def _places(mapping: dict[str, Any], outer: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """Entries of nested mappings whose names speak of layers: dotted place, the mapping, the key."""
    for name, value in mapping.items():
        if isinstance(value, dict) and "rope" not in name and name != "quantization_config":
            yield from _places(value, f"{outer}{name}.")
        elif outer and isinstance(name, str):
            yield f"{outer}{name}", mapping, name


@dataclass(frozen=True)
class LayerIndices(_OneField):
    """A list of the layers that have some property, counted from `base`."""

    base: int = 0

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        values = stored(config, self.name)
        return None if values is None else [i + self.base in values for i in range(count)]

    def write(self, old: PretrainedConfig, new: PretrainedConfig, wanted: list[Any]) -> None:
        setattr(new, self.name, [j + self.base for j, inside in enumerate(wanted) if inside])


@dataclass(frozen=True)
class NestedIndices(DepthField):
    """Lists of layers in a mapping, counted from `base` (Kimi Linear's `linear_attn_config`)."""

    mapping: str
    lists: tuple[str, ...]
    base: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        return (self.mapping,)

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        values = stored(config, self.mapping)
        found = [name for name in self.lists if isinstance(values, dict) and name in values]
        return [{n: i + self.base in values[n] for n in found} for i in range(count)] if found else None

    def write(self, old: PretrainedConfig, new: PretrainedConfig, wanted: list[Any]) -> None:
        lists = {n: [j + self.base for j, inside in enumerate(wanted) if inside[n]] for n in wanted[0]}
        setattr(new, self.mapping, {**stored(old, self.mapping), **lists})


class FirstLayers(_OneField):
    """A number `k`: the first `k` layers have some property. Any run of layers may go; fewer of the first are left."""

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        value = stored(config, self.name)
        return None if value is None else [i < value for i in range(count)]

    def write(self, old: PretrainedConfig, new: PretrainedConfig, wanted: list[Any]) -> None:
        setattr(new, self.name, sum(wanted))


class LastLayers(_OneField):
    """A number `k`: the last `k` layers have some property."""

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        value = stored(config, self.name)
        return None if value is None else [i >= count - value for i in range(count)]

    def write(self, old: PretrainedConfig, new: PretrainedConfig, wanted: list[Any]) -> None:
        setattr(new, self.name, sum(wanted))


@dataclass(frozen=True)
class Period(DepthField):
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

    def write(self, old: PretrainedConfig, new: PretrainedConfig, wanted: list[Any]) -> None:
        # the old period first, so that a cut of a whole period changes nothing
        for period in (stored(old, self.period), *range(1, len(wanted) + 2)):
            for offset in range(period):
                if [j % period == offset for j in range(len(wanted))] == wanted:
                    setattr(new, self.period, period)
                    setattr(new, self.offset, offset)
                    return
        raise NotRepresentable(
            f"config.{self.period} and config.{self.offset} describe layers at equal distances, and those left would be at "
            f"{[j for j, value in enumerate(wanted) if value]}"
        )


class Cycle(_OneField):
    """A short list that is repeated along the stack. It becomes a list with an entry for each layer that is left."""

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        values = stored(config, self.name)
        return [values[i % len(values)] for i in range(count)] if values else None

    def write(self, old: PretrainedConfig, new: PretrainedConfig, wanted: list[Any]) -> None:
        setattr(new, self.name, wanted)


@dataclass(frozen=True)
class SparseStep(DepthField):
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

    def write(self, old: PretrainedConfig, new: PretrainedConfig, wanted: list[Any]) -> None:
        setattr(new, self.step, 1)
        setattr(new, self.dense, [j for j, sparse in enumerate(wanted) if not sparse])


@dataclass(frozen=True)
class SparseRange(DepthField):
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

    def write(self, old: PretrainedConfig, new: PretrainedConfig, wanted: list[Any]) -> None:
        sparse = [j for j, value in enumerate(wanted) if value]
        # with no layer left that has experts, the range starts behind the stack (-1 as an end means "the last layer")
        interval, start, end = 1, len(wanted), len(wanted)
        if sparse:
            start, end = sparse[0], sparse[-1]
            steps = {b - a for a, b in zip(sparse, sparse[1:], strict=False)} or {start + 1}
            interval = steps.pop()
            if steps or (start + 1) % interval:
                raise NotRepresentable(
                    f"config.{self.interval} puts experts in every n-th layer, and those left would be in {sparse}"
                )
        for name, value in zip(self.names, (interval, start, end), strict=True):
            setattr(new, name, value)


@dataclass(frozen=True)
class AttentionTypes(DepthField):
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
        unpacked = [layer for layers, times in packed for _ in range(times) for layer in layers]
        return list(zip(unpacked, stored(config, self.expanded), strict=False))

    def write(self, old: PretrainedConfig, new: PretrainedConfig, wanted: list[Any]) -> None:
        setattr(new, self.expanded, [layer for _, layer in wanted])
        setattr(new, self.packed, [[[layer], 1] for layer, _ in wanted])


@dataclass(frozen=True)
class RedundantPeriod(_OneField):
    """A period from which transformers once made a list that it stores and reads instead, such as `sliding_window_pattern`.

    transformers does not look at it where the list is there. For other readers it is rewritten where what is left is
    periodic, and left as it was where it is not.

    Args:
        name (`str`): Layer `i` is special where `(i + 1) % period == 0`.
        of (`str`): The list.
        special (`Any`): What the list says of special layers.
        first (`bool`): Layer `i` is special where `i % period == 0` instead.
    """

    of: str
    special: Any
    first: bool = False

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


class Dropped(_OneField):
    """Layers that predict further tokens (multi-token prediction): a model does not hold them, so none are saved."""

    def rewrite(self, old: PretrainedConfig, new: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        if stored(old, self.name):
            setattr(new, self.name, 0)
        for value in vars(new).values():
            if isinstance(value, dict) and value.get(self.name):
                value[self.name] = 0


@dataclass(frozen=True)
class PerLayerOverrides(_OneField):
    """transformers 5's `per_layer_config`: the settings in which single layers differ from the rest."""

    name: str = "per_layer_config"

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        if not getattr(config, "is_heterogeneous", False):
            return None
        overrides = {int(i): value for i, value in config.to_dict()[self.name].items()}
        return [overrides.get(i, {}) for i in range(count)]

    def write(self, old: PretrainedConfig, new: PretrainedConfig, wanted: list[Any]) -> None:
        setattr(new, self.name, {j: dict(overrides) for j, overrides in enumerate(wanted) if overrides})


class Same(_OneField):
    """A second name of the number of layers."""

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        value = stored(config, self.name)
        return None if value is None else [value == count] * count

    def write(self, old: PretrainedConfig, new: PretrainedConfig, wanted: list[Any]) -> None:
        setattr(new, self.name, len(wanted))


class Multiple(_OneField):
    """A number of parts of which every layer has equally many (LongCat's two attentions)."""

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        value = stored(config, self.name)
        return None if value is None or value % count else [value // count] * count

    def write(self, old: PretrainedConfig, new: PretrainedConfig, wanted: list[Any]) -> None:
        setattr(new, self.name, sum(wanted))


class ScaledByDepth(_OneField):
    """A factor that the class divides by the square root of the number of layers (MiniCPM's `scale_depth`).

    The quotient must stay what it was, bit for bit, so the float nearest to the right one is looked for.
    """

    def describe(self, config: PretrainedConfig, count: int) -> list[Any] | None:
        value = stored(config, self.name)
        return None if value is None else [value / math.sqrt(count)] * count

    def write(self, old: PretrainedConfig, new: PretrainedConfig, wanted: list[Any]) -> None:
        root = math.sqrt(len(wanted))
        nearest = wanted[0] * root
        for candidate in (nearest, math.nextafter(nearest, math.inf), math.nextafter(nearest, -math.inf)):
            if candidate / root == wanted[0]:
                setattr(new, self.name, candidate)
                return
        raise NotRepresentable(f"no value of config.{self.name} gives {len(wanted)} layers the factor {wanted[0]!r}")
