"""The stages of a tuning, one after the other: what is cheap for a token comes before what is dear.

Every stage trains the same layers on the same rows. They differ in the loss, and so in how much of the two models runs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from ..configuration.stages import TuningConfig
from ..report.section import Key

HIDDEN = "hidden"
# so often is a stage of hidden states judged, and not before so many steps: nothing above the cut runs in it, and a
# judgement runs all of that
_JUDGEMENTS_OF_HIDDEN, _STEPS_BETWEEN_JUDGEMENTS = 4, 64
# of the rate that is measured
_RATE, _STEPS_OF_FULL_RATE, _MEASURING_STEPS = 3, 300, 4


@dataclass(frozen=True)
class Stage:
    """Some passes over the train rows with one loss; the rate rises, and falls to 0 along a cosine.

    Args:
        loss (`dict[str, float]`): Weights of the losses that a step lowers, by name.
        epochs (`int`): Passes over the rows, at least 1.
        learning_rate (`float` or `None`): Peak rate of AdamW; `None`, in the first stage alone, for [`measured_learning_rate`].
        evaluations (`int`): How often the weights are judged, evenly, at least 1; at the end in any case.
        batch_size (`int`): Rows in one step of all processes, at least 1; with fewer rows all of them are a step.
    """

    loss: Mapping[str, float]
    epochs: int
    learning_rate: float | None
    evaluations: int
    batch_size: int

    def steps_per_epoch(self, num_rows: int) -> int:
        """Steps of a pass over so many rows; what does not fill the last one is left out."""
        return num_rows // min(self.batch_size, num_rows)

    def steps(self, num_rows: int) -> int:
        """Steps of all passes over so many rows."""
        return self.epochs * self.steps_per_epoch(num_rows)

    def measuring_steps(self, num_rows: int) -> int:
        """Steps whose gradients are taken before the first one, for the rate."""
        return min(_MEASURING_STEPS, self.steps_per_epoch(num_rows)) if self.learning_rate is None else 0


@dataclass(frozen=True)
class StageRecord:
    """What a stage did.

    Args:
        loss (`dict[str, float]`): Weights of its losses.
        steps (`int`): Optimizer steps that were taken.
        learning_rate (`float`): Peak rate.
        num_tokens (`int`): Tokens that were trained on, repeats counted.
    """

    loss: Annotated[dict[str, Annotated[float, Key(minimum=0, finite=True)]], Key("Weight of each loss.", min_items=1)]
    steps: Annotated[int, Key(minimum=0)]
    learning_rate: Annotated[float, Key("Peak rate.", exclusive_minimum=0, finite=True)]
    num_tokens: Annotated[int, Key("Repeats counted.", minimum=0)]


def stages_of(config: TuningConfig, hidden_size: int, num_rows: int, num_processes: int = 1) -> tuple[Stage, ...]:
    """The stages that a recipe asks for: hidden states alone, then its loss, which also judges all weights.

    Args:
        config ([`TuningConfig`]): Epochs, rates, batches and loss.
        hidden_size (`int`): Of the model.
        num_rows (`int`): Train rows.
        num_processes (`int`): That share the rows of a step.
    """
    rate = config.learning_rate or default_learning_rate(hidden_size)
    loss = {name: weight for name, weight in config.loss_weights().items() if weight}
    judged = Stage(loss, config.epochs, rate, config.epochs * config.evaluations_per_epoch, config.batch_size)
    if not config.hidden_epochs:
        return (judged,)
    batch_size = config.hidden_batch_size
    if batch_size is None:
        half, uneven = divmod(config.batch_size, 2 * config.gradient_accumulation_steps * num_processes)
        batch_size = config.batch_size if uneven or not half else config.batch_size // 2
    hidden = Stage({HIDDEN: 1.0}, config.hidden_epochs, config.hidden_learning_rate, 0, batch_size)
    judgements = max(1, min(_JUDGEMENTS_OF_HIDDEN, hidden.steps(num_rows) // _STEPS_BETWEEN_JUDGEMENTS))
    return replace(hidden, evaluations=judgements), judged


def measured_learning_rate(loss: float, slope: float, steps: int) -> float:
    """`3 * loss / slope`, times `sqrt(steps / 300)` for fewer than 300 steps.

    Adam's first steps are as long as the rate in every weight, so a rate of `loss / slope` would take the loss to 0 in one of them, if
    it went on as it begins. How far a weight may go depends on what reads it, how much of it there is, and how long it is: by this
    measure three models agree, whose best rates differ by fifty (`docs/recovery_lab_notes.md`, "The rate of hidden states").

    Args:
        loss (`float`): Before the first step, the mean of some steps' rows; at least 0.
        slope (`float`): Sum over all weights of the gradient's absolute value, the mean of the same steps.
        steps (`int`): That will be taken.

    Returns:
        `float`: 0 or not finite where there is no slope, or no loss.
    """
    return _RATE * loss / slope * min(1.0, math.sqrt(steps / _STEPS_OF_FULL_RATE)) if slope else 0.0


def default_learning_rate(hidden_size: int) -> float:
    """`0.1 / hidden_size`: 8e-4 at width 128, 2.4e-5 at 4096; wider layers take smaller steps."""
    return 0.1 / hidden_size
