"""The concave gate's search: a sweep along the stack, descent from its best places while the gate gets steeper, integers
at the end."""

import math
from collections.abc import Sequence

import torch

from .gate import concave_gate
from .objective import Gate
from .problem import SearchOutcome, SearchProblem
from .races import affordable_rows
from .repaired_race import race
from .result import GateStep
from .scoreboard import Cut

SWEEP_SHARE, DESCENT_SHARE, SETTLING_SHARE = 0.2, 0.15, 0.2
STARTS, SETTLING_STARTS, SETTLING_ROUNDS = 4, 2, 3
FINAL_STEEPNESS = 6.0  # per layer: the sides of the valley are a layer wide
_NEARLY = 1e-3  # a gate this near to 0 or 1 counts as closed or open, so that its layer need not be mixed


def snapped(gate: torch.Tensor) -> Gate:
    """A gate as numbers, exactly 0 or 1 where it nearly is."""
    return tuple(0.0 if g < _NEARLY else 1.0 if g > 1 - _NEARLY else g for g in gate.tolist())


def places_along(room: int, length: float) -> list[float]:
    """Starts from 0 to `room` that a valley of some length is first looked at: at most half a length apart."""
    count = min(room + 1, max(9, math.ceil(2 * room / length) + 1))
    return torch.linspace(0, room, count, dtype=torch.float64).tolist() if count > 1 else [0.0]


def radii(first: float) -> list[float]:
    """How far the descent looks to both sides, round by round: halved down to a layer."""
    return [first / 2**i for i in range(1 + max(0, math.floor(math.log2(first))))]


def newton_move(below: float, here: float, above: float) -> float:
    """Where a parabola through three points a radius apart is lowest, within the radius: in [-1, 1].

    With the gradient `(above - below) / 2` and the curvature `above - 2 here + below` this is a Newton step in a trust
    region; without positive curvature it is the lower end of the region.
    """
    gradient, curvature = (above - below) / 2, above - 2 * here + below
    if not math.isfinite(gradient) or not math.isfinite(curvature):
        return 0.0
    if curvature <= 0:
        return -math.copysign(1.0, gradient) if gradient else 0.0
    return min(1.0, max(-1.0, -gradient / curvature))


def gate_search(problem: SearchProblem) -> SearchOutcome:
    """Find the start of a segment by its gate, for `problem.budget` forward-equivalents.

    The gate has one parameter, so its first and second derivatives are taken as central differences: three forward
    passes, no activations kept (a backward pass through the frozen layers costs about two forwards as well, and all
    activations). All of them see the same rows, so their noise cancels in the differences. Descent stays in the valley
    it starts in, so it starts in several, and the worse half of them is given up after each round. At the end at most
    `num_rescored` integer segments are raced.
    """
    objective, rows, length = problem.objective, problem.rows, problem.num_removed
    room = objective.num_layers - length
    end = objective.spent + problem.budget
    trajectory: list[GateStep] = []

    def losses_at(step: int, starts: Sequence[float], steepness: float, share: float) -> list[float]:
        gates = [snapped(concave_gate(s, length, objective.num_layers, steepness)) for s in starts]
        taken = rows.take(affordable_rows(objective, gates, share * problem.budget))
        losses = objective.mean_kl(gates, taken, "Gate search")
        trajectory.extend(
            GateStep(step, s, steepness, loss, ((s, length),)) for s, loss in zip(starts, losses, strict=True)
        )
        return losses

    places = places_along(room, length)
    spacing = places[1] - places[0] if len(places) > 1 else 1.0
    steepness = min(FINAL_STEEPNESS, problem.config.initial_steepness / length)
    losses = losses_at(0, places, steepness, SWEEP_SHARE)
    ranked = [s for _, s in sorted(zip(losses, places, strict=True))]
    starts = _valleys_first(places, losses)[:STARTS]
    widths = radii(spacing / 2)
    for step, radius in enumerate(widths, 1):
        # the sides are as wide as the region that is looked at
        steepness *= 2 if step > 1 else 1
        sides = [min(float(room), max(0.0, s + side * radius)) for s in starts for side in (-1, 0, 1)]
        losses = losses_at(step, sides, min(FINAL_STEEPNESS, steepness), DESCENT_SHARE / len(widths))
        moved = []
        for i, s in enumerate(starts):
            three = losses[3 * i : 3 * i + 3]
            moved.append((min(three), min(float(room), max(0.0, s + radius * newton_move(*three)))))
        starts = _apart([s for _, s in sorted(moved)], radius)[: max(2, math.ceil(len(starts) / 2))]
    # the smooth landscape's lowest place is a layer or two beside the lowest integer: look at integers, with steep sides
    settled: dict[float, float] = {}
    centres = [float(round(s)) for s in starts[:SETTLING_STARTS]]
    for step in range(len(widths) + 1, len(widths) + 1 + SETTLING_ROUNDS):
        window = sorted({c + i for c in centres for i in (-2, -1, 0, 1, 2) if 0 <= c + i <= room})
        losses = losses_at(step, window, FINAL_STEEPNESS, SETTLING_SHARE / SETTLING_ROUNDS)
        settled |= zip(window, losses, strict=True)
        lowest = [min((w for w in window if abs(w - c) <= 2), key=settled.__getitem__) for c in centres]
        if all(abs(low - c) < 2 or low in (0, room) for low, c in zip(lowest, centres, strict=True)):
            break
        centres = lowest
    places = [*sorted(settled, key=settled.__getitem__), *ranked]
    candidates = _allowed_next_to(problem, places)
    chosen = race(problem, candidates, end - objective.spent)
    return SearchOutcome(chosen, tuple(trajectory))


def _valleys_first(places: Sequence[float], losses: Sequence[float]) -> list[float]:
    """Places by their loss, those that are lower than both neighbours before the others."""
    padded = [math.inf, *losses, math.inf]
    order = sorted(range(len(places)), key=lambda i: (losses[i] > min(padded[i], padded[i + 2]), losses[i]))
    return [places[i] for i in order]


def _apart(starts: Sequence[float], radius: float) -> list[float]:
    """Starts of which no two are within a radius, the first ones of them."""
    kept: list[float] = []
    for start in starts:
        if all(abs(start - other) >= radius for other in kept):
            kept.append(start)
    return kept


def _allowed_next_to(problem: SearchProblem, places: Sequence[float]) -> list[Cut]:
    """The allowed segments next to some places, in their order, at most `num_rescored`."""
    found = dict.fromkeys(min(problem.allowed, key=lambda s: (abs(s.start - place), s)) for place in places)
    return [(segment,) for segment in list(found)[: problem.config.num_rescored]]
