"""Several segments at once: valleys whose places and lengths are learned together, for a given number of layers.

Where to begin is found by a map: the cost of a single valley at every place for a few lengths, from which the best sums
of several are put together. That the costs add up is not true, so the best sums are measured as gates of several
valleys, and descent starts from the best of those.
"""

import itertools
import math
from collections.abc import Sequence

from ..segments import LayerSegment, check_segments
from .enumeration import MOST_CUTS, halving_search, number_of_cuts
from .gate import concave_gates
from .gate_descent import FINAL_STEEPNESS, gate_search, newton_move, places_along, radii, snapped
from .objective import Gate
from .problem import SearchOutcome, SearchProblem
from .races import affordable_rows
from .repaired_race import race
from .result import GateStep
from .scoreboard import Cut

Valleys = tuple[tuple[float, float], ...]
"""Start and length of each valley, in layers, from the first to the last."""

_MAP_SHARE, _START_SHARE, _DESCENT_SHARE = 0.35, 0.15, 0.2
_KEPT_SUMS = 16  # of each number of segments
_STARTS = 6


def several_gates_search(problem: SearchProblem) -> SearchOutcome:
    """Learn the starts and lengths of up to `num_segments` valleys, then race the cuts next to where they end.

    The best single segments are in the race, so several segments are chosen only where they are better. Costs
    `problem.budget` forward-equivalents and scores at most `num_rescored` cuts for each of the `2k - 1` parameters.
    """
    if min(problem.num_segments, problem.num_removed) == 1:
        return gate_search(problem)
    objective, config, rows = problem.objective, problem.config, problem.rows
    end = objective.spent + problem.budget
    sums = _best_sums(problem)
    if not sums:
        return _by_enumeration(problem)
    starts = _unlike(sums, _STARTS, problem.num_removed)
    initial = [_gate(problem, _valleys(cut), config.initial_steepness) for cut in starts]
    taken = rows.take(affordable_rows(objective, initial, _START_SHARE * problem.budget))
    losses = objective.mean_kl(initial, taken, "Gates of several valleys")
    steps = [
        GateStep(0, float(cut[0].start), config.initial_steepness / len(cut[0]), loss, _valleys(cut))
        for cut, loss in zip(starts, losses, strict=True)
    ]
    ranked = [cut for _, cut in sorted(zip(losses, starts, strict=True))]
    several = next((cut for cut in ranked if len(cut) > 1), None)
    ended: list[Cut] = []
    if several is not None:
        valleys, descent = _descend(problem, _valleys(several), _DESCENT_SHARE * problem.budget)
        steps += descent
        ended = _integers_near(valleys, problem)
    most = config.num_rescored * (2 * problem.num_segments - 1)
    singles = [cut for cut in sums if len(cut) == 1][:2]
    candidates = list(dict.fromkeys([*ranked[:2], *singles, *ended, *ranked, *sums]))[:most]
    chosen = race(problem, candidates, end - objective.spent)
    return SearchOutcome(chosen, tuple(steps))


def _valleys(cut: Cut) -> Valleys:
    return tuple((float(s.start), float(len(s))) for s in cut)


def _gate(problem: SearchProblem, valleys: Valleys, steepness: float) -> Gate:
    """Sides in proportion to each valley's length, so that short and long ones have the same shape."""
    steep = [min(FINAL_STEEPNESS, steepness / max(1.0, n)) for _, n in valleys]
    return snapped(concave_gates(valleys, problem.num_layers, steep))


def _best_sums(problem: SearchProblem) -> list[Cut]:
    """Cuts of one to `num_segments` segments by the sum of what single valleys cost, the cheapest first."""
    costs = _cost_of_single_valleys(problem)
    # best[r]: the cheapest ways to have removed r layers below the layer at hand, the one below it kept
    Ways = list[tuple[float, Cut]]
    total = problem.num_removed
    best: dict[int, dict[int, Ways]] = {0: {0: [(0.0, ())]}}
    for layer in range(problem.num_layers + 1):
        for removed, ways in best.get(layer, {}).items():
            # the layer stays, or a segment begins with it; a segment is followed by a layer that stays
            _keep(best, layer + 1, removed, ways)
            for length in range(1, min(total - removed, problem.num_layers - layer) + 1):
                longer = [
                    (cost + costs[length][layer], (*cut, LayerSegment(layer, layer + length)))
                    for cost, cut in ways
                    if len(cut) < problem.num_segments
                ]
                after = layer + length + 1 if layer + length < problem.num_layers else problem.num_layers + 1
                _keep(best, after, removed + length, longer)
        best.pop(layer, None)
    return [cut for _, cut in best[problem.num_layers + 1].get(total, []) if problem.is_allowed(cut)]


def _keep(best: dict, layer: int, removed: int, ways: list[tuple[float, Cut]]) -> None:
    """Add ways to a state; of each number of segments the cheapest stay."""
    if not ways:
        return
    state = best.setdefault(layer, {})
    merged = sorted([*state.get(removed, []), *ways])
    kept: list[tuple[float, Cut]] = []
    count: dict[int, int] = {}
    for way in merged:
        count[len(way[1])] = count.get(len(way[1]), 0) + 1
        if count[len(way[1])] <= _KEPT_SUMS:
            kept.append(way)
    state[removed] = kept


def _cost_of_single_valleys(problem: SearchProblem) -> list[list[float]]:
    """KL of a single valley for each length (from 0) and start, interpolated between those that are measured."""
    total, depth = problem.num_removed, problem.num_layers
    lengths = sorted({max(1, round(total * share)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)})
    places = {n: places_along(depth - n, n) for n in lengths}
    pairs = [(n, s) for n in lengths for s in places[n]]
    gates = [_gate(problem, ((s, float(n)),), problem.config.initial_steepness) for n, s in pairs]
    rows = problem.rows.take(affordable_rows(problem.objective, gates, _MAP_SHARE * problem.budget))
    found = problem.objective.mean_kl(gates, rows, "Map of single valleys")
    measured = dict(zip(pairs, found, strict=True))
    costs = [[0.0] * (depth + 1)]
    for length in range(1, total + 1):
        above = next(n for n in lengths if n >= length)
        below = max((n for n in lengths if n <= length), default=above)
        share = (length - below) / (above - below) if above > below else 0.0
        costs.append(
            [
                (1 - share) * _between([(s, measured[below, s]) for s in places[below]], start)
                + share * _between([(s, measured[above, s]) for s in places[above]], start)
                for start in range(depth - length + 1)
            ]
        )
    return costs


def _between(points: list[tuple[float, float]], x: float) -> float:
    """Linear interpolation; the nearest point beyond the ends."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[0][1] if x < points[0][0] else points[-1][1]


def _unlike(cuts: Sequence[Cut], count: int, num_removed: int) -> list[Cut]:
    """The first cuts of which no two share most of their layers, one single segment among them if there is one."""
    single = [cut for cut in cuts if len(cut) == 1][:1]
    chosen: list[Cut] = list(single)
    for cut in cuts:
        layers = _layers(cut)
        if len(chosen) < count and all(len(layers & _layers(other)) <= 0.75 * num_removed for other in chosen):
            chosen.append(cut)
    if all(len(cut) == 1 for cut in chosen):
        chosen += [cut for cut in cuts if len(cut) > 1][:1]
    return chosen


def _layers(cut: Cut) -> set[int]:
    return {i for s in cut for i in range(s.start, s.stop)}


def _descend(problem: SearchProblem, valleys: Valleys, budget: float) -> tuple[Valleys, list[GateStep]]:
    """Newton steps in a trust region for all starts and lengths while the sides get steeper; the lengths' sum stays.

    All derivatives of a round are central differences on the same rows. The region is halved from round to round.
    """
    objective, steepness = problem.objective, problem.config.initial_steepness
    moves, widths = _moves(len(valleys)), radii(max(1.0, problem.num_removed / (2 * len(valleys))))
    trajectory = []
    for step, radius in enumerate(widths, 1):
        ends = [valleys]
        for move, sign in itertools.product(moves, (-1, 1)):
            ends.append(_feasible(_moved(valleys, move, sign * radius), problem.num_layers))
        gates = [_gate(problem, end, steepness) for end in ends]
        rows = problem.rows.take(affordable_rows(objective, gates, budget / len(widths)))
        here, *losses = objective.mean_kl(gates, rows, "Gate search")
        trajectory.append(GateStep(step, valleys[0][0], steepness / max(1.0, valleys[0][1]), here, valleys))
        for move, below, above in zip(moves, losses[::2], losses[1::2], strict=True):
            valleys = _moved(valleys, move, radius * newton_move(below, here, above))
        valleys = _feasible(valleys, problem.num_layers)
        steepness *= 2
    return valleys, trajectory


def _moves(count: int) -> list[tuple[str, int]]:
    """The `2k - 1` directions: each valley along the stack; a layer from each valley to the next."""
    return [("shift", j) for j in range(count)] + [("pass", j) for j in range(count - 1)]


def _moved(valleys: Valleys, move: tuple[str, int], amount: float) -> Valleys:
    kind, j = move
    changed = list(valleys)
    if kind == "shift":
        changed[j] = (changed[j][0] + amount, changed[j][1])
    else:  # both keep their middles
        changed[j] = (changed[j][0] - amount / 2, changed[j][1] + amount)
        changed[j + 1] = (changed[j + 1][0] + amount / 2, changed[j + 1][1] - amount)
    return tuple(changed)


def _feasible(valleys: Valleys, num_layers: int) -> Valleys:
    """The nearest valleys of at least half a layer each, in the stack, with a layer between any two."""
    lengths = [max(0.5, n) for _, n in valleys]
    surplus = sum(lengths) - sum(n for _, n in valleys)
    for j in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        taken = min(surplus, lengths[j] - 0.5)
        lengths[j], surplus = lengths[j] - taken, surplus - taken
    starts, low = [], 0.0
    for (start, _), length in zip(valleys, lengths, strict=True):
        starts.append(max(low, start))
        low = starts[-1] + length + 1
    high = float(num_layers)
    for j in reversed(range(len(starts))):
        starts[j] = max(0.0, min(starts[j], high - lengths[j]))
        high = starts[j] - 1
    return tuple(zip(starts, lengths, strict=True))


def _integers_near(valleys: Valleys, problem: SearchProblem) -> list[Cut]:
    """Allowed cuts next to real valleys, the nearest first: all ways to round starts and lengths up or down."""
    found: dict[Cut, float] = {}
    choices = [
        [
            (s, n)
            for s in {math.floor(start), math.ceil(start)}
            for n in {math.floor(length), math.ceil(length)}
            if n > 0
        ]
        for start, length in valleys
    ]
    for picked in itertools.product(*choices):
        if sum(n for _, n in picked) != problem.num_removed:
            continue
        bounds = [(s, s + n) for s, n in picked]
        if bounds[0][0] < 0 or bounds[-1][1] > problem.num_layers:
            continue
        if any(a[1] > b[0] for a, b in itertools.pairwise(bounds)):
            continue
        cut = check_segments([LayerSegment(*b) for b in bounds], problem.num_layers)
        distance = sum(
            abs(s - start) + abs(n - length) for (s, n), (start, length) in zip(picked, valleys, strict=True)
        )
        found[cut] = min(distance, found.get(cut, math.inf))
    return [cut for cut in sorted(found, key=lambda c: (found[c], c)) if problem.is_allowed(cut)]


def _by_enumeration(problem: SearchProblem) -> SearchOutcome:
    """For architectures of which few cuts are exact, none of them among the best sums."""
    if number_of_cuts(problem.num_layers, problem.num_removed, problem.num_segments) > MOST_CUTS:
        raise problem.no_cut()
    return halving_search(problem)
