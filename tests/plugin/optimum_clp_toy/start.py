"""A start."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from optimum_clp.architecture.lookup import decoder_layers
from optimum_clp.closed_form.solver import ClosedFormStep
from optimum_clp.tuning.starts import StartProblem


@dataclass(frozen=True)
class DampedResult:
    """What was done."""

    steps: tuple[ClosedFormStep, ...]
    seconds: float = field(compare=False)

    def to_dict(self) -> dict[str, Any]:
        return {"method": "toy_damped", "steps": [vars(step) for step in self.steps], "seconds": self.seconds}


class Damped:
    """Each trained layer's weights, a hundredth smaller."""

    def targets(self, kept: Sequence[int], layers: Sequence[int], depth: int) -> dict[int, int]:
        return {}

    def held_bytes(self, layers: Sequence[nn.Module], width: int) -> int:
        return 0

    def apply(self, problem: StartProblem) -> DampedResult:
        begin = time.perf_counter()
        stack = decoder_layers(problem.model)
        with torch.no_grad():
            for parameter in {p for i in problem.layers for p in stack[i].parameters()}:
                parameter.mul_(0.99)
        return DampedResult(tuple(ClosedFormStep(i) for i in problem.layers), time.perf_counter() - begin)
