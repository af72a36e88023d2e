"""What a search found, and what it saw on the way."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ..segments import LayerSegment


@dataclass(frozen=True)
class ScoredCut:
    """A cut that was measured: one or several segments, and what their removal does to the output.

    Args:
        segments (`tuple[LayerSegment, ...]`): The layers that are skipped.
        kl (`float`): Token-mean `KL(dense || cut)` in nats, over the rows it was measured on.
        standard_error (`float`): Of that mean, over the rows.
        loss (`float`): Mean cross-entropy of the cut model over the same rows, in nats per token.
        num_rows (`int`): Rows it was measured on; races measure only the promising ones on all of them.
        behind (`float`): How much greater its KL is than the chosen one's, on the rows that both were measured on;
            0 for the chosen one.
        behind_error (`float`): Standard error of `behind`, over the rows.
    """

    segments: tuple[LayerSegment, ...]
    kl: float
    standard_error: float
    loss: float
    num_rows: int
    behind: float = 0.0
    behind_error: float = 0.0

    @property
    def segment(self) -> LayerSegment:
        """The only segment.

        Raises:
            ValueError: If there are several.
        """
        (only,) = self.segments
        return only

    def to_dict(self) -> dict[str, Any]:
        """Flat, JSON-ready; `start` and `stop` are the outer bounds."""
        return {
            "start": self.segments[0].start,
            "stop": self.segments[-1].stop,
            "segments": [s.to_list() for s in self.segments],
            "kl": self.kl,
            "standard_error": self.standard_error,
            "loss": self.loss,
            "num_rows": self.num_rows,
            "behind": self.behind,
            "behind_error": self.behind_error,
        }


@dataclass(frozen=True)
class GateStep:
    """One look at the gate on its way.

    Args:
        step (`int`): 0 for the sweep along the stack, then counted up.
        start (`float`): Where the valley starts, in layers; of the first valley, if there are several.
        steepness (`float`): Per layer.
        loss (`float`): Mean KL under this gate, over the step's rows.
        valleys (`tuple[tuple[float, float], ...]`): Start and length of each valley.
    """

    step: int
    start: float
    steepness: float
    loss: float
    valleys: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class TriedLength:
    """A number of layers that was tried against a quality budget.

    Args:
        num_removed (`int`): Layers that go.
        segments (`tuple[LayerSegment, ...]`): The best of them that the search found.
        perplexity_increase (`float`): Relative, on the validation rows: 0.1 is a tenth above the dense model's.
        fits (`bool`): Whether that is within the budget.
    """

    num_removed: int
    segments: tuple[LayerSegment, ...]
    perplexity_increase: float
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**vars(self), "segments": [s.to_list() for s in self.segments]}


@dataclass(frozen=True)
class SearchResult:
    """What a search found, and what it saw on the way.

    Args:
        strategy (`str`): What was asked for: `"auto"`, `"gate"`, ...
        used_strategy (`str`): What was run; another than `strategy` only for `"auto"`.
        segments (`tuple[LayerSegment, ...]`): The choice.
        score (`float`): Its KL to the dense model, over the rows it was measured on.
        scored (`tuple[ScoredCut, ...]`): Every cut that was measured, by place.
        trajectory (`tuple[GateStep, ...]`): The gate's way; empty for strategies without a gate.
        layer_scores (`tuple[float, ...]`): Importance of each layer by a strategy that ranks layers; else empty.
        num_layers (`int`): Layers of the dense model.
        num_removed (`int`): Layers that go.
        num_tokens (`int`): Tokens of the search rows.
        dense_loss (`float`): Cross-entropy of the dense model over the rows of `score`, in nats per token.
        forward_equivalents (`float`): Work done, in dense forward passes over all search rows, head included.
        layer_passes (`float`): Work done in the layers alone, in decoder-layer passes over all search rows.
        seconds (`float`): Wall-clock time.
        lengths (`tuple[TriedLength, ...]`): For a quality budget: the numbers of layers that were tried.
    """

    strategy: str
    used_strategy: str
    segments: tuple[LayerSegment, ...]
    score: float
    scored: tuple[ScoredCut, ...]
    trajectory: tuple[GateStep, ...]
    layer_scores: tuple[float, ...]
    num_layers: int
    num_removed: int
    num_tokens: int
    dense_loss: float
    forward_equivalents: float
    layer_passes: float
    seconds: float = field(compare=False)
    lengths: tuple[TriedLength, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The `search` section of the report."""
        lists = ("segments", "scored", "trajectory", "layer_scores", "lengths")
        return {
            **{name: value for name, value in vars(self).items() if name not in lists},
            "segments": [s.to_list() for s in self.segments],
            "scored": [s.to_dict() for s in self.scored],
            "trajectory": [asdict(t) for t in self.trajectory],
            "layer_scores": list(self.layer_scores),
            **({"lengths": [t.to_dict() for t in self.lengths]} if self.lengths else {}),
        }
