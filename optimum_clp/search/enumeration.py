"""Strategies that look at every cut: all of it on all rows, or a race."""

import math
from collections.abc import Iterator

from ..errors import SearchError
from ..segments import LayerSegment
from .problem import SearchOutcome, SearchProblem
from .races import exhaustive
from .repaired_race import every_one_repaired, race
from .scoreboard import Cut

MOST_CUTS = 20_000


def exhaustive_search(problem: SearchProblem) -> SearchOutcome:
    """Every allowed cut on every row: the oracle. With a repair, every one repaired, on the rows that it is not solved on."""
    if problem.config.repair != "none":
        return SearchOutcome(every_one_repaired(problem, every_cut(problem)))
    return SearchOutcome(exhaustive(problem.board, every_cut(problem), range(len(problem.objective.tokens))))


def halving_search(problem: SearchProblem) -> SearchOutcome:
    """A race of all allowed cuts, within the budget."""
    return SearchOutcome(race(problem, every_cut(problem), problem.budget))


def every_cut(problem: SearchProblem) -> list[Cut]:
    """All cuts of at most `num_segments` segments that are exact, the single segments first.

    Raises:
        SearchError: If there are more than can be looked at, or none.
    """
    cuts: list[Cut] = [(segment,) for segment in problem.allowed]
    if problem.num_segments > 1:
        count = number_of_cuts(problem.num_layers, problem.num_removed, problem.num_segments)
        if count > MOST_CUTS:
            raise SearchError.of(
                "num_segments",
                problem.num_segments,
                f"there are {count:,} ways to remove {problem.num_removed} of {problem.num_layers} layers in so many "
                f"segments, and strategy {problem.config.strategy!r} looks at each of at most {MOST_CUTS:,}",
                "Use search.strategy='gate', or fewer segments",
            )
        for several in range(2, problem.num_segments + 1):
            cuts += filter(problem.is_allowed, _cuts(0, problem.num_layers, problem.num_removed, several))
    if not cuts:
        raise problem.no_cut()
    return cuts


def number_of_cuts(num_layers: int, num_removed: int, num_segments: int) -> int:
    """How many cuts of at most so many segments there are.

    With `j` segments: the layers are parted into `j` lengths, and `j` of the `L - n + 1` places between, before and
    after the layers that stay are chosen for them.
    """
    return sum(
        math.comb(num_removed - 1, j - 1) * math.comb(num_layers - num_removed + 1, j)
        for j in range(1, num_segments + 1)
    )


def _cuts(first: int, num_layers: int, num_removed: int, num_segments: int) -> Iterator[Cut]:
    """Cuts of exactly so many segments that begin at layer `first` or later, with a layer between any two."""
    if num_segments == 0:
        yield ()
        return
    shortest = [num_removed] if num_segments == 1 else range(1, num_removed - num_segments + 2)
    for length in shortest:
        rest = num_removed - length
        for start in range(first, num_layers - num_removed - (num_segments - 1) + 1):
            for others in _cuts(start + length + 1, num_layers, rest, num_segments - 1):
                yield (LayerSegment(start, start + length), *others)
