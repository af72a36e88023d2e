"""A rounding method."""

import numpy as np

from optimum_clp.exporters.rounding.matrices import RoundedMatrix, from_integers
from optimum_clp.exporters.rounding.method import RoundedWeights, RoundingMethod, RoundingProblem


class Coarse(RoundingMethod):
    """To nearest, with steps that are a quarter larger than they need be."""

    def round(self, problem: RoundingProblem) -> RoundedWeights:
        return RoundedWeights(rounding=coarse)


def coarse(weight: np.ndarray, bits: int, block_size: int) -> RoundedMatrix:
    """A matrix `[rows, columns]`, float32."""
    rows, columns = weight.shape
    half, size = 2 ** (bits - 1), block_size if columns % block_size == 0 else columns
    groups = weight.reshape(rows, columns // size, size)
    scales = 1.25 * np.abs(groups).max(-1) / half
    steps = np.divide(groups, scales[..., None], where=scales[..., None] > 0, out=np.zeros_like(groups))
    codes = np.clip(np.rint(steps), -half, half - 1) + half
    return from_integers(codes.reshape(rows, columns).astype(np.uint8), bits, scales.astype(np.float32))
