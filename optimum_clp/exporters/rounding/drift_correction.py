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
_PIECE = 2 * 1024 * 1024
# Rows of a weight on which ridges are judged: eight solutions of a large matrix would take most of an export's time.
_JUDGED_ROWS = 512


@dataclass
class InputGrams:
    """What enters linear modules on calibration text, summed over two halves of the rows.

    These are the largest matrices of an export, so sums are added to, and given up, in place.

    Args:
        grams (`tuple[Tensor, ...]`): Of each half the sum over tokens of `x x^T`, float32 `[inputs, inputs]`, where
            `x` enters the modules in the model as it is quantized so far; one for all rows where there are no drifts.
        drifts (`tuple[Tensor, ...]`, *optional*): Of each half the sum of `(x_f - x) x^T`, where `x_f` enters the modules
            in the float model for the same token; not given where tokens cannot be matched.
    """

    grams: tuple[Tensor, ...]
    drifts: tuple[Tensor, ...] | None = None

    @classmethod
    def zeros(cls, width: int, *, matched: bool) -> "InputGrams":
        """Before any text.

        Args:
            width (`int`): Inputs of the modules.
            matched (`bool`): Whether tokens can be matched with the float model's.
        """
        sums = [torch.zeros(width, width) for _ in range(4 if matched else 1)]
        return cls((sums[0], sums[1]), (sums[2], sums[3])) if matched else cls((sums[0],))

    def add(self, inputs: Tensor, floats: Tensor | None = None) -> None:
        """Add a batch of text.

        Args:
            inputs (`Tensor` of shape `[rows, length, inputs]`, float32): `x`; without `floats` of any shape `[..., inputs]`.
            floats (`Tensor`, *optional*): `x_f`, of the same shape; where it is missing once, drifts say too little and are
                given up.
        """
        if floats is None or self.drifts is None:
            self.merge()
            self.drifts = None
            x = inputs.reshape(-1, inputs.shape[-1])
            self.grams[0].addmm_(x.T, x)
            return
        for half in (0, 1):
            x, x_f = (states[half::2].reshape(-1, states.shape[-1]) for states in (inputs, floats))
            self.grams[half].addmm_(x.T, x)
            self.drifts[half].addmm_((x_f - x).T, x)

    def merge(self) -> None:
        """Give up the halves for sums over all rows."""
        self.grams = (_sum_in_place(self.grams),)
        self.merge_drifts()

    def merge_drifts(self) -> None:
        """The same, of the drifts alone."""
        self.drifts = None if self.drifts is None else (_sum_in_place(self.drifts),)

    def take_gram(self) -> np.ndarray:
        """The sum of `x x^T` over all tokens, float32 `[inputs, inputs]`; everything else is given up."""
        gram = _sum_in_place(self.grams)
        self.grams, self.drifts = (), None
        return gram.numpy()


def _sum_in_place(parts: Sequence[Tensor]) -> Tensor:
    for part in parts[1:]:
        parts[0].add_(part)
    return parts[0]


def corrected_weights(weights: Sequence[np.ndarray], sums: InputGrams) -> list[np.ndarray]:
    """The weights whose products with their modules' inputs are nearest to the float model's products.

    Each minimises `|V x - W x_f|^2 + ridge |V - W|^2`, summed over tokens. The ridge is the one of four that does best
    for the weight when it is fitted on one half of the text and judged on the other, both ways, by at most 512 of the weight's
    rows; if none does better there than the weight as it is, nothing is changed.

    Args:
        weights (`Sequence[np.ndarray]`, each of shape `[outputs, inputs]`, float32): `W` of modules with the same inputs.
        sums ([`InputGrams`]): Of these inputs; merged afterwards.

    Returns:
        `list[np.ndarray]`, each of shape `[outputs, inputs]`, float32: `V`; the weight itself where nothing is gained.
    """
    if sums.drifts is None or len(sums.drifts) < 2 or not all(gram.diagonal().any() for gram in sums.grams):
        return list(weights)
    judged = [torch.from_numpy(weight[:: -(-len(weight) // _JUDGED_ROWS)]) for weight in weights]
    drifted = [[rows @ drift for drift in sums.drifts] for rows in judged]
    sums.merge_drifts()
    errors = [dict.fromkeys(_RIDGES, 0.0) for _ in weights]
    for ridge in _RIDGES:
        for half in (0, 1):
            factor = _factor(sums.grams[half], ridge, torch.float32)
            for found, targets in zip(errors, drifted, strict=True):
                change = _change(targets[half], factor)
                found[ridge] += _error_on(change, sums.grams[1 - half], targets[1 - half])
            # gone before the next one is made
            del factor
    sums.merge()
    best = [min(_RIDGES, key=found.__getitem__) for found in errors]
    better = [found[ridge] < 0 for found, ridge in zip(errors, best, strict=True)]
    corrected = list(weights)
    for ridge in sorted({ridge for ridge, gains in zip(best, better, strict=True) if gains}):
        factor = _factor(sums.grams[0], ridge)
        for index, weight in enumerate(weights):
            if better[index] and best[index] == ridge:
                corrected[index] = weight.copy()
                for piece in torch.from_numpy(corrected[index]).split(max(1, _PIECE // weight.shape[1])):
                    piece += _change(piece @ sums.drifts[0], factor)
        del factor
    return corrected


def _factor(gram: Tensor, ridge: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """The lower Cholesky factor of the damped Gram matrix; in float64 where `dtype` does not hold one."""
    # symmetric, so its transpose is the same matrix in the order of columns, in which LAPACK works in place
    damped = gram.to(dtype, copy=True).T
    damped.diagonal().add_(ridge * damped.diagonal().mean())
    _, info = torch.linalg.cholesky_ex(damped, out=(damped, torch.empty((), dtype=torch.int32)))
    if not info and damped.diagonal().isfinite().all():
        return damped
    if dtype == torch.float64:
        raise torch.linalg.LinAlgError("the damped Gram matrix is not positive definite")
    return _factor(gram, ridge)


def _change(drifted: Tensor, factor: Tensor) -> Tensor:
    """`V - W`, float32: the solution of `change (gram + ridge) = W drift`."""
    # not torch.cholesky_solve, which copies the factor
    half = torch.linalg.solve_triangular(factor, drifted.to(factor.dtype).T, upper=False)
    return torch.linalg.solve_triangular(factor.T, half, upper=True).T.float()


def _error_on(change: Tensor, gram: Tensor, drifted: Tensor) -> float:
    """The summed square of `V x - W x_f` on other text, less that of the weight as it is."""
    return float(((change @ gram - 2 * drifted) * change).sum(dtype=torch.float64))
