"""The layer-selection rules of the field, as strategies.

They look at something other than the divergence that is to be small: at hidden states, at gradients, at perplexity, or
at nothing. Two kinds of them rank single layers (`block_influence`, `taylor`) or take one after the other
(`perplexity_greedy`, `random`), so the layers need not be neighbours, and `num_segments` does not bind them. Where
these layers cannot go together exactly, each falls back on a contiguous segment that can; on which is said there.
"""

import math
from collections.abc import Sequence

import torch

from ..architecture.lookup import allowed_segments
from ..segments import LayerSegment
from .hidden_changes import hidden_changes
from .problem import SearchOutcome, SearchProblem, cut_of
from .scoreboard import Cut, Scoreboard
from .weight_gradients import predicted, weights_by_gradients


def block_influence(problem: SearchProblem) -> SearchOutcome:
    """The layers that turn the hidden states least: `1 - E[cos(h_l, h_(l+1))]` (ShortGPT, arXiv 2403.03853).

    The mean is over all tokens of all rows. What leaves the last layer is taken before the final norm. Falls back on
    the segment of the smallest sum.
    """
    scores = hidden_changes(problem.objective, 1)["one_minus_cosine"]
    return SearchOutcome(_lowest(problem, scores), layer_scores=tuple(scores))


def angular(problem: SearchProblem) -> SearchOutcome:
    """The segment over which hidden states turn least: `E[arccos(cos(h_s, h_(s+n)))] / pi` (arXiv 2403.17887).

    The mean is over all tokens of all rows; the paper takes each sequence's last token only.
    """
    return _smallest_change(problem, "angle")


def cosine_block(problem: SearchProblem) -> SearchOutcome:
    """The segment of the largest `E[cos(h_s, h_(s+n))]`, over all tokens (LLM-Streamline, arXiv 2403.19135)."""
    return _smallest_change(problem, "one_minus_cosine")


def taylor(problem: SearchProblem) -> SearchOutcome:
    """The layers of the smallest `sum |w * dCE/dw|` (LLM-Pruner, arXiv 2305.11627; Shortened LLaMA, arXiv 2402.02834).

    CE is the dense model's next-token cross-entropy; see [`weights_by_gradients`]. Falls back on the segment of the smallest sum.

    Raises:
        ModelError: If the layers' weights have no gradients: quantized ones, or ones that are kept elsewhere.
    """
    scores = weights_by_gradients(problem.objective)
    return SearchOutcome(_lowest(problem, scores), layer_scores=tuple(scores))


def perplexity_greedy(problem: SearchProblem) -> SearchOutcome:
    """One layer after the other, each time the one without which the perplexity is lowest (SLEB, arXiv 2402.09025).

    Only layers that can go together with those already gone are tried. If there is none at some point, falls back on
    the segment of the lowest perplexity. The scoreboard gets the cuts of the wanted number of layers, not those on the
    way.
    """
    gone: list[int] = []
    while len(gone) < problem.num_removed:
        left = [i for i in range(problem.num_layers) if i not in gone and problem.can_go([*gone, i])]
        if not left:
            segments: list[Cut] = [(segment,) for segment in _allowed(problem)]
            return SearchOutcome(segments[_first_of_smallest(_losses(problem.board, segments))])
        board = problem.board if len(gone) == problem.num_removed - 1 else Scoreboard(problem.objective)
        losses = _losses(board, [cut_of([*gone, i], problem.num_layers) for i in left])
        gone.append(left[_first_of_smallest(losses)])
    return SearchOutcome(cut_of(gone, problem.num_layers))


def tail(problem: SearchProblem) -> SearchOutcome:
    """The last layers; where they cannot go, the last segment that can."""
    return SearchOutcome((max(_allowed(problem)),))


def random(problem: SearchProblem) -> SearchOutcome:
    """Layers drawn by the seed, any of them as likely as any other. Falls back on a segment drawn likewise."""
    generator = torch.Generator().manual_seed(problem.seed)
    layers = torch.randperm(problem.num_layers, generator=generator)[: problem.num_removed].tolist()
    if problem.can_go(layers):
        return SearchOutcome(cut_of(layers, problem.num_layers))
    allowed = _allowed(problem)
    return SearchOutcome((allowed[int(torch.randint(len(allowed), (), generator=generator))],))


def _allowed(problem: SearchProblem) -> Sequence[LayerSegment]:
    """The segments that can go, at least one.

    Raises:
        ModelError: If there is none.
    """
    return problem.allowed or allowed_segments(problem.objective.model.config, problem.num_removed)


def _smallest_change(problem: SearchProblem, name: str) -> SearchOutcome:
    allowed = _allowed(problem)
    changes = hidden_changes(problem.objective, problem.num_removed)[name]
    return SearchOutcome((allowed[_first_of_smallest([changes[segment.start] for segment in allowed])],))


def _lowest(problem: SearchProblem, scores: Sequence[float]) -> Cut:
    """The layers of the smallest scores; if they cannot go, the segment that can and has the smallest sum."""
    ranked = sorted(range(problem.num_layers), key=lambda i: (_finite(scores[i]), i))
    layers = ranked[: problem.num_removed]
    if problem.can_go(layers):
        return cut_of(layers, problem.num_layers)
    allowed = _allowed(problem)
    return (allowed[_first_of_smallest([math.fsum(scores[s.start : s.stop]) for s in allowed])],)


def _first_of_smallest(values: Sequence[float]) -> int:
    return min(range(len(values)), key=lambda i: (_finite(values[i]), i))


def _finite(value: float) -> float:
    """For comparisons: what is not finite comes last."""
    return value if math.isfinite(value) else math.inf


def _losses(board: Scoreboard, cuts: Sequence[Cut]) -> list[float]:
    """Cross-entropy without each cut's layers: mean over all predicted tokens."""
    board.measure(cuts, range(len(board.objective.tokens)), f"Perplexity of {len(cuts)} cuts")
    weights = predicted(board.objective).sum(1).double()
    return [((board.loss[cut] * weights).sum() / weights.sum()).item() for cut in cuts]
