"""What more text will bring: a curve through short pilots, and how sure it is.

Loss after healing on `N` fresh tokens is taken to be `a + b N^-c` with `a, b >= 0` and `c` in [0.05, 1], the form that
losses of language models follow over many orders of magnitude (Hestness et al. 2017; Kaplan et al. 2020). Three or four
pilots do not tell `a` from `c`: so the curves through many points near the pilots' are kept, and give the interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from ..errors import TuningError
from ..report.section import Key

# the exponents that are looked at; 0.05 hardly falls at all, and 1 is faster than any curve that was reported
_EXPONENTS = torch.linspace(0.05, 1.0, 96, dtype=torch.float64)
_DRAWS = 400
_COVERED = 0.8
# what a pilot's loss is off by, as a share of it: other rows, another order of them
_NOISE = 0.01


@dataclass(frozen=True)
class Pilot:
    """A short healing.

    Args:
        num_tokens (`int`): Fresh tokens that it was given.
        loss (`float`): Validation loss that it reached, nats per token.
        seconds (`float`): That it took, text not counted.
    """

    num_tokens: Annotated[int, Key(minimum=1)]
    loss: float
    seconds: Annotated[float, Key(minimum=0)]


@dataclass(frozen=True)
class Prediction:
    """What so many tokens will bring.

    Args:
        num_tokens (`int`): Fresh tokens.
        loss (`float`): Most likely validation loss, nats per token.
        low (`float`): Four times of five it will lie between this
        high (`float`): and this, if the curve has the form that is assumed.
    """

    num_tokens: Annotated[int, Key(minimum=1)]
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Forecast:
    """The `forecast` of the report's `tuning` section.

    Args:
        pilots (`tuple[Pilot, ...]`): What it goes by.
        predictions (`tuple[Prediction, ...]`): For the tokens that are planned, and for ten times as many.
    """

    pilots: tuple[Pilot, ...]
    predictions: tuple[Prediction, ...]


class RecoveryCurve:
    """Loss over fresh tokens, `a + b N^-c`, from the losses of pilots on each validation row.

    To each loss a hundredth of itself is added as noise, 400 times. Each draw's points are fitted by least squares of
    relative errors, and the spread of these curves is the interval.

    Args:
        tokens (`Sequence[int]`): Of each pilot, ascending; at least three.
        losses (`Sequence[float]`): Validation loss after each pilot.

    Raises:
        TuningError: If there are fewer than three pilots, or a loss is not finite.
    """

    def __init__(self, tokens: Sequence[int], losses: Sequence[float]):
        if len(tokens) < 3 or not all(map(math.isfinite, losses)):
            rule = "a curve needs at least three pilots with finite losses"
            shown = dict(zip(tokens, losses, strict=True))
            raise TuningError.of("forecast.pilots", shown, rule, "Give more text, or leave the forecast out")
        self._unit = tokens[0]
        scale = torch.tensor(tokens, dtype=torch.float64) / self._unit
        generator = torch.Generator().manual_seed(0)
        noise = _NOISE * torch.randn(_DRAWS, len(tokens), dtype=torch.float64, generator=generator)
        self._curves = _fitted(scale, torch.tensor(losses, dtype=torch.float64) * (1 + noise))

    def at(self, num_tokens: int) -> Prediction:
        """The loss after so many fresh tokens."""
        constant, slope, exponent = self._curves
        found = constant + slope * (num_tokens / self._unit) ** -exponent
        edge = (1 - _COVERED) / 2
        low, middle, high = torch.quantile(found, torch.tensor([edge, 0.5, 1 - edge], dtype=found.dtype)).tolist()
        return Prediction(num_tokens, middle, low, high)


def _fitted(scale: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(a, b, c)`, each float64 `[draws]`, for losses `[draws, pilots]`: for each `c` of the grid `a` and `b` are a linear
    problem in two unknowns with signs, whose solution is inside or at an edge."""
    weight = losses.square().reciprocal()
    best: Any = None
    for exponent in _EXPONENTS:
        x = (scale**-exponent).expand_as(losses)
        w, wx, wy = weight.sum(1), (weight * x).sum(1), (weight * losses).sum(1)
        wxx, wxy = (weight * x * x).sum(1), (weight * x * losses).sum(1)
        slope = (w * wxy - wx * wy) / (w * wxx - wx * wx)
        constant = (wy - slope * wx) / w
        no_floor, flat = constant < 0, slope < 0
        slope = torch.where(no_floor, wxy / wxx, slope.clamp(min=0))
        constant = torch.where(no_floor, 0.0, torch.where(flat, wy / w, constant))
        error = (weight * (constant[:, None] + slope[:, None] * x - losses).square()).sum(1)
        found = torch.stack([error, constant, slope, exponent.expand_as(error)])
        best = found if best is None else torch.where(error < best[0], found, best)
    return best[1], best[2], best[3]
