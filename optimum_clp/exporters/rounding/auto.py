"""The method that is taken if none is named."""

import dataclasses

from .gptq import Gptq
from .method import RoundedWeights, RoundingMethod, RoundingProblem
from .nearest import NEAREST, ToNearest


class Auto(RoundingMethod):
    """[`Gptq`] where there is text for it to look at, else [`ToNearest`]."""

    text_bits = Gptq.text_bits

    def round(self, problem: RoundingProblem) -> RoundedWeights:
        has_text = problem.calibration is not None and problem.calibration.numel() > 0
        if has_text and problem.bits in Gptq.text_bits:
            return dataclasses.replace(Gptq().round(problem), method="gptq")
        return dataclasses.replace(ToNearest().round(problem), method=NEAREST)
