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
_STEPS_OF_FULL_RATE = 300


@dataclass(frozen=True)
class Stage:
    """Some passes over the train rows with one loss; the rate rises, and falls to 0 along a cosine.

    Args:
        loss (`dict[str, float]`): Weights of the losses that a step lowers, by name.
        epochs (`int`): Passes over the rows, at least 1.
        learning_rate (`float`): Peak rate of AdamW.
        evaluations (`int`): How often the weights are judged, evenly, at least 1; at the end in any case.
        batch_size (`int`): Rows in one step of all processes, at least 1; with fewer rows all of them are a step.
    """

    loss: Mapping[str, float]
    epochs: int
    learning_rate: float
    evaluations: int
    batch_size: int

    def steps_per_epoch(self, num_rows: int) -> int:
        """Steps of a pass over so many rows; what does not fill the last one is left out."""
        return num_rows // min(self.batch_size, num_rows)


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
    hidden = Stage({HIDDEN: 1.0}, config.hidden_epochs, 0.0, 0, batch_size)
    steps = config.hidden_epochs * hidden.steps_per_epoch(num_rows)
    hidden_rate = config.hidden_learning_rate or default_hidden_learning_rate(hidden_size, steps)
    judgements = max(1, min(_JUDGEMENTS_OF_HIDDEN, steps // _STEPS_BETWEEN_JUDGEMENTS))
    return replace(hidden, learning_rate=hidden_rate, evaluations=judgements), judged


def default_hidden_learning_rate(hidden_size: int, steps: int) -> float:
    """`0.18 / sqrt(hidden_size)`, times `sqrt(steps / 300)` for fewer than 300 steps: 0.016 at width 128, 7.5e-3 at 576.

    About a fifth of what a weight is long, which falls with the root of the width: measured at widths 128 and 576
    (`docs/recovery_lab_notes.md`). Twice as much ended badly at 576, and as much in few steps at 128.
    """
    return 0.18 / math.sqrt(hidden_size) * min(1.0, math.sqrt(steps / _STEPS_OF_FULL_RATE))


def default_learning_rate(hidden_size: int) -> float:
    """`0.1 / hidden_size`: 8e-4 at width 128, 2.4e-5 at 4096; wider layers take smaller steps."""
    return 0.1 / hidden_size
