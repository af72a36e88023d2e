"""Ways to find the best of given cuts: all of them on all rows, or fewer and fewer of them on more and more rows."""

import math
from collections.abc import Sequence

from .objective import Gate, Objective, gate_of
from .scoreboard import Cut, Scoreboard

FINALISTS = 2
_SURE = 3.09  # quantile of the normal distribution at 0.999
_ROWS_TO_BE_SURE = 4


def exhaustive(board: Scoreboard, cuts: Sequence[Cut], rows: Sequence[int]) -> Cut:
    """Measure every cut on every row: the oracle of the objective.

    The dense model's hidden states at every start are computed once, and each cut runs only what lies above it. With
    the head as `h` layers, all `L - n + 1` segments of `n` of `L` layers cost
    `1 + [(L - n)(L - n + 1) / 2 + (L - n + 1) h] / (L + h)` forward-equivalents.
    """
    board.measure(cuts, rows, "Scoring segments")
    return board.best(cuts)


def successive_halving(board: Scoreboard, cuts: Sequence[Cut], rows: Sequence[int], budget: float) -> Cut:
    """Race cuts: after each round the better half goes on, to rows that nobody has seen.

    The rounds cost the same, so that few cuts are measured on many rows. A cut that is surely behind (one-sided t-test at 0.001)
    goes at once. What it has seen on all rounds counts for each cut. (Karnin et al. 2013, Jamieson and Talwalkar 2016;
    here with the rows as the resource.)

    Args:
        board ([`Scoreboard`]): Gets all figures.
        cuts (`Sequence[Cut]`): At least one.
        rows (`Sequence[int]`): In the order in which they are used.
        budget (`float`): In forward-equivalents. One row is used whatever it costs.

    Returns:
        `Cut`: The best of those that came to the last round.
    """
    objective, left = board.objective, list(rows)
    alive = list(cuts)
    end = objective.spent + budget
    while left:
        rounds = max(1, math.ceil(math.log2(len(alive) / FINALISTS)) + 1) if len(alive) > 1 else 1
        price = 1 + sum(map(objective.price_of, alive))
        one_row = price / len(objective.tokens)
        affordable = int((end - objective.spent) / one_row + 1e-9)
        if affordable <= 0 and board.kl.keys() >= set(alive):
            break
        count = min(len(left), max(1, affordable // rounds))
        board.measure(alive, left[:count], f"Scoring {len(alive)} segments")
        left = left[count:]
        if rounds == 1:
            break
        alive = _better_half(board, alive)
        if len(alive) == 1:
            break  # sure enough
    return board.best(alive)


def best_few(board: Scoreboard, cuts: Sequence[Cut], rows: Sequence[int], budget: float, count: int) -> list[Cut]:
    """The cuts of the smallest KL over the first of some rows: as many rows as the budget pays for, at least one.

    Args:
        board ([`Scoreboard`]): Gets all figures.
        cuts (`Sequence[Cut]`): At least one.
        rows (`Sequence[int]`): In the order in which they are used.
        budget (`float`): In forward-equivalents.
        count (`int`): How many are wanted.

    Returns:
        `list[Cut]`: The best first; those without a finite KL are left out.
    """
    gates = [gate_of(cut, board.objective.num_layers) for cut in cuts]
    taken = rows[: affordable_rows(board.objective, gates, budget)]
    board.measure(cuts, taken, f"Scoring {len(cuts)} segments")
    ranked = sorted(cuts, key=lambda cut: (_finite(board.mean(cut)), cut))
    return [cut for cut in ranked[:count] if math.isfinite(board.mean(cut))]


def _better_half(board: Scoreboard, alive: list[Cut]) -> list[Cut]:
    ranked = sorted(alive, key=lambda cut: (_finite(board.mean(cut)), cut))
    kept = ranked[: max(FINALISTS, math.ceil(len(ranked) / 2))]
    count = int(board.rows_of(kept[0]).sum())
    if count < _ROWS_TO_BE_SURE:
        return kept
    return [kept[0], *(cut for cut in kept[1:] if not _surely_behind(*board.behind(cut, kept[0]), count))]


def _surely_behind(behind: float, error: float, count: int) -> bool:
    """Student's quantile instead of the normal one, by its expansion in 1 / degrees of freedom (Fisher, Cornish 1960)."""
    z, freedom = _SURE, count - 1
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return behind > (z + first / freedom + second / freedom**2) * error


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def affordable_rows(objective: Objective, gates: Sequence[Gate], budget: float) -> int:
    """How many rows some gates can be measured on for a budget in forward-equivalents; at least 1."""
    price = 1 + sum(map(objective.price, gates))
    return max(1, int(min(len(objective.tokens), budget / price * len(objective.tokens) + 1e-9)))
