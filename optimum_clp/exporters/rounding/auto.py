"""The method that is taken if none is named."""

from .gptq import Gptq
from .method import RoundedWeights, RoundingMethod, RoundingProblem
from .nearest import ToNearest


class Auto(RoundingMethod):
    """[`Gptq`] where there is text, else [`ToNearest`]."""

    text_bits = Gptq.text_bits

    def round(self, problem: RoundingProblem) -> RoundedWeights:
        has_text = problem.calibration is not None and problem.calibration.numel() > 0
        return (Gptq() if has_text else ToNearest()).round(problem)
