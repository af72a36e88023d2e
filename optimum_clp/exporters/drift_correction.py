"""Weights that make up for what rounding other weights has done to their inputs, by ridge regression.

A module in the middle of a quantized model meets inputs `x` that differ from the float model's `x_f`. What it should give
is what the float model gives, so the weight to round is not `W` but the one whose products with `x` are nearest to
`W x_f`. Regression overfits where there is little text, so how far a weight may move is chosen on text that it was not
fitted on.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Ridges that are tried, in units of the Gram matrix's mean diagonal; from what GPTQ adds in any case up to next to no change.
_RIDGES = (0.01, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class InputMoments:
    """What enters a linear module on calibration text, summed over two halves of the rows.

    Args:
        grams (`tuple[Tensor, ...]`): Of each half the sum over tokens of `x x^T`, float64 `[inputs, inputs]`, where
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
            return InputMoments((_total(self.grams).add_(_total(other.grams)),))
        for mine, more in zip((*self.grams, *self.drifts), (*other.grams, *other.drifts), strict=True):
            mine.add_(more)
        return self


def _total(halves: tuple[Tensor, ...]) -> Tensor:
    return halves[0] if len(halves) == 1 else halves[0] + halves[1]


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
    matrix = torch.from_numpy(weight).double()
    wanted = [matrix @ drift for drift in moments.drifts]
    best_error, best_ridge = 0.0, None
    for ridge in _RIDGES:
        error = sum(
            _error_on(_change(moments.grams[half], wanted[half], ridge), moments.grams[1 - half], wanted[1 - half])
            for half in (0, 1)
        )
        if error < best_error:
            best_error, best_ridge = error, ridge
    if best_ridge is None:
        return weight
    change = _change(_total(moments.grams), wanted[0] + wanted[1], best_ridge)
    return (matrix + change).float().numpy()


def _change(gram: Tensor, wanted: Tensor, ridge: float) -> Tensor:
    """`V - W`: the solution of `change (gram + ridge) = wanted`."""
    damped = gram.clone()
    damped.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.cholesky_solve(wanted.T, torch.linalg.cholesky(damped)).T


def _error_on(change: Tensor, gram: Tensor, wanted: Tensor) -> float:
    """The summed square of `V x - W x_f` on other text, less that of the weight as it is."""
    return float((((change @ gram) - 2 * wanted) * change).sum())
