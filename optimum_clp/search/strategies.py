"""Strategies that leave the search to others: by the model's depth, or by the number of segments."""

from ..doors import STRATEGIES
from .gate_descent import gate_search
from .problem import SearchOutcome, SearchProblem
from .several import several_gates_search


def auto_search(problem: SearchProblem) -> SearchOutcome:
    """The strategy that was best in our measurements (`docs/search.md`).

    One segment: every candidate on every row where the budget pays for that, else a race of all candidates. Several
    segments: their gates, since there are too many cuts to race.
    """
    objective = problem.objective
    if problem.num_segments > 1:
        name = "gate"
    elif (
        problem.config.repair == "none"
        and 1 + sum(objective.price_of([segment]) for segment in problem.allowed) <= problem.budget
    ):
        name = "exhaustive"
    else:
        name = "halving"
    outcome = STRATEGIES.get(name)(problem)
    return SearchOutcome(outcome.cut, outcome.trajectory, outcome.layer_scores, name)


def by_gate(problem: SearchProblem) -> SearchOutcome:
    """Descent on the concave gate's position, or on those of several gates."""
    return (gate_search if problem.num_segments == 1 else several_gates_search)(problem)
