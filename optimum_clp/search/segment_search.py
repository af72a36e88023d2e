"""Which layers to cut: a given number of them, or as many as a quality budget lets go; by whatever strategy.

The objective is the token-mean `KL(dense || cut)` of the next-token distributions, all weights frozen.
"""

import math
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..architecture.lookup import allowed_segments, num_layers
from ..configuration.stages import SearchConfig
from ..doors import STRATEGIES
from ..errors import ModelError, SearchError
from ..forward.hooks import evaluation_mode
from ..forward.layer_major import Residence
from ..processes import is_first
from ..resume import Journal
from ..segments import LayerSegment
from .objective import Objective
from .problem import Rows, SearchOutcome, SearchProblem
from .result import SearchResult, TriedLength
from .scoreboard import Scoreboard


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
    residence: Residence | None = None,
    quiet: bool = False,
) -> SearchResult:
    """Find the layers whose removal changes the model's output least.

    In a group of processes (`torch.distributed`) the rows are dealt out; the result is the same as on one.

    Args:
        model (`PreTrainedModel`): The dense model; not changed.
        tokens (`Tensor`): int64 `[rows, length]`; the first `config.num_sequences` are used.
        num_removed (`int`): Layers to remove, in [1, L - 1].
        config ([`SearchConfig`]): Strategy and its settings.
        num_segments (`int`): Runs of layers they may be, at most.
        attention_mask (`Tensor`, *optional*): int64 `[rows, length]`, 0 where there is padding, which is measured by
            nothing; without it the rows are full.
        seed (`int`): Of everything random. The same seed gives the same result on the same machine.
        journal (`Path`, *optional*): File that keeps what was measured, so that an interrupted search, started again with
            the same arguments, goes on where it was. Whoever names it removes it.
        residence ([`Residence`], *optional*): For a model that memory does not hold, see [`Objective`]; the figures are the same.
        quiet (`bool`): No progress bar.

    Returns:
        [`SearchResult`]

    Raises:
        ModelError: If no cut of this length is exact.
        SearchError: If no cut has a finite score; or if there are too many for the strategy.
    """
    begin = time.perf_counter()
    _allowed(model, num_removed, num_segments)  # before any work: there may be none
    kept = _journal(journal)
    with evaluation_mode(model):
        objective = _objective(model, tokens, attention_mask, config, kept, residence, quiet)
        board, outcome = _search(objective, num_removed, num_segments, config, seed)
    return _result(board, outcome, config, num_removed, begin)


def search_within_budget(
    model: PreTrainedModel,
    tokens: Tensor,
    validation_tokens: Tensor,
    max_perplexity_increase: float,
    config: SearchConfig,
    *,
    num_segments: int = 1,
    seed: int = 0,
    journal: Path | None = None,
    residence: Residence | None = None,
    quiet: bool = False,
) -> SearchResult:
    """Find the most layers that can go for a quality budget, and which.

    Bisection over the number of layers: each number is searched by the strategy, and the perplexity of what it finds is
    compared with the dense model's on rows that the search does not see. More layers are taken to cost more; the
    numbers that were tried are in the result.

    Args:
        model (`PreTrainedModel`): The dense model; not changed.
        tokens (`Tensor`): int64 `[rows, length]`: searched on, the first `config.num_sequences`.
        validation_tokens (`Tensor`): int64 `[rows, length]`: the budget holds on these.
        max_perplexity_increase (`float`): Relative, above 0: 0.1 allows a tenth more than the dense model's perplexity.
        config, num_segments, seed, journal, residence, quiet: As in [`search_segments`].

    Returns:
        [`SearchResult`]: `forward_equivalents` counts all numbers that were tried, and the validation rows.

    Raises:
        ModelError: If no cut is exact.
        SearchError: If removing the fewest layers costs more than the budget.
    """
    begin = time.perf_counter()
    counts = [n for n in range(1, num_layers(model.config)) if _any_allowed(model, n, num_segments)]
    if not counts:
        _allowed(model, 1, num_segments)  # says why
    kept = _journal(journal)
    tried: dict[int, tuple[Scoreboard, SearchOutcome, TriedLength]] = {}
    with evaluation_mode(model):
        objective = _objective(model, tokens, None, config, kept, residence, quiet)
        options: dict[str, Any] = {"batch_size": config.batch_size, "residence": residence, "quiet": quiet}
        check = Objective(model, validation_tokens, journal=kept, name="validation", **options)
        low, high = -1, len(counts)  # indices that fit and that do not
        while high - low > 1:
            middle = (low + high) // 2
            board, outcome = _search(objective, counts[middle], num_segments, config, seed)
            increase = _perplexity_increase(check, outcome)
            fits = increase <= max_perplexity_increase
            tried[middle] = board, outcome, TriedLength(counts[middle], outcome.cut, increase, fits)
            low, high = (middle, high) if fits else (low, middle)
    lengths = tuple(tried[index][2] for index in sorted(tried))
    if low < 0:
        rule = f"removing {counts[0]} layer{'s' if counts[0] > 1 else ''} already costs {lengths[0].perplexity_increase:.3g}"
        raise SearchError.of(
            "max_perplexity_increase", max_perplexity_increase, rule, "Allow more, or give a pruning_ratio"
        )
    objective.spend(len(check.tokens) / len(objective.tokens), check.spent, check.layer_passes)
    board, outcome, _ = tried[low]
    return _result(board, outcome, config, counts[low], begin, lengths)


def _perplexity_increase(check: Objective, outcome: SearchOutcome) -> float:
    board = Scoreboard(check)
    board.measure([outcome.cut], range(len(check.tokens)), "Perplexity of the cut model")
    difference = board.mean(outcome.cut, board.loss) - board.mean_dense_loss(outcome.cut)
    return math.expm1(difference) if difference < 700 else math.inf


def _search(
    objective: Objective, num_removed: int, num_segments: int, config: SearchConfig, seed: int
) -> tuple[Scoreboard, SearchOutcome]:
    board, rows = Scoreboard(objective), Rows(len(objective.tokens), seed)
    allowed = tuple(_allowed(objective.model, num_removed, num_segments))
    problem = SearchProblem(objective, board, config, num_removed, num_segments, allowed, rows, seed)
    outcome = STRATEGIES.get(config.strategy)(problem)
    if outcome.cut not in board.kl:  # a strategy that goes by something else
        board.measure([outcome.cut], range(len(objective.tokens)), "Scoring the choice")
    if not math.isfinite(board.mean(outcome.cut)):
        raise SearchError.of(
            "search score",
            board.mean(outcome.cut),
            "the divergence from the dense model is not finite for any segment",
            "Check the model's weights, or load it with dtype='float32'",
        )
    return board, outcome


def _allowed(model: PreTrainedModel, num_removed: int, num_segments: int) -> list[LayerSegment]:
    """Single segments that can go; with several, that there is none of them says nothing yet."""
    try:
        return allowed_segments(model.config, num_removed)
    except ModelError:
        if num_segments == 1:
            raise
        return []


def _any_allowed(model: PreTrainedModel, num_removed: int, num_segments: int) -> bool:
    try:
        return bool(_allowed(model, num_removed, 1))
    except ModelError:
        return num_segments > 1


def _journal(file: Path | None) -> Journal:
    return Journal(file, writes=is_first())


def _objective(
    model: PreTrainedModel,
    tokens: Tensor,
    mask: Tensor | None,
    config: SearchConfig,
    journal: Journal,
    residence: Residence | None,
    quiet: bool,
) -> Objective:
    used = slice(0, config.num_sequences)
    return Objective(
        model,
        tokens[used],
        attention_mask=None if mask is None else mask[used],
        batch_size=config.batch_size,
        journal=journal,
        residence=residence,
        quiet=quiet,
    )


def _result(
    board: Scoreboard,
    outcome: SearchOutcome,
    config: SearchConfig,
    num_removed: int,
    begin: float,
    lengths: tuple[TriedLength, ...] = (),
) -> SearchResult:
    objective = board.objective
    values: dict[str, Any] = {
        "strategy": config.strategy,
        "used_strategy": outcome.used_strategy or config.strategy,
        "segments": outcome.cut,
        "score": board.mean(outcome.cut),
        "scored": board.scored(outcome.cut),
        "trajectory": outcome.trajectory,
        "layer_scores": outcome.layer_scores,
        "num_layers": objective.num_layers,
        "num_removed": num_removed,
        "num_tokens": int(objective.weights.sum()),
        "dense_loss": board.mean_dense_loss(outcome.cut),
        "forward_equivalents": objective.spent,
        "layer_passes": objective.layer_passes,
        "lengths": lengths,
    }
    return SearchResult(**values, seconds=time.perf_counter() - begin)
