"""Closed-form start of endpoint tuning: refit the output projections of the layers next to a cut by least squares.

The target is the dense model's hidden state behind the cut. No parameter is added: a linear map folded into a projection
(`"fold"`), or the projection refitted itself (`"least_squares"`). Only sums over tokens are kept, never the states of
all of them. `docs/recovery.md` gives the reasons, with figures.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigurationError, ModelError
from ..forward.dense_outputs import DenseOutputs, StateStore
from ..forward.hooks import (
    evaluation_mode,
    layer_hidden,
    layer_input,
    recorded_inputs,
    run_without_head,
    stopped_before,
)
from ..forward.layer_stack import LayerStack
from ..progress import progress_bar
from ..report.section import Key, to_section
from .ridge import RIDGES, RegressionSums, Solution, best_solution, squared_distance

METHODS = ("fold", "least_squares")
# roundings that a projection's output may meet on its way to the layer's
_ROUNDINGS = 4


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


def target_state(kept: Sequence[int], layer: int, num_layers: int) -> int:
    """Which of the dense model's hidden states a layer of the cut model should put out.

    Args:
        kept (`Sequence[int]`): Old indices of the layers that stay, ascending.
        layer (`int`): In the cut model's numbering.
        num_layers (`int`): Layers of the dense model.

    Returns:
        `int`: The dense layer that the state enters; `num_layers` for what leaves the last one.
    """
    return kept[layer + 1] if layer + 1 < len(kept) else num_layers


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
    indices = sorted(set(layers))
    solver = _Solver(model, indices[0], kept, (train, validation), inputs, method, ridges, batch_size, store)
    steps: list[ClosedFormStep] = []
    with torch.no_grad(), evaluation_mode(model), progress_bar(len(indices), "Closed form", quiet) as bar:
        for index in indices:
            solver.begin_at(index)
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


@dataclass(frozen=True)
class _Projection:
    """A linear module whose output, times `scale`, is added to the layer's output."""

    name: str
    module: nn.Module
    scale: float

    @property
    def matrix(self) -> Tensor:
        """The weight `[out, in]`, over its own storage."""
        weight = cast(Tensor, self.module.weight)
        return weight.T if isinstance(self.module, Conv1D) else weight

    @property
    def bias(self) -> Tensor | None:
        return cast(Tensor | None, self.module.bias)


class _Solver:
    """The loop of [`solve_endpoints`]. `0` and `1` stand for the train and the validation split."""

    def __init__(
        self,
        model: PreTrainedModel,
        first: int,
        kept: Sequence[int],
        outputs: tuple[DenseOutputs, DenseOutputs],
        inputs: tuple[Tensor, Tensor],
        method: str,
        ridges: Sequence[float],
        batch_size: int,
        store: StateStore | None,
    ):
        self.model, self.first, self.kept = model, first, kept
        self.outputs, self.inputs = outputs, inputs
        self.method, self.ridges, self.batch_size = method, ridges, batch_size
        self.stack, self.store = LayerStack(model), store or StateStore()
        self.owns_inputs = False

    def begin_at(self, index: int) -> None:
        """Let passes begin at a layer, with what enters it now that the layers below are solved."""
        if index == self.first:
            return
        if not self.owns_inputs:
            # those that were given are still needed when the endpoints are tuned
            train, validation = self.inputs
            self.inputs = self._copied(train), self._copied(validation)
            self.owns_inputs = True
        for split in (0, 1):
            for rows in self._rows(split):
                with recorded_inputs(self.stack.layers, [index]) as found, stopped_before(self.stack.layers[index]):
                    self._forward(split, rows)
                self.inputs[split][rows] = found[index].cpu()
        self.first = index

    def _copied(self, inputs: Tensor) -> Tensor:
        return self.store.allocate(inputs.shape, inputs.dtype).copy_(inputs)

    def solve_layer(self, index: int, attention: bool) -> list[ClosedFormStep]:
        """Solve a layer's projections, in place."""
        found = self._projections(index)
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

    def _solve(self, index: int, projection: _Projection) -> ClosedFormStep:
        fit, check = (self._moments(index, projection, split) for split in (0, 1))
        name, dtype = projection.name, str(fit.dtype).removeprefix("torch.")
        if check.error == 0 or check.span == 0:
            return ClosedFormStep(index, name, 0.0, skipped="the layer's output is the target already")
        if fit.is_zero:
            return ClosedFormStep(index, name, skipped="what enters the projection is zero or constant")
        solution = best_solution(fit, check, self.ridges)
        before = [tensor.clone() for tensor in (projection.matrix, projection.bias) if tensor is not None]
        self._write(projection, solution)
        # not the error that the sums predict: weights are rounded, and what follows the projection may not be linear
        after = self._error(index)
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

    def _write(self, projection: _Projection, solution: "Solution") -> None:
        matrix = projection.matrix
        weight = matrix.to(solution.change.dtype)
        # a fold's correction T - I acts on what the projection puts out
        matrix.copy_(weight + (solution.change @ weight if self.method == "fold" else solution.change))
        if projection.bias is not None and solution.shift is not None:
            projection.bias.copy_(projection.bias.to(solution.change.dtype) + solution.shift)

    def _moments(self, index: int, projection: _Projection, split: int) -> "RegressionSums":
        """The sums over a split for one projection."""
        width, features = projection.matrix.shape
        moments = RegressionSums(
            features if self.method == "least_squares" else width,
            width,
            projection.bias is not None,
            projection.matrix.device,
        )
        seen: list[Tensor] = []

        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if self.method == "least_squares":
                seen[:] = [args[0]]
            else:
                seen[:] = [output.clone() if projection.bias is None else output - projection.bias]

        with _hooked(projection.module, hook):
            for entered, left, target in self._batches(index, split):
                moments.add(seen[0], (target, left), entered, projection.scale)
        if not math.isfinite(moments.error + moments.span):
            rule = f"what enters and leaves layer {index} must be finite on the calibration text"
            raise ModelError.of("hidden states", moments.error, rule, "Check the weights, or load in bfloat16")
        return moments

    def _error(self, index: int) -> float:
        """The summed square of `target - output` over the validation rows."""
        return sum(squared_distance(target, left) for _, left, target in self._batches(index, 1))

    def _batches(self, index: int, split: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What enters and what leaves a layer, and what should leave it, batch by batch."""
        outputs = self.outputs[split]
        targets = outputs.hidden[target_state(self.kept, index, len(outputs.stack))]
        for rows in self._rows(split):
            entered, left = self._run(index, split, rows)
            yield entered, left, targets[rows].to(left.device)

    def _rows(self, split: int) -> Sequence[Tensor]:
        return torch.arange(len(self.outputs[split].tokens)).split(self.batch_size)

    def _forward(self, split: int, rows: Tensor) -> None:
        """Run the model from the first layer on, for what hooks see."""
        with self.stack.resumed(self.first, self.inputs[split][rows].to(self.model.device)):
            run_without_head(self.model, self.outputs[split].tokens[rows])

    def _run(self, index: int, split: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What enters and what leaves a layer, `[batch, length, hidden]`."""
        seen: list[Tensor] = []

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            seen[:] = [layer_input(args, kwargs), layer_hidden(output)]

        with ExitStack() as stack:
            stack.callback(self.stack.layers[index].register_forward_hook(hook, with_kwargs=True).remove)
            if index + 1 < len(self.stack):
                stack.enter_context(stopped_before(self.stack.layers[index + 1]))
            self._forward(split, rows)
        return seen[0], seen[1]

    def _projections(self, index: int) -> list[_Projection] | str:
        """The modules that add to a layer's output, the last to be called first; or why the last one does not.

        Names tell nothing: every candidate's output is disturbed, and what leaves the layer has to follow. What an
        earlier one (attention) does by way of the later ones is left out: their outputs are held as they were.
        """
        row = torch.arange(1)
        candidates = {n: m for n, m in self.stack.layers[index].named_modules() if isinstance(m, (nn.Linear, Conv1D))}
        calls: list[tuple[str, Tensor]] = []

        def note(name: str) -> Callable[[nn.Module, tuple, Any], None]:
            def hook(module: nn.Module, args: tuple, output: Any) -> None:
                # routers are linear modules too, and may put out several tensors
                if isinstance(output, Tensor):
                    # some layers add to it in place (Falcon)
                    calls.append((name, output.clone()))

            return hook

        with ExitStack() as stack:
            for name, module in candidates.items():
                stack.enter_context(_hooked(module, note(name)))
            _, left = self._run(index, 1, row)
        width = left.shape[-1]
        calls = [(name, output) for name, output in reversed(calls) if output.shape[-1] == width]
        if not calls:
            return f"no linear module in it puts out {width} features"
        found: list[_Projection] = []
        reasons: list[str] = []
        with ExitStack() as held:
            for name, output in calls:
                projection = self._test(index, name, candidates[name], left, output, [n for n, _ in calls])
                if isinstance(projection, str):
                    reasons.append(projection)
                else:
                    found.append(projection)
                    held.enter_context(_hooked(projection.module, _giving(output)))
        return found or reasons[0]

    def _test(
        self, index: int, name: str, module: nn.Module, left: Tensor, output: Tensor, called: list[str]
    ) -> _Projection | str:
        """The module as a projection, or why it is none."""
        weight = cast(Tensor, module.weight)
        elsewhere = (p for i, layer in enumerate(self.stack.layers) if i != index for p in layer.parameters())
        if any(p is weight for p in elsewhere):
            return f"{name} is shared with other layers"
        if called.count(name) > 1 or output.numel() != left.numel() or left.dim() != 3:
            return f"{name} is not called once for all tokens"
        if not weight.is_floating_point() or weight.is_meta:
            return f"the weight of {name} is not a plain matrix in memory"
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(left.shape, generator=generator).to(left)
        # as large as the state itself at every token, some of which have states hundreds of times larger than others
        disturbance = noise * left.float().square().mean(-1, keepdim=True).sqrt().to(left)
        with _hooked(module, _giving((output + disturbance.reshape(output.shape)).to(output.dtype))):
            _, moved = self._run(index, 1, torch.arange(1))
        given, came = disturbance.double().cpu(), (moved.double() - left.double()).cpu()
        scale = float((given * came).sum() / given.square().sum())
        sizes = sum(x.double().norm(dim=-1).cpu() for x in (left, moved, output.reshape(left.shape), disturbance))
        allowed = _ROUNDINGS * torch.finfo(left.dtype).eps * sizes
        followed = (came - scale * given).norm(dim=-1) <= allowed
        if not followed.all() or not (abs(scale) * given.norm(dim=-1) > allowed).all():
            return (
                f"the output of {name} is not simply added to the layer's (a norm, a gate or an expert lies between)"
            )
        return _Projection(name, module, scale)


@contextmanager
def _hooked(module: nn.Module, hook: Callable) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _giving(value: Tensor) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    return lambda module, args, output: value.clone()
