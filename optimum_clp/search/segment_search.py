"""`search_segments`: which layers to cut, by whatever strategy.

The objective is the token-mean `KL(dense || cut)` of the next-token distributions, all weights frozen.
"""

import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from ..architecture import allowed_segments
from ..configuration import SearchConfig
from ..errors import Problem, SearchError
from ..gating import evaluation_mode
from .gate_descent import gate_search
from .journal import Journal
from .objective import Objective, gate_of
from .problem import Rows, SearchOutcome, SearchProblem, Strategy
from .races import exhaustive, successive_halving
from .result import SearchResult
from .scoreboard import Scoreboard


def exhaustive_search(problem: SearchProblem) -> SearchOutcome:
    """Every allowed segment on every row."""
    return SearchOutcome(exhaustive(problem.board, [(s,) for s in problem.allowed], problem.rows.all_from_here()))


def halving_search(problem: SearchProblem) -> SearchOutcome:
    """A race of all allowed segments, within `config.budget`."""
    cuts = [(s,) for s in problem.allowed]
    return SearchOutcome(
        successive_halving(problem.board, cuts, problem.rows.all_from_here(), problem.config.budget)
    )


STRATEGY_FUNCTIONS: dict[str, Strategy] = {
    "gate": gate_search,
    "exhaustive": exhaustive_search,
    "halving": halving_search,
}


def search_segments(
    model: PreTrainedModel,
    tokens: Tensor,
    num_removed: int,
    config: SearchConfig,
    *,
    num_segments: int = 1,
    attention_mask: Tensor | None = None,
    seed: int = 0,
    journal: Path | None = None,
    quiet: bool = False,
) -> SearchResult:
    """Find the layers whose removal changes the model's output least.

    In a group of processes (`torch.distributed`) the rows are dealt out; the result is the same as on one.

    Args:
        model (`PreTrainedModel`): The dense model; not changed, no gradient flows.
        tokens (`Tensor`): int64 `[rows, length]`.
        num_removed (`int`): Layers to remove, in [1, L - 1].
        config ([`SearchConfig`]): Strategy and its settings.
        num_segments (`int`): Runs of layers they may be, at most.
        attention_mask (`Tensor`, *optional*): int64 `[rows, length]`, 0 where there is padding, which is measured by
            nothing; without it the rows are full.
        seed (`int`): Of the minibatches. The same seed gives the same result on the same machine.
        journal (`Path`, *optional*): File that keeps what was measured until the search has ended, so that an
            interrupted search, started again with the same arguments, goes on where it was.
        quiet (`bool`): No progress bar.

    Returns:
        [`SearchResult`]

    Raises:
        ModelError: If no segment of this length can be cut exactly.
        SearchError: If no segment has a finite score.
    """
    begin = time.perf_counter()
    tokens = tokens[: config.num_sequences]
    mask = None if attention_mask is None else attention_mask[: config.num_sequences]
    allowed = allowed_segments(model.config, num_removed)  # before any work: there may be none
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    kept = Journal(journal, writes=first)
    with evaluation_mode(model):
        objective = Objective(
            model, tokens, attention_mask=mask, batch_size=config.batch_size, journal=kept, quiet=quiet
        )
        board, rows = Scoreboard(objective), Rows(len(tokens), seed)
        problem = SearchProblem(
            objective, board, config, num_removed, num_segments, tuple(allowed), rows, seed
        )
        outcome = STRATEGY_FUNCTIONS[config.strategy](problem)
        if outcome.cut not in board.kl:  # a strategy that ranks layers by other means
            board.measure([outcome.cut], rows.all_from_here(), "Scoring the choice")
    score = board.mean(outcome.cut)
    if not math.isfinite(score):
        raise SearchError(
            Problem(
                "search score",
                score,
                "the divergence from the dense model is not finite for any segment",
                "Check the model's weights, or load it with dtype='float32'",
            )
        )
    kept.close()
    return SearchResult(
        strategy=config.strategy,
        used_strategy=outcome.used_strategy or config.strategy,
        segments=outcome.cut,
        score=score,
        scored=board.scored(outcome.cut),
        trajectory=outcome.trajectory,
        layer_scores=outcome.layer_scores,
        num_layers=objective.num_layers,
        num_removed=num_removed,
        num_tokens=int(objective.weights.sum()),
        dense_loss=math.nan,
        forward_equivalents=objective.spent,
        layer_passes=objective.layer_passes,
        seconds=time.perf_counter() - begin,
    )
