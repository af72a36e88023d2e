"""Weights that make up for what rounding other weights has done to their inputs, by ridge regression.

A module in the middle of a quantized model meets inputs `x` that differ from the float model's `x_f`. What it should give
is what the float model gives, so the weight to round is not `W` but the one whose products with `x` are nearest to
`W x_f`. Regression overfits where there is little text, so how far a weight may move is chosen on text that it was not
fitted on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Ridges that are tried, in units of the Gram matrix's mean diagonal; from what GPTQ adds in any case up to next to no change.
_RIDGES = (0.01, 0.1, 1.0, 10.0)
# Rows of a weight are changed together up to this many weights, which bounds the working memory beside the sums.
_PIECE = 4 * 1024 * 1024


@dataclass(frozen=True)
class InputMoments:
    """What enters a linear module on calibration text, summed over two halves of the rows.

    Args:
        grams (`tuple[Tensor, ...]`): Of each half the sum over tokens of `x x^T`, float32 `[inputs, inputs]`, where
            `x` enters the module in the model as it is quantized so far; one for all rows where there are no drifts.
        drifts (`tuple[Tensor, Tensor]`, *optional*): Of each half the sum of `(x_f - x) x^T`, where `x_f` enters the module
            in the float model for the same token; not given where tokens cannot be matched.
    """

    grams: tuple[Tensor, ...]
    drifts: tuple[Tensor, Tensor] | None = None

    @property
    def gram(self) -> np.ndarray:
        """The sum of `x x^T` over all tokens, float64 `[inputs, inputs]`."""
        return _total(self.grams).numpy()

    def add(self, other: "InputMoments") -> "InputMoments":
        """The sums over both texts; the tensors of `self` are added to in place and belong to the result."""
        if self.drifts is None or other.drifts is None:
            return InputMoments((_total((*self.grams, *other.grams)).float(),))
        for mine, more in zip((*self.grams, *self.drifts), (*other.grams, *other.drifts), strict=True):
            mine.add_(more)
        return self


def _total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of matrices, float64, one of which is held beside them."""
    total = parts[0].to(torch.float64, copy=True)
    for part in parts[1:]:
        total += part
    return total


def corrected_weight(weight: np.ndarray, moments: InputMoments) -> np.ndarray:
    """The weight whose products with a module's inputs are nearest to the float model's products.

    It minimises `|V x - W x_f|^2 + ridge |V - W|^2`, summed over tokens. The ridge is the one of four that does best
    when it is fitted on one half of the rows and judged on the other, both ways; if none does better there than the weight
    as it is, nothing is changed.

    Args:
        weight (`np.ndarray` of shape `[outputs, inputs]`, float32): `W`.
        moments ([`InputMoments`]): Of the module's inputs.

    Returns:
        `np.ndarray` of shape `[outputs, inputs]`, float32: `V`; `weight` itself where nothing is gained.
    """
    if moments.drifts is None or not all(gram.any() for gram in moments.grams):
        return weight
    pieces = torch.from_numpy(weight).split(max(1, _PIECE // weight.shape[1]))
    errors = dict.fromkeys(_RIDGES, 0.0)
    for ridge in _RIDGES:
        for half in (0, 1):
            factor = _factor(moments.grams[half : half + 1], ridge)
            for piece in pieces:
                change = _change(piece, moments.drifts[half], factor)
                errors[ridge] += _error_on(piece, change, moments.grams[1 - half], moments.drifts[1 - half])
    best = min(_RIDGES, key=lambda ridge: errors[ridge])
    if not errors[best] < 0:
        return weight
    factor, drift = _factor(moments.grams, best), _total(moments.drifts).float()
    return torch.cat([piece + _change(piece, drift, factor) for piece in pieces]).numpy()


def _factor(grams: Sequence[Tensor], ridge: float) -> Tensor:
    """The Cholesky factor of the damped sum of Gram matrices, float64, made in the place of that sum."""
    damped = _total(grams)
    damped.diagonal().add_(ridge * damped.diagonal().mean())
    return torch.linalg.cholesky(damped, out=damped)


def _change(weight: Tensor, drift: Tensor, factor: Tensor) -> Tensor:
    """`V - W`, float32: the solution of `change (gram + ridge) = W drift`."""
    return torch.cholesky_solve((weight @ drift).double().T, factor).T.float()


def _error_on(weight: Tensor, change: Tensor, gram: Tensor, drift: Tensor) -> float:
    """The summed square of `V x - W x_f` on other text, less that of the weight as it is."""
    return float(((change @ gram - 2 * (weight @ drift)) * change).sum(dtype=torch.float64))
