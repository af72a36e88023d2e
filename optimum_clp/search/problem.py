"""What a strategy is given, and what it gives back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..architecture.lookup import cut_obstacle
from ..configuration.stages import SearchConfig
from ..errors import ModelError
from ..segments import LayerSegment, check_segments, kept_layers
from .objective import Objective
from .result import GateStep
from .scoreboard import Cut, Scoreboard


class Rows:
    """An endless supply of rows in a seeded order; each is used once before any is used again."""

    def __init__(self, num_rows: int, seed: int):
        self.order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed)).tolist()
        self.cursor = 0

    def take(self, count: int) -> list[int]:
        """The next rows, at most all of them."""
        count = min(count, len(self.order))
        taken = [self.order[(self.cursor + i) % len(self.order)] for i in range(count)]
        self.cursor = (self.cursor + count) % len(self.order)
        return taken

    def all_from_here(self) -> list[int]:
        """Every row, those that were not used yet first."""
        return self.order[self.cursor :] + self.order[: self.cursor]


@dataclass(frozen=True)
class SearchProblem:
    """One search.

    Args:
        objective ([`Objective`]): Measures gates on rows, and counts the work; holds the model and the tokens.
        board ([`Scoreboard`]): Collects exact figures of integer cuts.
        config ([`SearchConfig`]): Settings.
        num_removed (`int`): Layers that go.
        num_segments (`int`): Runs of layers they may be, at most.
        allowed (`tuple[LayerSegment, ...]`): Single segments of `num_removed` layers that can be cut exactly, by start;
            may be empty where `num_segments` is above 1.
        rows ([`Rows`]): Row numbers in a seeded order.
        seed (`int`): Of everything random.
    """

    objective: Objective
    board: Scoreboard
    config: SearchConfig
    num_removed: int
    num_segments: int
    allowed: tuple[LayerSegment, ...]
    rows: Rows
    seed: int

    @property
    def num_layers(self) -> int:
        """Layers of the dense model."""
        return self.objective.num_layers

    @property
    def budget(self) -> float:
        """Work that may be done, in forward-equivalents: the setting, for each of the `2k - 1` parameters, less what it
        took to measure how much work a layer is."""
        return self.config.budget * (2 * self.num_segments - 1) - self.objective.probe

    def no_cut(self) -> ModelError:
        """The error for a model of which no such cut is exact."""
        return ModelError.of(
            "num_removed",
            self.num_removed,
            f"no {self.num_removed} of the model's {self.num_layers} layers can be removed exactly in at most "
            f"{self.num_segments} segments",
            "Remove another number of layers, or allow more segments",
        )

    def can_go(self, layers: Sequence[int]) -> bool:
        """Whether the model without these layers can be expressed exactly."""
        return self.is_allowed(cut_of(layers, self.num_layers))

    def is_allowed(self, cut: Cut) -> bool:
        """As [`~SearchProblem.can_go`], for segments."""
        kept = kept_layers(cut, self.num_layers)
        return cut_obstacle(self.objective.model.config, kept) is None


@dataclass(frozen=True)
class SearchOutcome:
    """What a strategy chose.

    Args:
        cut (`Cut`): Segments in order, none of which touch.
        trajectory (`tuple[GateStep, ...]`): The gate's way, if there was a gate.
        layer_scores (`tuple[float, ...]`): Importance of each layer, if the strategy ranks layers: the layers of the
            smallest scores go first.
        used_strategy (`str` or `None`): Where the strategy left the choice to another one.
    """

    cut: Cut
    trajectory: tuple[GateStep, ...] = ()
    layer_scores: tuple[float, ...] = ()
    used_strategy: str | None = None


Strategy = Callable[[SearchProblem], SearchOutcome]


def cut_of(layers: Sequence[int], num_layers: int) -> Cut:
    """Single layers as segments: neighbours are one segment.

    Args:
        layers (`Sequence[int]`): In any order.
        num_layers (`int`): Layers of the dense model.
    """
    return check_segments([LayerSegment(i, i + 1) for i in layers], num_layers)
