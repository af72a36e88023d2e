"""What the tests of the search share: settings, and one problem for a strategy."""

from optimum_clp.architecture.lookup import allowed_segments
from optimum_clp.configuration.stages import SearchConfig
from optimum_clp.search.objective import Objective
from optimum_clp.search.problem import Rows, SearchProblem
from optimum_clp.search.scoreboard import Scoreboard


def settings(strategy="gate", **overrides):
    return SearchConfig(**{"strategy": strategy, "num_sequences": 8, "batch_size": 4, **overrides})


def problem_of(model, tokens, num_removed, *, num_segments=1, seed=0, mask=None, config=None, allowed=None):
    """A [`SearchProblem`] as `search_segments` makes it."""
    config = config or settings()
    objective = Objective(model, tokens, attention_mask=mask, batch_size=config.batch_size, quiet=True)
    if allowed is None:
        allowed = allowed_segments(model.config, num_removed)
    rows = Rows(len(tokens), seed)
    return SearchProblem(
        objective, Scoreboard(objective), config, num_removed, num_segments, tuple(allowed), rows, seed
    )
