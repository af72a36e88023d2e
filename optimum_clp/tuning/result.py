"""What tuning did, evaluation by evaluation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict

import torch
from torch import Tensor

from ..closed_form.solver import ClosedFormStep
from ..report.section import Key, to_section
from .forecast import Forecast
from .schedule import StageRecord


@dataclass(frozen=True)
class TuningStep:
    """One evaluation: mean training loss since the one before, validation loss (both in nats) and learning rate.

    `by_kind` is the validation loss of each kind of text, where there are several.
    """

    step: Annotated[int, Key(minimum=0)]
    train_loss: float | None
    validation_loss: float
    learning_rate: Annotated[float, Key(minimum=0)]
    by_kind: Annotated[
        dict[str, float] | None, Key("Validation loss of each kind of text, where there are several.")
    ] = None

    @classmethod
    def of_rows(
        cls, losses: Tensor, kinds: Sequence[str], step: int = 0, train_loss: float | None = None, rate: float = 0.0
    ) -> "TuningStep":
        """From the loss of every validation row, float64 `[rows]`, and the kind of text that each one is."""
        names = sorted(set(kinds))
        rows = {name: torch.tensor([kind == name for kind in kinds]) for name in names}
        by_kind = {name: losses[mask].mean().item() for name, mask in rows.items()} if len(names) > 1 else None
        return cls(step, train_loss, losses.mean().item(), rate, by_kind)


class StartRecord(TypedDict):
    """The closed-form start: what [`ClosedFormResult`] says, whether it was kept, and the validation losses around it."""

    method: Annotated[str, Key("The start that was asked for.")]
    steps: list[ClosedFormStep]
    seconds: float
    kept: Annotated[bool, Key("Whether it lowered the validation loss.")]
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class OnPolicyRound:
    """A round of learning from what the cut model itself has written.

    Args:
        num_tokens (`int`): Tokens of its own that it learnt from.
        own_loss_before (`float`): Jensen-Shannon divergence on other text of its own, written before the round, nats per token.
        own_loss (`float`): On the same text with the weights that were kept.
        improved (`bool`): Whether other weights were kept than before.
        seconds (`float`): Wall-clock time, writing included.
    """

    num_tokens: Annotated[int, Key("Of its own text, that it learnt from.", minimum=0)]
    own_loss_before: float
    own_loss: float
    improved: bool
    seconds: Annotated[float, Key(minimum=0)] = field(compare=False)


@dataclass(frozen=True)
class TuningResult:
    """What tuning did.

    Args:
        layers (`tuple[int, ...]`): Trained layers, in the cut model's numbering.
        modules (`tuple[str, ...]`): What else was trained: names of the final norm and the head.
        loss (`dict[str, float]`): Weights of the losses.
        init (`dict` or `None`): The closed-form start, a [`StartRecord`].
        num_trainable (`int`): Trained parameters.
        learning_rate (`float`): Peak rate of the last stage.
        stages (`tuple[StageRecord, ...]`): What each stage did.
        steps (`int`): Optimizer steps that were taken.
        best_step (`int`): Step of the weights that were kept; 0 for those before the first step.
        initial_validation_loss (`float`): Of the untuned cut.
        best_validation_loss (`float`): Of the weights that were kept.
        improved (`bool`): Whether other weights than the untuned ones were kept.
        history (`tuple[TuningStep, ...]`): All evaluations; the first is before the first step.
        stopped (`str`): `"finished"`, `"patience"` or `"nan"`.
        num_tokens (`int`): Tokens that were trained on, repeats counted.
        num_processes (`int`): Processes that shared the work.
        forecast ([`Forecast`] or `None`): Of a time budget's pilots.
        on_policy (`tuple[OnPolicyRound, ...]` or `None`): What was learnt after all that, from the model's own text.
        seconds (`float`): Wall-clock time, the dense model's pass included.
        cache_seconds (`float`): The dense model's pass alone.
    """

    layers: Annotated[
        tuple[Annotated[int, Key(minimum=0)], ...], Key("Trained layers, in the cut model's numbering.", unique=True)
    ]
    modules: Annotated[tuple[str, ...], Key("Trained modules beside the layers: final norm, head.")]
    loss: Annotated[
        dict[str, Annotated[float, Key(minimum=0, finite=True)]],
        Key("Weight of each loss of the last stage, which judges the weights of all.", min_items=1),
    ]
    init: Annotated[dict[str, Any] | None, Key("The closed-form start; null without one.", shape=StartRecord)] = field(
        compare=False
    )
    num_trainable: Annotated[int, Key("Trained parameters.", minimum=1)]
    learning_rate: Annotated[float, Key("Peak rate of the last stage.", exclusive_minimum=0, finite=True)]
    stages: Annotated[tuple[StageRecord, ...] | None, Key("In the order in which they were run.", sparse=True)]
    steps: Annotated[int, Key(minimum=0)]
    best_step: Annotated[int, Key(minimum=0)]
    initial_validation_loss: float
    best_validation_loss: float
    improved: bool
    history: tuple[TuningStep, ...]
    stopped: Annotated[str, Key(choices=("finished", "patience", "nan"))]
    num_tokens: Annotated[int, Key(minimum=0)]
    num_processes: Annotated[int, Key(minimum=1)]
    seconds: Annotated[float, Key(minimum=0)] = field(compare=False)
    cache_seconds: Annotated[float, Key("Part of seconds: the dense model's pass.", minimum=0)] = field(compare=False)
    forecast: Annotated[Forecast | None, Key("What short pilots foretold, under a time budget.", sparse=True)] = None
    on_policy: Annotated[
        tuple[OnPolicyRound, ...] | None,
        Key("Rounds on the cut model's own text, after all of the above.", sparse=True),
    ] = None

    def to_dict(self) -> dict[str, Any]:
        """The `tuning` section of the report."""
        return to_section(self)


def improves(found: TuningStep, before: Sequence[TuningStep], start: Mapping[str, float] | None) -> bool:
    """Whether an evaluation is the best so far, and no kind of text is worse off than it was at the start.

    Args:
        found ([`TuningStep`]): The evaluation.
        before (`Sequence[TuningStep]`): The ones before it.
        start (`Mapping[str, float]` or `None`): The untuned cut's loss on each kind; that of the first evaluation if not
            given.
    """
    start = start or before[0].by_kind or {}
    harmed = any(loss > start.get(kind, math.inf) for kind, loss in (found.by_kind or {}).items())
    return not harmed and found.validation_loss < min(step.validation_loss for step in before)
