"""The layer-selection rules of the field, as strategies.

They look at something other than the divergence that is to be small: at hidden states, at gradients, at perplexity, or
at nothing. Two kinds of them rank single layers (`block_influence`, `taylor`) or take one after the other
(`perplexity_greedy`, `random`), so the layers need not be neighbours, and `num_segments` does not bind them. Where
these layers cannot go together exactly, each falls back on a contiguous segment that can; on which is said there.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..architecture.lookup import allowed_segments
from ..errors import ModelError
from ..forward.hooks import BeforeForward, hooked, layer_hidden, layer_input, run_without_head
from ..forward.losses import next_token_cross_entropy
from ..segments import LayerSegment
from .objective import Objective
from .problem import SearchOutcome, SearchProblem, cut_of
from .scoreboard import Cut, Scoreboard

_PIECE = 2**24  # weights whose float32 products exist at one time


def block_influence(problem: SearchProblem) -> SearchOutcome:
    """The layers that turn the hidden states least: `1 - E[cos(h_l, h_(l+1))]` (ShortGPT, arXiv 2403.03853).

    The mean is over all tokens of all rows. What leaves the last layer is taken before the final norm. Falls back on
    the segment of the smallest sum.
    """
    scores = _hidden_changes(problem, 1)["one_minus_cosine"]
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

    CE is the dense model's next-token cross-entropy. The absolute value is taken row by row, so that scores do not
    depend on the batch size; a row's weight is its number of predicted tokens. A gradient is dropped as soon as it is
    used: in memory are one row's activations and the gradient of one parameter at a time. Falls back on the segment of
    the smallest sum.

    Raises:
        ModelError: If the layers' weights have no gradients: quantized ones, or ones that are kept elsewhere.
    """
    objective = problem.objective
    model, count = objective.model, problem.num_layers
    with _weights_by_gradients(model, objective.stack.layers) as sums:

        def figures(batch: list[int]) -> list[float]:
            sums[:] = [0.0] * count
            with torch.enable_grad():
                _loss_of(objective, batch).backward()
            return list(sums)

        parts = objective.over_rows(["taylor"], range(len(objective.tokens)), 1, figures, "Gradients")
    objective.spend(1, 3, 3 * count)  # a backward pass is counted as two forwards
    total = _predicted(objective).sum().item()
    scores = [math.fsum(part[index] for part in parts) / total for index in range(count)]
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
    changes = _hidden_changes(problem, problem.num_removed)[name]
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


def _hidden_changes(problem: SearchProblem, length: int) -> dict[str, list[float]]:
    """How much `length` layers turn the hidden states, by the first of them: token means over all rows.

    Returns:
        `dict[str, list[float]]`: `"one_minus_cosine"` in [0, 2], and `"angle"` in half-turns, [0, 1].
    """
    objective = problem.objective
    layers = objective.stack.layers
    places = len(layers) - length + 1

    def figures(batch: list[int]) -> dict[str, list[float]]:
        ids = objective.tokens[batch]
        mask = None if objective.mask is None else objective.mask[batch]
        kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        sums = {"one_minus_cosine": [0.0] * places, "angle": [0.0] * places}

        def compare(start: int, before: Tensor, after: Tensor) -> None:
            # by the distance d of the unit vectors: 1 - cos = d^2 / 2 and angle = 2 arcsin(d / 2) keep their digits
            # where the cosine is nearly 1
            unit = F.normalize(after.float(), dim=-1)
            distance = (unit - F.normalize(before.to(after.device).float(), dim=-1)).norm(dim=-1)
            distance = distance.cpu()[kept].double()
            sums["one_minus_cosine"][start] = (distance.square() / 2).sum().item()
            sums["angle"][start] = (2 / math.pi * (distance / 2).clamp(max=1).asin()).sum().item()

        with torch.no_grad(), _compared(layers, length, compare):
            run_without_head(objective.model, ids, mask)
        return sums

    # the states of `length` layers wait for what they are compared with
    size = max(1, objective.batch_size // length)
    parts = objective.over_rows(
        ["hidden_states", length], range(len(objective.tokens)), size, figures, "Hidden states"
    )
    objective.spend(1, objective.work.of(range(len(layers)), head=False), len(layers))
    tokens = objective.weights.sum().item()
    return {
        name: [math.fsum(part[name][start] for part in parts) / tokens for start in range(places)]
        for name in ("one_minus_cosine", "angle")
    }


@contextmanager
def _compared(layers: nn.ModuleList, length: int, compare: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `compare(start, before, after)` for every run of `length` layers that a forward pass goes through.

    `before` enters its first layer, `after` leaves its last one. No more states are held than wait to be compared.
    """
    waiting: dict[int, Tensor] = {}

    def arrived(index: int, hidden: Tensor) -> None:
        before = waiting.pop(index - length, None)
        if before is not None:
            compare(index - length, before, hidden)
        waiting[index] = hidden

    def entering(index: int) -> BeforeForward:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            arrived(index, layer_input(args, kwargs))

        return hook

    def last(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        arrived(len(layers), layer_hidden(output))

    with hooked([(layer, entering(index)) for index, layer in enumerate(layers)], [(layers[-1], last)]):
        yield


@contextmanager
def _weights_by_gradients(model: PreTrainedModel, layers: nn.ModuleList) -> Iterator[list[float]]:
    """Every backward pass of the block adds `sum |w * dw|` to the number of each layer; no gradient is kept.

    Only the layers' parameters require gradients. What required them before, and the gradients that there were, are put
    back. A parameter that several layers share counts for each of them.

    Raises:
        ModelError: If a layer's weights have no gradients.
    """
    owners: dict[Tensor, list[int]] = {}
    for index, layer in enumerate(layers):
        for parameter in layer.parameters():
            owners.setdefault(parameter, []).append(index)
    _check_gradients(model, list(owners))
    sums = [0.0] * len(layers)

    def add(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        pieces = zip(parameter.detach().flatten().split(_PIECE), gradient.flatten().split(_PIECE), strict=True)
        total = math.fsum((weight.float() * slope.float()).abs().sum().item() for weight, slope in pieces)
        for index in owners[parameter]:
            sums[index] += total

    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    with ExitStack() as stack:
        stack.callback(_put_back, before)
        for parameter, _, _ in before:
            parameter.requires_grad_(parameter in owners)
            parameter.grad = None
        for owned in owners:
            stack.callback(owned.register_post_accumulate_grad_hook(add).remove)
        yield sums


def _put_back(before: Sequence[tuple[nn.Parameter, bool, Tensor | None]]) -> None:
    for parameter, required, gradient in before:
        parameter.requires_grad_(required)
        parameter.grad = gradient


def _check_gradients(model: PreTrainedModel, parameters: Sequence[Tensor]) -> None:
    if getattr(model, "is_quantized", False) or not all(p.is_floating_point() for p in parameters):
        rule = "its weights are quantized, and integers have no gradients"
    elif any(p.is_meta for p in parameters):
        rule = "some of its weights are not in memory (offloaded), and get no gradients there"
    else:
        return
    remedy = "Give the dense model, loaded whole, or use a strategy without gradients, such as block_influence"
    raise ModelError.of("model", type(model).__name__, rule, remedy)


def _loss_of(objective: Objective, batch: list[int]) -> Tensor:
    """Summed next-token cross-entropy of some rows, with a graph."""
    model = objective.model
    ids = objective.tokens[batch].to(model.device)
    options: dict[str, Any] = (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )
    if objective.mask is not None:
        options["attention_mask"] = objective.mask[batch].to(model.device)
    losses = next_token_cross_entropy(model(input_ids=ids, **options).logits, ids)
    return losses[_predicted(objective)[batch].to(losses.device)].sum()


def _predicted(objective: Objective) -> Tensor:
    """Which tokens after the first are predicted: bool `[rows, length - 1]`; none that is padding or follows it."""
    if objective.mask is None:
        return torch.ones_like(objective.tokens[:, 1:], dtype=torch.bool)
    return (objective.mask[:, 1:] * objective.mask[:, :-1]).bool()


def _losses(board: Scoreboard, cuts: Sequence[Cut]) -> list[float]:
    """Cross-entropy without each cut's layers: mean over all predicted tokens."""
    board.measure(cuts, range(len(board.objective.tokens)), f"Perplexity of {len(cuts)} cuts")
    weights = _predicted(board.objective).sum(1).double()
    return [((board.loss[cut] * weights).sum() / weights.sum()).item() for cut in cuts]
