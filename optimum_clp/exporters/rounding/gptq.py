"""GPTQ: the rounding error of a column is made up for by the columns behind it, for the inputs that a matrix meets on text."""

from collections.abc import Sequence

import numpy as np
import torch

from ..experts import unrolled_experts
from .drift_correction import InputGrams, corrected_weights
from .input_grams import Dequantize, NamedWeight, visit_layers
from .matrices import RoundedMatrix, dequantize_blocks, fits_16_bits, integer_range, pack, reciprocal, row_pieces
from .method import RoundedWeights, RoundingMethod, RoundingProblem
from .nearest import round_blocks, round_to_nearest
from .products import product_dtype

# Added to the Gram matrix's diagonal, in units of its mean, as GPTQ's authors do.
DAMPING = 0.01
# The same for an embedding that is the head too. The head's inputs alone would trade errors of looked-up rows for smaller products.
_TIED_DAMPING = 1.0


class Gptq(RoundingMethod):
    """In 4 bits [`FeedbackRounding`], from the bottom of the model up; in 8 bits to nearest: there is next to nothing to gain.

    What is rounded is what [`~exporters.rounding.drift_correction.corrected_weights`] makes of a weight. Matrices that choose experts, an embedding
    that is not the head too, and what no token reaches are rounded to nearest.
    """

    text_bits = frozenset({4})
    needs_text = True

    def round(self, problem: RoundingProblem) -> RoundedWeights:
        if problem.bits not in self.text_bits:
            return RoundedWeights()
        assert problem.calibration is not None
        quantize = _Quantize(problem)
        wanted = [name for name, matrix in problem.matrices.items() if not matrix.is_router]
        # as its modules are visited
        with unrolled_experts(problem.model):
            dtype = product_dtype(problem.model, problem.calibration)
        visit_layers(
            problem.model, problem.calibration, wanted, quantize, dtype=dtype, room=problem.room, quiet=problem.quiet
        )
        return RoundedWeights(quantize.found)


class _Quantize:
    """What [`visit_layers`] calls; keeps the rounded matrices by the names of the graph."""

    def __init__(self, problem: RoundingProblem):
        self.problem = problem
        self.found: dict[str, RoundedMatrix] = {}
        self.by_storage: dict[int, RoundedMatrix] = {}

    def __call__(self, weights: Sequence[NamedWeight], sums: InputGrams | None, tied: bool) -> list[Dequantize]:
        problem = self.problem
        if sums is None:  # an embedding, whose rows are looked up
            forms = [problem.form_of(weight.names) for weight in weights]
            return [
                round_to_nearest(w.weight, form.bits, form.block_size).dequantize
                for w, form in zip(weights, forms, strict=True)
            ]
        new = [weight for weight in weights if weight.address not in self.by_storage]
        rounded = self._together(new, sums, _TIED_DAMPING if tied else DAMPING)
        self.by_storage.update(zip((weight.address for weight in new), rounded, strict=True))
        for weight in weights:
            names = problem.matrices.keys() & weight.names
            self.found.update(dict.fromkeys(names, self.by_storage[weight.address]))
        return [self.by_storage[weight.address].dequantize for weight in weights]

    def _together(self, weights: Sequence[NamedWeight], sums: InputGrams, damping: float) -> list[RoundedMatrix]:
        """Weights of modules with the same inputs; what is needed besides the result is let go of."""
        if not weights:
            return []
        corrected = corrected_weights([weight.weight for weight in weights], sums)
        rounding = FeedbackRounding(sums.take_gram(), damping)
        forms = [self.problem.form_of(weight.names) for weight in weights]
        pairs = zip(corrected, forms, strict=True)
        rounded = (rounding.round(values, form.bits, form.block_size) for values, form in pairs)
        return [matrix.kept(self.problem.room.keep_array) for matrix in rounded]


class FeedbackRounding:
    """Rounds matrices column by column, each time moving the columns that are left so that products change least.

    This is GPTQ in the order of the columns; scales are chosen block by block, from the weights as they are when a block
    is reached, by the rule of [`quantize_blocks`], where a column's error counts by what is left of it when the columns
    behind have made up for it. A row whose products change more than by rounding to nearest, on the inputs that `gram` is
    of, is rounded to nearest, and so is a whole matrix if no input differs from zero.

    Args:
        gram (`np.ndarray` of shape `[columns, columns]`, float32): Sum over tokens of `x x^T` of the matrices' inputs.
        damping (`float`): Added to the diagonal of `gram`, in units of its mean; above 0.
    """

    def __init__(self, gram: np.ndarray, damping: float = DAMPING):
        mean = np.trace(gram) / len(gram)
        self.gram = gram
        self.damping = np.float32(damping * mean)
        self.factor = _feedback(gram, damping * mean) if mean > 0 else None

    def round(self, weight: np.ndarray, bits: int, block_size: int) -> RoundedMatrix:
        """Round one matrix.

        Args:
            weight (`np.ndarray` of shape `[rows, columns]`, float32): One row for each output feature.
            bits (`int`): 4, 6 or 8.
            block_size (`int`): Weights that share a scale, even.

        Returns:
            [`RoundedMatrix`]
        """
        if self.factor is None:
            return round_to_nearest(weight, bits, block_size)
        plain = round_to_nearest(weight, bits, block_size, np.diagonal(self.gram) + self.damping)
        rows, columns = weight.shape
        narrow = fits_16_bits(plain.scales)
        for part in row_pieces(rows, columns):
            values = weight[part].astype(np.float64)
            codes, scales = _round_columns(values, self.factor, bits, block_size, narrow)
            integers = pack(codes, bits)
            fed = dequantize_blocks(integers, scales, bits, columns)
            nearest = dequantize_blocks(plain.integers[part], plain.scales[part], bits, columns)
            better = _output_error(weight[part] - fed, self.gram) < _output_error(weight[part] - nearest, self.gram)
            plain.integers[part][better] = integers[better]
            plain.scales[part][better] = scales[better]
        return plain


def _feedback(gram: np.ndarray, penalty: float) -> np.ndarray:
    """The upper Cholesky factor of the inverse of the damped Gram matrix, float64.

    It is the inverse of the upper triangular matrix `R` with `R R^T` equal to the damped matrix, and that is the lower
    Cholesky factor of the matrix in reversed order. One matrix is held beside `gram`: these are the largest of an export.
    """
    # symmetric, so its transpose is the same matrix in the order of columns, in which LAPACK works in place
    reverse = torch.from_numpy(gram[::-1, ::-1].astype(np.float64)).T
    reverse.diagonal().add_(penalty)
    _invert_lower(torch.linalg.cholesky(reverse, out=reverse))
    return reverse.numpy()[::-1, ::-1]


def _invert_lower(matrix: torch.Tensor, step: int = 256) -> None:
    """The inverse of a lower triangular matrix in its place, blocks of columns from the last to the first."""
    size = len(matrix)
    for start in reversed(range(0, size, step)):
        stop = min(start + step, size)
        block = matrix[start:stop, start:stop]
        inverse = torch.linalg.solve_triangular(block, torch.eye(stop - start, dtype=matrix.dtype), upper=False)
        below = matrix[stop:, start:stop]
        below.copy_(matrix[stop:, stop:] @ (below @ inverse)).neg_()
        block.copy_(inverse)


def _round_columns(
    weight: np.ndarray, factor: np.ndarray, bits: int, block_size: int, narrow: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Codes, uint8 `[rows, blocks, block_size]`, and scales, float32; `weight`, float64, is overwritten."""
    least, most = integer_range(bits)
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    codes = np.full((rows, blocks * block_size), -least, dtype=np.uint8)
    scales = np.empty((rows, blocks), dtype=np.float32)
    # an error costs its square over this square, once the columns behind have made up for it
    importance = 1 / np.square(np.diagonal(factor))
    importance = (importance / importance.mean()).astype(np.float32)
    for block in range(blocks):
        start, stop = block * block_size, min(columns, (block + 1) * block_size)
        values = weight[:, start:stop].astype(np.float32)
        scales[:, block] = round_blocks(values, bits, narrow, importance[start:stop])[1]
        scale = scales[:, block].astype(np.float64)
        inverse = reciprocal(scale)
        errors = np.empty((rows, stop - start))
        for column in range(start, stop):
            code = np.clip(np.rint(weight[:, column] * inverse), least, most)
            codes[:, column] = code - least
            error = (weight[:, column] - code * scale) / factor[column, column]
            weight[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes.reshape(rows, blocks, block_size), scales


def _output_error(difference: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """For each row `d` of the difference the summed square of its products, `d gram d^T`."""
    return np.einsum("ij,ij->i", difference @ gram, difference, dtype=np.float64)
