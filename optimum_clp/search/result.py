"""What a search found, and what it saw on the way."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from ..report.section import Key, to_section
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
        repaired_kl (`float` or `None`): Its KL after `search.repair`, over the rows that judged the repaired cuts; `None`
            if it had none.
    """

    segments: Annotated[tuple[LayerSegment, ...], Key(added=True)]
    kl: Annotated[float, Key("KL(dense || cut), nats per token.")]
    standard_error: Annotated[float, Key("Of that mean, over the rows; null for a single row.", minimum=0)]
    loss: Annotated[
        float, Key("Cross-entropy of the cut model over the same rows, nats per token.", minimum=0, added=True)
    ]
    num_rows: Annotated[
        int, Key("Rows it was measured on; races measure only the promising cuts on all.", minimum=1, added=True)
    ]
    behind: Annotated[
        float, Key("Its KL minus the chosen cut's, on the rows that both were measured on.", added=True)
    ] = 0.0
    behind_error: Annotated[float, Key("Standard error of `behind`, over the rows.", minimum=0, added=True)] = 0.0
    repaired_kl: Annotated[
        float | None, Key("Its KL after `search.repair`, which the choice went by.", sparse=True)
    ] = None

    @property
    def start(self) -> Annotated[int, Key("First layer that goes.", minimum=0)]:
        """The first layer that is skipped."""
        return self.segments[0].start

    @property
    def stop(
        self,
    ) -> Annotated[int, Key("One past the last layer that goes; there may be layers between that stay.", minimum=1)]:
        """One past the last layer that is skipped."""
        return self.segments[-1].stop

    @property
    def segment(self) -> LayerSegment:
        """The only segment.

        Raises:
            ValueError: If there are several.
        """
        (only,) = self.segments
        return only


@dataclass(frozen=True)
class GateStep:
    """One step of the gate on its way.

    Args:
        step (`int`): 0 for the sweep along the stack, then counted up.
        start (`float`): Where the valley starts, in layers; of the first valley, if there are several.
        steepness (`float`): Per layer.
        loss (`float`): Mean KL under this gate, over the step's rows.
        valleys (`tuple[tuple[float, float], ...]`): Start and length of each valley.
    """

    step: Annotated[int, Key(minimum=0)]
    start: Annotated[float, Key("Start of the gate's first valley, in layers.", finite=True)]
    steepness: Annotated[float, Key("Per layer.", exclusive_minimum=0, finite=True)]
    loss: Annotated[float, Key("Nats per token.")]
    valleys: Annotated[
        tuple[tuple[Annotated[float, Key(finite=True)], Annotated[float, Key(exclusive_minimum=0, finite=True)]], ...],
        Key("Start and length of each valley, in layers.", added=True),
    ] = ()


@dataclass(frozen=True)
class TriedLength:
    """A number of layers that was tried against a quality budget.

    Args:
        num_removed (`int`): Layers that go.
        segments (`tuple[LayerSegment, ...]`): The best of them that the search found.
        perplexity_increase (`float`): Relative, on the validation rows: 0.1 is a tenth above the dense model's.
        fits (`bool`): Whether that is within the budget.
    """

    num_removed: Annotated[int, Key(minimum=1)]
    segments: tuple[LayerSegment, ...]
    perplexity_increase: Annotated[
        float, Key("Relative, over the dense model's, on the validation rows before tuning.")
    ]
    fits: Annotated[bool, Key("Whether that is within the quality budget.")]

    def to_dict(self) -> dict[str, Any]:
        """An entry of `lengths` in the report's `search` section."""
        return to_section(self)


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

    strategy: Annotated[str, Key("What was asked for.")]
    used_strategy: Annotated[str, Key("What was run; another than `strategy` only for auto.", added=True)]
    segments: tuple[LayerSegment, ...]
    score: Annotated[float, Key("KL(dense || cut) of the segments, nats per token.")]
    scored: Annotated[tuple[ScoredCut, ...], Key("Every cut that was scored exactly, by place.")]
    trajectory: Annotated[tuple[GateStep, ...], Key("The gate at each step; empty for other strategies.")]
    layer_scores: Annotated[
        tuple[float, ...],
        Key(
            "Importance of each layer by a strategy that ranks layers, the least important first to go; empty for others.",
            added=True,
        ),
    ]
    num_layers: Annotated[int, Key(minimum=1)]
    num_removed: Annotated[int, Key(minimum=1)]
    num_tokens: Annotated[int, Key("Of all search rows.", minimum=1)]
    dense_loss: Annotated[
        float,
        Key(
            "Cross-entropy of the dense model over the rows of `score`, nats per token.",
            minimum=0,
            added=True,
        ),
    ]
    forward_equivalents: Annotated[
        float,
        Key("Work done, in dense forward passes over all search rows, head included.", minimum=0, added=True),
    ]
    layer_passes: Annotated[
        float, Key("Work done in the layers alone, in decoder-layer passes over all search rows.", minimum=0)
    ]
    seconds: Annotated[float, Key(minimum=0)] = field(compare=False)
    lengths: Annotated[
        tuple[TriedLength, ...],
        Key(
            "Only for a quality budget (pruning_ratio auto): the numbers of layers that were tried.",
            min_items=1,
            sparse=True,
        ),
    ] = ()

    def to_dict(self) -> dict[str, Any]:
        """The `search` section of the report."""
        return to_section(self)
