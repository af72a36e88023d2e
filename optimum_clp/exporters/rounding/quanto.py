"""optimum-quanto's own integers in an ONNX file."""

import torch

from ...precisions import PRECISIONS, QUANTIZED
from ...quantization import quanto_integers
from .matrices import from_integers
from .method import RoundedWeights, RoundingMethod, RoundingProblem


class Quanto(RoundingMethod):
    """The file says what the quanto checkpoint of the float32 model says: all linear layers that quanto quantizes, as it does."""

    zero_points = frozenset({4})
    keeps_embedding = True
    # a higher one would round what the weights are multiplied by
    accuracy_level = 1
    budget_obstacle = "quanto's integers are taken as they are, so there is nothing to choose"

    def round(self, problem: RoundingProblem) -> RoundedWeights:
        (weights,) = [name for name in QUANTIZED if PRECISIONS[name].bits == problem.bits]
        found = {}
        for name, integers, scales, shifts in quanto_integers(problem.model, weights):
            # int8 is signed in quanto, and MatMulNBits takes unsigned integers
            codes = integers if shifts is not None else (integers.to(torch.int16) + 128).to(torch.uint8)
            offsets = None if shifts is None else shifts.numpy()
            rounded = from_integers(codes.numpy(), problem.bits, scales.numpy(), offsets)
            found[name] = rounded.kept(problem.room.keep_array)
        return RoundedWeights(found, only=tuple(problem.model.get_parameter(name) for name in found))
