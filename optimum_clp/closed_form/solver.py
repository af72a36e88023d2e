"""Closed-form start of endpoint tuning: refit the output projections of the layers next to a cut by least squares.

The target is the dense model's hidden state behind the cut. No parameter is added: a linear map folded into a projection
(`"fold"`), or the projection refitted itself (`"least_squares"`). Only sums over tokens are kept, never the states of
all of them. `docs/recovery.md` gives the reasons, with figures.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError, ModelError
from ..forward.dense_outputs import DenseOutputs, StateStore
from ..forward.hooks import evaluation_mode, hooked
from ..progress import progress_bar
from ..report.section import Key, to_section
from ..segments import target_state
from .layer_passes import LayerPasses
from .projections import Projection, find_projections
from .ridge import RIDGES, RegressionSums, Solution, best_solution, squared_distance

METHODS = ("fold", "least_squares")


@dataclass(frozen=True)
class ClosedFormStep:
    """What became of one projection.

    Errors are on the validation rows: the sum over all tokens of `|target - output|^2`, divided by that of
    `|target - input|^2`, of the layer's output and input; so 1 is the error of a layer that does nothing.

    Args:
        layer (`int`): In the cut model's numbering.
        module (`str` or `None`): The projection, by its name inside the layer; `None` if none can be solved.
        error_before (`float` or `None`): With the weights as they were before this step.
        error_after (`float` or `None`): With the solved weights in the model's dtype, kept or not.
        ridge (`float` or `None`): The penalty that did best, in units of the mean eigenvalue of the Gram matrix.
        condition_bound (`float` or `None`): Upper bound of the solved system's condition number.
        dtype (`str` or `None`): Of the sums and of the solution.
        skipped (`str` or `None`): Why the weights are as they were; `None` if they were changed.
    """

    layer: Annotated[int, Key(minimum=0)]
    module: str | None = None
    error_before: float | None = None
    error_after: float | None = None
    ridge: float | None = None
    condition_bound: float | None = None
    dtype: str | None = None
    skipped: Annotated[str | None, Key("Why the weights are as they were.")] = None


@dataclass(frozen=True)
class ClosedFormResult:
    """What the closed-form start did.

    Args:
        method (`str`): `"fold"` or `"least_squares"`.
        steps (`tuple[ClosedFormStep, ...]`): In the order in which they were taken; at least one for every layer.
        seconds (`float`): Wall-clock time.
    """

    method: str
    steps: tuple[ClosedFormStep, ...]
    seconds: float = field(compare=False)

    @property
    def solved(self) -> tuple[int, ...]:
        """The layers that were changed, ascending."""
        return tuple(sorted({s.layer for s in self.steps if s.skipped is None}))

    def to_dict(self) -> dict[str, Any]:
        """For the report, as JSON-ready values."""
        return to_section(self)


def solve_endpoints(
    model: PreTrainedModel,
    layers: Sequence[int],
    kept: Sequence[int],
    train: DenseOutputs,
    validation: DenseOutputs,
    inputs: tuple[Tensor, Tensor],
    *,
    method: str = "least_squares",
    attention: bool = True,
    ridges: Sequence[float] = RIDGES,
    batch_size: int = 8,
    store: StateStore | None = None,
    quiet: bool = False,
) -> ClosedFormResult:
    """Refit the output projections of some layers, so that hidden states behind the cut match the dense model's.

    The layers are solved from the bottom up, each with the ones below as they then are. Weights and biases of linear
    modules whose output is added to the layer's are written in place, nothing else; the layers must own their storage, or
    the dense model changes too. What has no closed form, or whose error on the validation rows does not go down, stays as
    it is, and the result says why.

    Args:
        model (`PreTrainedModel`): The cut model.
        layers (`Sequence[int]`): Layers to solve, in the cut model's numbering.
        kept (`Sequence[int]`): Old indices of the layers that stay, ascending.
        train ([`DenseOutputs`]): Rows to fit on; its `hidden` must hold [`target_state`] of every layer.
        validation ([`DenseOutputs`]): Rows that choose the penalty and decide what is kept; the same states.
        inputs (`tuple[Tensor, Tensor]`): What enters the lowest of the layers, `[rows, length, hidden]` in the model's
            dtype, for `train` and for `validation`.
        method (`str`): `"least_squares"` refits a projection; `"fold"` multiplies it by a `[hidden, hidden]` map from
            the left.
        attention (`bool`): Solve the layer's earlier output projections too (attention), not its last one alone.
        ridges (`Sequence[float]`): Penalties to choose from, above 0, in units of the mean eigenvalue of the Gram matrix.
        batch_size (`int`): Rows in one forward pass.
        store ([`StateStore`], *optional*): Where what enters the layers behind the lowest lies, as much as `inputs`
            once more; main memory if not given.
        quiet (`bool`): No progress bar.

    Returns:
        [`ClosedFormResult`]

    Raises:
        ConfigurationError: If the method is not one of the two.
        ModelError: If a layer or a target is missing, or the hidden states are not finite.
    """
    begin = time.perf_counter()
    _check(layers, kept, train, validation, method)
    indices, store = sorted(set(layers)), store or StateStore()
    splits = []
    for outputs, entering in zip((train, validation), inputs, strict=True):
        targets = {i: outputs.hidden[target_state(kept, i, len(outputs.stack))] for i in indices}
        splits.append(LayerPasses(model, outputs.tokens, indices[0], entering, targets, batch_size, store))
    solver = _Solver(splits[0], splits[1], method, ridges)
    steps: list[ClosedFormStep] = []
    with torch.no_grad(), evaluation_mode(model), progress_bar(len(indices), "Closed form", quiet) as bar:
        for index in indices:
            for passes in splits:
                passes.begin_at(index)
            steps += solver.solve_layer(index, attention)
            bar.update(1)
    return ClosedFormResult(method, tuple(steps), time.perf_counter() - begin)


def _check(
    layers: Sequence[int], kept: Sequence[int], train: DenseOutputs, validation: DenseOutputs, method: str
) -> None:
    if method not in METHODS:
        rule = f"a closed-form start is one of {', '.join(METHODS)}"
        raise ConfigurationError.of("method", method, rule, "Choose one of these")
    if not layers or not all(0 <= i < len(kept) for i in layers):
        rule = f"the model has layers 0 to {len(kept) - 1}"
        raise ModelError.of("layers", list(layers), rule, "Choose at least one of these")
    for name, outputs in (("train", train), ("validation", validation)):
        wanted = sorted({target_state(kept, i, len(outputs.stack)) for i in layers})
        if not set(wanted) <= set(outputs.hidden):
            rule = f"the states that the layers should put out are {wanted}"
            remedy = f"Give DenseOutputs(..., inputs_of={wanted})"
            raise ModelError.of(f"{name}.hidden", sorted(outputs.hidden), rule, remedy)


class _Solver:
    """Solves one layer after the other, in place."""

    def __init__(self, train: LayerPasses, validation: LayerPasses, method: str, ridges: Sequence[float]):
        self.train, self.validation = train, validation
        self.method, self.ridges = method, ridges

    def solve_layer(self, index: int, attention: bool) -> list[ClosedFormStep]:
        """Solve a layer's projections."""
        row = torch.arange(1)
        found = find_projections(self.validation.stack.layers, index, lambda: self.validation.run(index, row)[1])
        if isinstance(found, str):
            return [ClosedFormStep(index, skipped=found)]
        steps = [self._solve(index, found[0])]
        if attention and len(found) > 1 and steps[0].error_before != 0:
            earlier = [self._solve(index, projection) for projection in found[1:]]
            steps += earlier
            if any(step.skipped is None for step in earlier):
                # what enters it has changed
                steps.append(self._solve(index, found[0]))
        return steps

    def _solve(self, index: int, projection: Projection) -> ClosedFormStep:
        fit, check = (self._sums(passes, index, projection) for passes in (self.train, self.validation))
        name, dtype = projection.name, str(fit.dtype).removeprefix("torch.")
        if check.error == 0 or check.span == 0:
            return ClosedFormStep(index, name, 0.0, skipped="the layer's output is the target already")
        if fit.is_zero:
            return ClosedFormStep(index, name, skipped="what enters the projection is zero or constant")
        solution = best_solution(fit, check, self.ridges)
        before = [tensor.clone() for tensor in (projection.matrix, projection.bias) if tensor is not None]
        self._write(projection, solution)
        # not the error that the sums predict: weights are rounded, and what follows the projection may not be linear
        after = sum(squared_distance(target, left) for _, left, target in self.validation.batches(index))
        worse = not after < check.error
        if worse:
            for tensor, old in zip((projection.matrix, projection.bias), before, strict=False):
                cast(Tensor, tensor).copy_(old)
        return ClosedFormStep(
            index,
            name,
            check.error / check.span,
            after / check.span,
            solution.ridge,
            solution.condition_bound,
            dtype,
            "the error on the validation rows would not go down" if worse else None,
        )

    def _write(self, projection: Projection, solution: Solution) -> None:
        matrix = projection.matrix
        weight = matrix.to(solution.change.dtype)
        # a fold's correction T - I acts on what the projection puts out
        matrix.copy_(weight + (solution.change @ weight if self.method == "fold" else solution.change))
        if projection.bias is not None and solution.shift is not None:
            projection.bias.copy_(projection.bias.to(solution.change.dtype) + solution.shift)

    def _sums(self, passes: LayerPasses, index: int, projection: Projection) -> RegressionSums:
        """The sums over a split for one projection."""
        width, entering = projection.matrix.shape
        features = width if self.method == "fold" else entering
        sums = RegressionSums(features, width, projection.bias is not None, projection.matrix.device)
        with _features(projection, self.method == "fold") as seen:
            for entered, left, target in passes.batches(index):
                sums.add(seen(), (target, left), entered, projection.scale)
        if not math.isfinite(sums.error + sums.span):
            rule = f"what enters and leaves layer {index} must be finite on the calibration text"
            raise ModelError.of("hidden states", sums.error, rule, "Check the weights, or load in bfloat16")
        return sums


@contextmanager
def _features(projection: Projection, put_out: bool) -> Iterator[Callable[[], Tensor]]:
    """What the last pass has let enter a projection, or what it has put out without its bias."""
    seen: list[Tensor] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        if put_out:
            seen[:] = [output.clone() if projection.bias is None else output - projection.bias]
        else:
            seen[:] = [args[0]]

    with hooked(after=[(projection.module, record)]):
        yield lambda: seen[0]
