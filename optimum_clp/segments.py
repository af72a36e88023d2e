"""Runs of consecutive decoder layers, and the arithmetic of how many layers go."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import ConfigurationError


@dataclass(frozen=True, order=True)
class LayerSegment:
    """The decoder layers `start, start + 1, ..., stop - 1` of the dense model (half-open, zero-based).

    Args:
        start (`int`): First layer of the run, at least 0.
        stop (`int`): One past the last layer, greater than `start`.

    Raises:
        ConfigurationError: If the bounds are not integers with `0 <= start < stop`.
    """

    start: int
    stop: int

    def __post_init__(self):
        # True is 1 to Python, and a slip here
        if not (type(self.start) is int and type(self.stop) is int and 0 <= self.start < self.stop):
            raise ConfigurationError.of(
                "segment",
                (self.start, self.stop),
                "a segment is a half-open range of layers, 0 <= start < stop",
                "Give integers such as LayerSegment(4, 8), which removes layers 4, 5, 6 and 7",
            )

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop})"

    def to_list(self) -> list[int]:
        """The bounds as a JSON-ready list `[start, stop]`."""
        return [self.start, self.stop]


def number_of_layers_to_remove(pruning_ratio: float, num_layers: int) -> int:
    """`floor(pruning_ratio * num_layers + 0.5)`, refused where nothing would go or nothing would be left.

    Args:
        pruning_ratio (`float`): Share of the layers to remove, in (0, 1).
        num_layers (`int`): Decoder layers of the dense model.

    Returns:
        `int`: Number of layers to remove, in [1, num_layers - 1].

    Raises:
        ConfigurationError: If no layer would be removed or none would be left; names the nearest ratio that works.
    """
    count = math.floor(pruning_ratio * num_layers + 0.5)
    if count < 1:
        nearest, rule = 1, f"it removes none of the model's {num_layers} layers"
    elif count >= num_layers:
        nearest, rule = num_layers - 1, f"it leaves none of the model's {num_layers} layers"
    else:
        return count
    if num_layers < 2:
        raise ConfigurationError.of(
            "model", num_layers, "a model of one layer has no layer to spare", "Use a deeper model"
        )
    raise ConfigurationError.of(
        "pruning_ratio", pruning_ratio, rule, f"The nearest valid ratio is {nearest / num_layers:.4g}"
    )


def candidate_segments(num_layers: int, length: int) -> list[LayerSegment]:
    """All contiguous segments of `length` layers, by start."""
    return [LayerSegment(start, start + length) for start in range(num_layers - length + 1)]


def check_segments(segments: Iterable[LayerSegment], num_layers: int) -> tuple[LayerSegment, ...]:
    """Sort segments and check that they can be cut from a model of `num_layers` layers.

    Args:
        segments (`Iterable[LayerSegment]`): Segments in any order; `(start, stop)` pairs are taken too.
        num_layers (`int`): Decoder layers of the dense model.

    Returns:
        `tuple[LayerSegment, ...]`: The segments by start; touching ones are merged.

    Raises:
        ConfigurationError: If there is none, if one reaches beyond the last layer, if two overlap, or if nothing is left.
    """
    ordered = sorted(map(_segment, segments if isinstance(segments, Iterable) else [segments]))
    shown = [s.to_list() for s in ordered]
    problem = None
    if not ordered:
        problem = ("at least one segment is needed", "Give for example [LayerSegment(4, 8)]")
    elif ordered[-1].stop > num_layers:
        problem = (f"the model has {num_layers} layers", f"Keep every stop at or below {num_layers}")
    elif any(a.stop > b.start for a, b in zip(ordered, ordered[1:], strict=False)):
        problem = ("segments must not overlap", "Merge the overlapping ones into one")
    elif sum(map(len, ordered)) >= num_layers:
        problem = (f"no layer of {num_layers} would be left", "Remove fewer layers")
    if problem:
        raise ConfigurationError.of("segments", shown, *problem)
    merged = [ordered[0]]
    for segment in ordered[1:]:
        if segment.start == merged[-1].stop:
            merged[-1] = LayerSegment(merged[-1].start, segment.stop)
        else:
            merged.append(segment)
    return tuple(merged)


def _segment(given: object) -> LayerSegment:
    """A segment, or a pair of bounds, as a segment."""
    if isinstance(given, (tuple, list)) and len(given) == 2:
        return LayerSegment(*given)
    if not isinstance(given, LayerSegment):
        rule = f"a {type(given).__name__} is no run of layers"
        raise ConfigurationError.of("segments", given, rule, "Give for example [LayerSegment(4, 8)] or [(4, 8)]")
    return given


def kept_layers(segments: Iterable[LayerSegment], num_layers: int) -> list[int]:
    """Old indices of the layers that stay, ascending: new layer `j` is old layer `kept[j]`."""
    removed = {i for s in segments for i in range(s.start, s.stop)}
    return [i for i in range(num_layers) if i not in removed]


def further_segments(
    before: Iterable[LayerSegment], then: Iterable[LayerSegment], num_layers: int
) -> tuple[LayerSegment, ...]:
    """What two cuts have removed together, in the dense model's numbering.

    Args:
        before (`Iterable[LayerSegment]`): The first cut, in that numbering.
        then (`Iterable[LayerSegment]`): The second one, in the numbering of what the first has left.
        num_layers (`int`): Decoder layers of the dense model.
    """
    before = list(before)
    kept = kept_layers(before, num_layers)
    gone = [LayerSegment(kept[i], kept[i] + 1) for s in then for i in range(s.start, s.stop)]
    return check_segments([*before, *gone], num_layers)


def target_state(kept: Sequence[int], layer: int, num_layers: int) -> int:
    """Which of the dense model's hidden states a layer of the cut model should put out.

    Args:
        kept (`Sequence[int]`): Old indices of the layers that stay, ascending.
        layer (`int`): In the cut model's numbering.
        num_layers (`int`): Layers of the dense model.

    Returns:
        `int`: The dense layer that the state enters; `num_layers` for what leaves the last one.
    """
    return kept[layer + 1] if layer + 1 < len(kept) else num_layers


def endpoint_layers(segments: Iterable[LayerSegment], num_layers: int, width: int = 1) -> list[int]:
    """New indices of the layers next to the cuts: the ones that cutoff endpoint tuning trains.

    Up to `width` kept layers on each side of every segment. A segment at an end of the stack has one side only.

    Args:
        segments (`Iterable[LayerSegment]`): What was cut, in the dense model's numbering.
        num_layers (`int`): Decoder layers of the dense model.
        width (`int`): Layers on each side, at least 1.

    Returns:
        `list[int]`: Ascending indices in the cut model's numbering.
    """
    segments = list(segments)
    kept = kept_layers(segments, num_layers)
    chosen = set()
    for segment in segments:
        below = [j for j, i in enumerate(kept) if i < segment.start]
        above = [j for j, i in enumerate(kept) if i >= segment.stop]
        chosen.update(below[-width:])
        chosen.update(above[:width])
    return sorted(chosen)
