"""Cheap repairs of a cut, fitted on a few rows, so that the search can score it nearer to what tuning makes of it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architecture.lookup import decoder_layers, text_config
from ..closed_form.ridge import RIDGES, RegressionSums, Solution, best_solution
from ..closed_form.solver import solve_endpoints
from ..forward.dense_outputs import DenseOutputs
from ..forward.hooks import hooked, layer_hidden, layer_input
from ..segments import LayerSegment, endpoint_layers, kept_layers, target_state
from ..surgery.cut import cut_model, own_storage
from .objective import Objective
from .scoreboard import Cut


class Repair(Protocol):
    """What is done to a cut before it is scored. Made with the objective whose dense model is cut."""

    def __init__(self, objective: Objective): ...

    def states(self, cut: Cut) -> set[int]:
        """The dense layers whose inputs it is fitted to, and the one that [`~Repair.first`] names; the number of layers for
        what leaves the last one."""
        ...

    def first(self, cut: Cut) -> int:
        """The first layer of the cut model that the repair changes: below it, all is the dense model's."""
        ...

    def flops(self, cut: Cut, fit: int, check: int) -> float:
        """About what fitting it to so many rows takes, in floating-point operations; a little too much rather than less."""
        ...

    @contextmanager
    def applied(self, cut: Cut, fit: DenseOutputs, check: DenseOutputs) -> Iterator[tuple[PreTrainedModel, float]]:
        """The repaired cut model for as long as the block lasts; the dense model's weights stay as they are.

        Args:
            cut (`Cut`): What goes.
            fit ([`DenseOutputs`]): Rows to fit on, with the hidden states of [`~Repair.states`].
            check ([`DenseOutputs`]): Rows that choose the penalty, alike.

        Yields:
            `tuple[PreTrainedModel, float]`: The model; rows that went through a layer for it.
        """
        ...


class ClosedFormRepair:
    """`closed_form`: the output projections of the layers next to the cut solved for, as tuning starts."""

    def __init__(self, objective: Objective):
        self.objective, self.depth = objective, objective.num_layers

    def states(self, cut: Cut) -> set[int]:
        kept = kept_layers(cut, self.depth)
        targets = {target_state(kept, i, self.depth) for i in endpoint_layers(cut, self.depth)}
        return {self.first(cut), *targets}

    def first(self, cut: Cut) -> int:
        return endpoint_layers(cut, self.depth)[0]

    def flops(self, cut: Cut, fit: int, check: int) -> float:
        solutions, rows_looked_at = (
            3,
            10,
        )  # of a layer: its last projection twice; to see which modules can be solved for
        width, length = text_config(self.objective.model.config).hidden_size, self.objective.tokens.shape[1]
        kept, total = kept_layers(cut, self.depth), 0.0
        for layer in (kept[i] for i in endpoint_layers(cut, self.depth)):
            linear = (m for m in self.objective.stack.layers[layer].modules() if isinstance(m, nn.Linear))
            features = max((m.in_features for m in linear if m.out_features == width), default=0)
            one_row = self.objective.work.layers[layer]
            solving = (fit + 2 * check) * one_row + _regression_flops(features, width, (fit + check) * length)
            total += solutions * solving + rows_looked_at * one_row
        return total

    @contextmanager
    def applied(self, cut: Cut, fit: DenseOutputs, check: DenseOutputs) -> Iterator[tuple[PreTrainedModel, float]]:
        model, kept = cut_model(self.objective.model, cut), kept_layers(cut, self.depth)
        layers = endpoint_layers(cut, self.depth)
        for index in layers:
            own_storage(decoder_layers(model)[index])
        inputs = fit.hidden[layers[0]], check.hidden[layers[0]]
        size = self.objective.batch_size
        result = solve_endpoints(model, layers, kept, fit, check, inputs, batch_size=size, quiet=True)
        rows = len(fit.tokens) + len(check.tokens)
        solved = len(result.steps) * (rows + len(check.tokens))
        yield model, solved + (layers[-1] - layers[0]) * rows


class LinearMapRepair:
    """`linear_map`: between the layers on both sides of a gap, a ridge map from the dense state that enters the gap to the one
    that leaves it. It is for scoring alone: the cut model has no such map."""

    def __init__(self, objective: Objective):
        self.objective, self.depth = objective, objective.num_layers

    def states(self, cut: Cut) -> set[int]:
        return {bound for segment in cut for bound in (segment.start, segment.stop)}

    def first(self, cut: Cut) -> int:
        return cut[0].start

    def flops(self, cut: Cut, fit: int, check: int) -> float:
        width, length = text_config(self.objective.model.config).hidden_size, self.objective.tokens.shape[1]
        return len(cut) * _regression_flops(width, width, (fit + check) * length)

    @contextmanager
    def applied(self, cut: Cut, fit: DenseOutputs, check: DenseOutputs) -> Iterator[tuple[PreTrainedModel, float]]:
        model, kept = cut_model(self.objective.model, cut), kept_layers(cut, self.depth)
        layers, size = decoder_layers(model), self.objective.batch_size
        with ExitStack() as maps:
            for segment in cut:
                solution = _map_across(segment, fit, check, size)
                if segment.stop == self.depth:
                    maps.enter_context(hooked(after=[(layers[-1], _maps_output(solution))]))
                else:
                    behind = layers[kept.index(segment.stop)]
                    maps.enter_context(hooked(before=[(behind, _maps_input(solution))]))
            yield model, 0


def _regression_flops(features: int, width: int, tokens: int) -> float:
    """Of the sums of a regression, and of its solutions for all penalties that may be tried."""
    systems = len(RIDGES) * (features**3 / 3 + 2 * features**2 * width)
    return 2 * tokens * features * (features + width) + systems


def _map_across(segment: LayerSegment, fit: DenseOutputs, check: DenseOutputs, batch_size: int) -> Solution:
    """What is to be added to the state that enters a segment, as a linear function of it."""

    def sums(outputs: DenseOutputs) -> RegressionSums:
        entering, leaving = outputs.hidden[segment.start], outputs.hidden[segment.stop]
        width, device = entering.shape[-1], outputs.model.device
        found = RegressionSums(width, width, True, device)
        for state, target in zip(entering.split(batch_size), leaving.split(batch_size), strict=True):
            state = state.to(device)
            found.add(state, (target.to(device), state), state, 1.0)
        return found

    return best_solution(sums(fit), sums(check), RIDGES)


def _mapped(hidden: Tensor, solution: Solution) -> Tensor:
    """In float32: states of 16 bits are hundreds of times larger at some tokens than at others."""
    change, shift = solution.change.to(hidden.device, torch.float32), solution.shift
    assert shift is not None
    added = hidden.float() @ change.T + shift.to(change)
    return (hidden.float() + added).to(hidden.dtype)


def _maps_input(solution: Solution) -> Any:
    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden = _mapped(layer_input(args, kwargs), solution)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    return enter


def _maps_output(solution: Solution) -> Any:
    def leave(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        hidden = _mapped(layer_hidden(output), solution)
        return type(output)((hidden, *output[1:])) if isinstance(output, (tuple, list)) else hidden

    return leave
