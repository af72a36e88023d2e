"""Which segment to cut: the gate, and exhaustive search as its control, on the same objective and the same tokens.

The objective is the token-mean `KL(dense || cut)` of the next-token distributions, all weights frozen.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architecture import allowed_segments
from .configuration import SearchConfig
from .errors import Problem, SearchError
from .gate import concave_gate
from .gating import gated, recorded_inputs, run_without_head, stopped_before
from .losses import kl_divergence
from .progress import progress_bar
from .segments import LayerSegment
from .teacher import DenseOutputs


@dataclass(frozen=True)
class ScoredSegment:
    """An integer segment and its objective.

    Args:
        segment ([`LayerSegment`]): The layers that are skipped.
        kl (`float`): Token-mean `KL(dense || cut)` in nats.
        standard_error (`float`): Of that mean, over the rows.
    """

    segment: LayerSegment
    kl: float
    standard_error: float

    def to_dict(self) -> dict[str, Any]:
        """Flat, JSON-ready."""
        return {
            "start": self.segment.start,
            "stop": self.segment.stop,
            "kl": self.kl,
            "standard_error": self.standard_error,
        }


@dataclass(frozen=True)
class GateStep:
    """One point of the gate's way: its start (in layers) and steepness, and the minibatch objective there."""

    step: int
    start: float
    steepness: float
    loss: float


@dataclass(frozen=True)
class SearchResult:
    """What a search found, and what it saw on the way.

    Args:
        strategy (`str`): `"gate"` or `"exhaustive"`.
        segments (`tuple[LayerSegment, ...]`): The choice.
        score (`float`): Its objective over all search rows.
        scored (`tuple[ScoredSegment, ...]`): Every integer segment that was scored, by start.
        trajectory (`tuple[GateStep, ...]`): The gate's way; empty for exhaustive search.
        num_layers (`int`): Layers of the dense model.
        num_removed (`int`): Layers that go.
        num_tokens (`int`): Tokens of the search rows.
        layer_passes (`float`): Work done, in decoder-layer passes over all search rows, the dense pass included.
        seconds (`float`): Wall-clock time.
    """

    strategy: str
    segments: tuple[LayerSegment, ...]
    score: float
    scored: tuple[ScoredSegment, ...]
    trajectory: tuple[GateStep, ...]
    num_layers: int
    num_removed: int
    num_tokens: int
    layer_passes: float
    seconds: float = field(compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The `search` section of the report."""
        return {
            "strategy": self.strategy,
            "segments": [s.to_list() for s in self.segments],
            "score": self.score,
            "scored": [s.to_dict() for s in self.scored],
            "trajectory": [asdict(t) for t in self.trajectory],
            "num_layers": self.num_layers,
            "num_removed": self.num_removed,
            "num_tokens": self.num_tokens,
            "layer_passes": self.layer_passes,
            "seconds": self.seconds,
        }


def search_segment(
    model: PreTrainedModel,
    tokens: Tensor,
    num_removed: int,
    config: SearchConfig,
    *,
    seed: int = 0,
    quiet: bool = False,
) -> SearchResult:
    """Find the contiguous segment whose removal changes the model's output least.

    Args:
        model (`PreTrainedModel`): The dense model; not changed, no gradient flows.
        tokens (`Tensor`): int64 `[rows, length]`, full rows.
        num_removed (`int`): Layers to remove, in [1, L - 1].
        config ([`SearchConfig`]): Strategy and its settings.
        seed (`int`): Of the minibatches. The same seed gives the same result on the same machine.
        quiet (`bool`): No progress bar.

    Returns:
        [`SearchResult`]

    Raises:
        ModelError: If no segment of this length can be cut exactly.
        SearchError: If no segment has a finite score.
    """
    begin = time.perf_counter()
    tokens = tokens[: config.num_sequences]
    allowed = allowed_segments(model.config, num_removed)  # before any work: there may be none
    objective = _Objective(model, tokens, config.batch_size, quiet)
    strategies: dict[str, Callable] = {"gate": _gate_search, "exhaustive": _exhaustive_search}
    with torch.no_grad():
        scored, trajectory = strategies[config.strategy](objective, allowed, config, seed)
    finite = [s for s in scored if math.isfinite(s.kl)]
    if not finite:
        raise SearchError(
            Problem(
                "search score",
                scored[0].kl,
                "the divergence from the dense model is not finite for any segment",
                "Check the model's weights, or load it with dtype='float32'",
            )
        )
    best = min(finite, key=lambda s: (s.kl, s.segment))
    return SearchResult(
        strategy=config.strategy,
        segments=(best.segment,),
        score=best.kl,
        scored=tuple(sorted(scored, key=lambda s: s.segment)),
        trajectory=tuple(trajectory),
        num_layers=len(objective.layers),
        num_removed=num_removed,
        num_tokens=tokens.numel(),
        layer_passes=objective.layer_passes,
        seconds=time.perf_counter() - begin,
    )


class _Objective:
    """KL to the dense model, for gates and for integer segments; counts the layers that were computed."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor, batch_size: int, quiet: bool):
        self.model = model
        self.tokens = tokens
        self.batch_size = batch_size
        self.quiet = quiet
        self.dense = DenseOutputs(model, tokens, batch_size=batch_size, quiet=quiet)
        self.stack = self.dense.stack
        self.layers: nn.ModuleList = self.stack.layers
        self.layer_passes = float(len(self.layers))

    def row_kl(self, rows: Tensor | slice, dense_logits: Tensor) -> Tensor:
        """Mean KL of each row, float64 `[batch]` on the CPU, under whatever gate is in place."""
        batch = self.tokens[rows].to(self.model.device)
        logits = self.model(input_ids=batch, use_cache=False).logits
        return kl_divergence(dense_logits, logits).double().mean(-1).cpu()

    def gate_loss(self, starts: Sequence[float], length: int, steepness: float, rows: Tensor) -> list[float]:
        """Mean KL under the gate at several starts, on the same rows."""
        dense = self.dense.logits(rows)
        losses = []
        for start in starts:
            with gated(self.layers, concave_gate(start, length, len(self.layers), steepness)):
                losses.append(self.row_kl(rows, dense).mean().item())
        self.layer_passes += len(starts) * len(self.layers) * len(rows) / len(self.tokens)
        return losses

    def score(self, segments: Sequence[LayerSegment]) -> list[ScoredSegment]:
        """KL of integer segments over all rows. Each layer before a segment is run once for all of them."""
        found: dict[LayerSegment, list[Tensor]] = {s: [] for s in segments}
        starts = sorted({s.start for s in segments})
        with progress_bar(len(self.tokens) * len(segments), "Scoring segments", self.quiet) as bar:
            for first in range(0, len(self.tokens), self.batch_size):
                rows = slice(first, first + self.batch_size)
                dense = self.dense.logits(rows)
                inputs = self._inputs_of(starts, rows)
                for segment in segments:
                    with self.stack.resumed(segment.stop, inputs[segment.start]):
                        found[segment].append(self.row_kl(rows, dense))
                    bar.update(len(dense))
        self.layer_passes += starts[-1] + sum(len(self.layers) - s.stop for s in segments)
        return [_scored(segment, torch.cat(parts)) for segment, parts in found.items()]

    def _inputs_of(self, starts: Sequence[int], rows: slice) -> dict[int, Tensor]:
        """Hidden states that enter the layers `starts`; the layers after the last of them are not run."""
        with recorded_inputs(self.layers, starts) as found, stopped_before(self.layers[starts[-1]]):
            run_without_head(self.model, self.tokens[rows])
        return dict(found)


def _scored(segment: LayerSegment, rows: Tensor) -> ScoredSegment:
    error = (rows.std() / len(rows) ** 0.5).item() if len(rows) > 1 else math.nan
    return ScoredSegment(segment, rows.mean().item(), error)


def _exhaustive_search(objective: _Objective, allowed: list[LayerSegment], config: SearchConfig, seed: int):
    return objective.score(allowed), []


def _gate_search(objective: _Objective, allowed: list[LayerSegment], config: SearchConfig, seed: int):
    """Gradient descent on the gate's start while it gets steeper, then the exact score of the nearest integers.

    The gate has one parameter, so its derivative is taken as a central difference: two forward passes, no activations
    kept (a backward pass through the frozen layers costs about two forwards as well, and all activations). Both ends see
    the same rows, so their noise cancels in the difference.
    """
    length, starts = len(allowed[0]), [segment.start for segment in allowed]
    room = len(objective.layers) - length
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(objective.tokens), generator=generator)
    per_step = max(1, len(order) // 16)
    cursor = 0

    def next_rows(count: int) -> Tensor:
        nonlocal cursor
        positions = torch.arange(cursor, cursor + count) % len(order)
        cursor = (cursor + count) % len(order)
        return order[positions]

    # gradient descent stays in the valley it starts in, so one look along the whole stack, at steps of half a segment,
    # chooses the valley; its runners-up get an exact score at the end
    count = min(room + 1, max(5, math.ceil(2 * room / length) + 1))
    coarse = torch.linspace(0, room, count).tolist() if count > 1 else [0.0]
    initial, final = config.initial_steepness / length, config.final_steepness / length
    losses = objective.gate_loss(coarse, length, initial, next_rows(2 * per_step))
    ranked = sorted(coarse, key=lambda s: losses[coarse.index(s)])
    start = ranked[0]
    trajectory = [GateStep(0, s, initial, loss) for s, loss in zip(coarse, losses, strict=True)]
    momentum = scale = 0.0
    with progress_bar(config.steps, "Gate search", objective.quiet) as bar:
        for step in range(1, config.steps + 1):
            progress = (step - 1) / max(1, config.steps - 1)
            steepness = initial * (final / initial) ** progress
            half = 0.5 / max(1.0, steepness)  # a steep gate changes within less than a layer
            low, high = max(0.0, start - half), min(float(room), start + half)
            below, above = objective.gate_loss([low, high], length, steepness, next_rows(per_step))
            gradient = (above - below) / max(high - low, 1e-6)
            # Adam on one number: the step is in layers, whatever the scale of the KL
            momentum = 0.7 * momentum + 0.3 * gradient
            scale = 0.9 * scale + 0.1 * gradient**2
            corrected = (momentum / (1 - 0.7**step)) / (math.sqrt(scale / (1 - 0.9**step)) + 1e-12)
            rate = config.learning_rate * (1 - 0.9 * progress)
            trajectory.append(GateStep(step, start, steepness, (below + above) / 2))
            start = min(float(room), max(0.0, start - rate * corrected))
            bar.update(1)
    nearest = sorted(starts, key=lambda s: (abs(s - start), s))
    ranked = [
        min(starts, key=lambda s: (abs(s - r), s)) for r in ranked
    ]  # each valley by the allowed start next to it
    candidates = list(dict.fromkeys([*nearest[:3], *ranked, *nearest]))[: config.num_rescored]
    return objective.score([LayerSegment(s, s + length) for s in sorted(candidates)]), trajectory
