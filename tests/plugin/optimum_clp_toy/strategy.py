"""A strategy."""

from optimum_clp.search.problem import SearchOutcome, SearchProblem


def first_that_can_go(problem: SearchProblem) -> SearchOutcome:
    """The first segment that can go."""
    return SearchOutcome((min(problem.allowed),))
