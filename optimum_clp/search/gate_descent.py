"""The concave gate's search: a sweep along the stack, gradient descent while the gate gets steeper, integers at the end."""

import math
from collections.abc import Sequence

import torch

from ..gate import concave_gate
from ..progress import progress_bar
from ..segments import LayerSegment
from .objective import Gate
from .problem import SearchOutcome, SearchProblem
from .races import affordable_rows, successive_halving
from .result import GateStep
from .scoreboard import Cut

SWEEP_SHARE, DESCENT_SHARE = 0.35, 0.2
_NEARLY = 1e-3  # a gate this near to 0 or 1 counts as closed or open, so that its layer need not be mixed


def snapped(gate: torch.Tensor) -> Gate:
    """A gate as numbers, exactly 0 or 1 where it nearly is."""
    return tuple(0.0 if g < _NEARLY else 1.0 if g > 1 - _NEARLY else g for g in gate.tolist())


def gate_search(problem: SearchProblem) -> SearchOutcome:
    """Find the start of a segment by its gate.

    The gate has one parameter, so its derivative is taken as a central difference: two forward passes, no activations
    kept (a backward pass through the frozen layers costs about two forwards as well, and all activations). Both ends see
    the same rows, so their noise cancels in the difference.

    Scores at most `config.num_rescored` integer segments, and costs `config.budget` forward-equivalents.
    """
    config, rows, allowed = problem.config, problem.rows, problem.allowed
    objective, length = problem.objective, problem.num_removed
    room = objective.num_layers - length
    end = objective.spent + config.budget
    initial, final = config.initial_steepness / length, config.final_steepness / length

    def gates(starts: Sequence[float], steepness: float) -> list[Gate]:
        return [snapped(concave_gate(s, length, objective.num_layers, steepness)) for s in starts]

    # gradient descent stays in the valley it starts in, so one look along the whole stack, at steps of half a segment,
    # chooses the valley; its runners-up get an exact score at the end
    count = min(room + 1, max(5, math.ceil(2 * room / length) + 1))
    coarse = torch.linspace(0, room, count).tolist() if count > 1 else [0.0]
    sweep = gates(coarse, initial)
    taken = rows.take(affordable_rows(objective, sweep, SWEEP_SHARE * config.budget))
    losses = objective.measure(sweep, taken, "Gate along the stack").kl.mean(1).tolist()
    trajectory = [GateStep(0, s, initial, loss, ((s, length),)) for s, loss in zip(coarse, losses, strict=True)]
    start = coarse[min(range(count), key=losses.__getitem__)]
    descent_end = objective.spent + DESCENT_SHARE * config.budget
    momentum = scale = 0.0
    one_row = (1 + 2 * objective.price(gates([start], initial)[0])) / len(objective.tokens)
    steps = max(1, min(config.steps, int(DESCENT_SHARE * config.budget / one_row)))
    with progress_bar(steps, "Gate search", objective.quiet) as bar:
        for step in range(1, steps + 1):
            progress = (step - 1) / max(1, steps - 1)
            steepness = initial * (final / initial) ** progress
            half = 0.5 / max(1.0, steepness)  # a steep gate changes within less than a layer
            low, high = max(0.0, start - half), min(float(room), start + half)
            pair = gates([low, high], steepness)
            share = (descent_end - objective.spent) / (steps - step + 1)
            taken = rows.take(affordable_rows(objective, pair, share))
            below, above = objective.measure(pair, taken, "Gate search").kl.mean(1).tolist()
            gradient = (above - below) / max(high - low, 1e-6)
            # Adam on one number: the step is in layers, whatever the scale of the KL
            momentum = 0.7 * momentum + 0.3 * gradient
            scale = 0.9 * scale + 0.1 * gradient**2
            corrected = (momentum / (1 - 0.7**step)) / (math.sqrt(scale / (1 - 0.9**step)) + 1e-12)
            rate = config.learning_rate * (1 - 0.9 * progress)
            trajectory.append(GateStep(step, start, steepness, (below + above) / 2, ((start, length),)))
            start = min(float(room), max(0.0, start - rate * corrected))
            bar.update(1)
    candidates = _candidates(
        allowed, start, sorted(coarse, key=lambda s: losses[coarse.index(s)]), config.num_rescored
    )
    chosen = successive_halving(problem.board, candidates, rows.all_from_here(), end - objective.spent)
    return SearchOutcome(chosen, tuple(trajectory))


def _candidates(allowed: Sequence[LayerSegment], start: float, ranked: Sequence[float], count: int) -> list[Cut]:
    """The integers next to where the descent ended, and the sweep's best places by the allowed start next to each."""
    nearest = sorted(allowed, key=lambda s: (abs(s.start - start), s))
    others = [min(allowed, key=lambda s: (abs(s.start - place), s)) for place in ranked]
    return [(s,) for s in list(dict.fromkeys([*nearest[:3], *others, *nearest]))[:count]]
