"""What must hold for a cut to be exact, beyond what config fields say."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from packaging import version
from transformers import PretrainedConfig
from transformers import __version__ as transformers_version

from .fields import (
    NotRepresentable,
    stored,
)

Refusal = tuple[str, str]
"""Rule and remedy of a [`~optimum_clp.errors.Problem`]."""


class Condition:
    """Something that must hold for a cut to be exact, beyond what config fields say."""

    def refusal(self, config: PretrainedConfig) -> Refusal | None:
        """Why no cut of this model is exact, and what would help; `None` if some are."""
        return None

    def check(self, config: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        """Raise [`NotRepresentable`] if this cut is not exact."""


@dataclass(frozen=True)
class Unless(Condition):
    """No cut is exact where a setting has a value other than `harmless`."""

    name: str
    harmless: tuple[Any, ...]
    rule: str
    remedy: str

    def refusal(self, config: PretrainedConfig) -> Refusal | None:
        value = getattr(config, self.name, None)
        return None if value in self.harmless else (f"config.{self.name} is {value!r}: {self.rule}", self.remedy)


@dataclass(frozen=True)
class SinceTransformers5(Condition):
    """The class in transformers 4 has a fault that makes every check of it void."""

    fault: str

    def refusal(self, config: PretrainedConfig) -> Refusal | None:
        if version.parse(transformers_version).major >= 5:
            return None
        return f"in transformers {transformers_version} {self.fault}", "Install transformers 5"


@dataclass(frozen=True)
class IndexInTheMath(Condition):
    """A layer computes with its own index: only layers at the end of the stack can go.

    Args:
        why (`str`): What it computes.
        name (`str`, *optional*): The setting that makes it do so; always, without one.
    """

    why: str
    name: str | None = None

    def check(self, config: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        moved = [i for j, i in enumerate(kept) if i != j]
        if moved and (self.name is None or getattr(config, self.name, False)):
            raise NotRepresentable(
                f"a layer computes with its own index ({self.why}), and layer {moved[0]} would get another one; only layers "
                "at the end of the stack can go"
            )


@dataclass(frozen=True)
class Stays(Condition):
    """A layer that is built differently from the others because of its place; negative places count from the end."""

    place: int
    why: str

    def check(self, config: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        if self.place % count not in kept:
            raise NotRepresentable(f"layer {self.place % count} must stay, because {self.why}")


@dataclass(frozen=True)
class KindStays(Condition):
    """Layers of one kind cannot go."""

    name: str
    kind: str
    why: str

    def check(self, config: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        gone = [i for i, kind in enumerate(getattr(config, self.name)) if kind == self.kind and i not in kept]
        if gone:
            raise NotRepresentable(f"layer {gone[0]} is {self.kind!r} and must stay, because {self.why}")


@dataclass(frozen=True)
class LastKind(Condition):
    """The last layer must be of one kind; the class forces it to be."""

    name: str
    kind: str

    def check(self, config: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        kinds = stored(config, self.name)
        if kinds and kinds[kept[-1]] != self.kind:
            raise NotRepresentable(
                f"the last layer must be {self.kind!r} in config.{self.name}, and layer {kept[-1]} would be the last"
            )


@dataclass(frozen=True)
class AttentionStays(Condition):
    """At least one layer with attention must be left where there is one: the cache measures the past by it."""

    def check(self, config: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
        has = ["attention" in kind and not kind.startswith("linear") for kind in kinds]
        if any(has) and not any(has[i] for i in kept):
            raise NotRepresentable("no layer with attention would be left, and the model's cache needs one")


@dataclass(frozen=True)
class DonorsStay(Condition):
    """A layer that takes over what the nearest earlier donor has computed needs that donor."""

    name: str
    donor: str
    taker: str

    def check(self, config: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        kinds = stored(config, self.name) or []
        donor = None
        for i, kind in enumerate(kinds):
            donor = i if kind == self.donor else donor
            if kind == self.taker and i in kept and donor not in kept:
                raise NotRepresentable(f"layer {i} takes over what layer {donor} has computed, which must stay")


@dataclass(frozen=True)
class SharedKeysStay(Condition):
    """The last `num_kv_shared_layers` layers use the keys and values of the last own layer of their kind (Gemma 4)."""

    def check(self, config: PretrainedConfig, kept: Sequence[int], count: int) -> None:
        shared = getattr(config, "num_kv_shared_layers", 0) or 0
        own = count - shared
        for kind in dict.fromkeys(config.layer_types[own:]):
            donor = max(i for i in range(own) if config.layer_types[i] == kind)
            if donor not in kept:
                raise NotRepresentable(f"layer {donor} must stay, because later layers use its keys and values")
        # the class also demands that every kind of layer that is left has a layer with keys of its own
        kinds = {config.layer_types[i] for i in kept}
        if shared and kinds != {config.layer_types[i] for i in kept if i < own}:
            raise NotRepresentable("every kind of layer needs one with keys and values of its own")
