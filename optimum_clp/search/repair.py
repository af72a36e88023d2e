"""Cuts scored as tuning will find them: after the closed form that it starts from, solved on a few of the search rows.

The cut that does least harm is not always the one that heals best. Solving costs about as much as a few passes through the
layers next to the cut, so only the best few by their untouched KL are repaired, all on the same rows, and judged on
others. `docs/search.md` has what it is worth.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architecture.lookup import decoder_layers, text_config
from ..closed_form.solver import ClosedFormResult, solve_endpoints
from ..errors import SearchError
from ..forward.dense_outputs import DenseOutputs
from ..forward.hooks import recorded_inputs, run_without_head
from ..forward.layer_stack import LayerStack
from ..segments import endpoint_layers, kept_layers, target_state
from ..surgery.cut import cut_model, own_storage
from .objective import Objective, gate_of
from .problem import SearchProblem
from .races import best_few, successive_halving
from .scoreboard import Cut
from .work import counted_flops

_FIT_SHARE, _CHECK_SHARE = 0.25, 0.125  # of the rows: solved on, and to choose the penalty; the others judge
# of the budget: the cuts as they are, where only some of them can be repaired, and where that is known already
_SCREEN_SHARE, _LOOK_SHARE = 0.4, 0.1
_LEAST_JUDGED = 0.25  # of the rows; fewer cuts are repaired where the budget does not pay for as many
_FEWEST = 2
_SOLUTIONS, _PENALTIES = 3, 4  # of one layer, and tried for each of them: for an estimate of the work


def race(problem: SearchProblem, cuts: Sequence[Cut], budget: float) -> Cut:
    """The best of some cuts: as they are, or after the repair that the recipe asks for.

    Args:
        problem ([`SearchProblem`]): Its `config.repair` says which; `config.num_rescored` cuts are repaired.
        cuts (`Sequence[Cut]`): At least one.
        budget (`float`): In forward-equivalents.

    Raises:
        SearchError: If there are too few rows to solve on some and to judge on others, or rows with padding.
    """
    if problem.config.repair == "none":
        return successive_halving(problem.board, cuts, problem.rows.all_from_here(), budget)
    end = problem.objective.spent + budget
    rows = RepairRows.of(problem)
    most = problem.config.num_rescored
    share = _SCREEN_SHARE if len(cuts) > most else _LOOK_SHARE
    finalists = best_few(problem.board, cuts, rows.judge, share * budget, most)
    return _best_repaired(problem, finalists, rows, end) if finalists else problem.board.best(cuts)


def every_one_repaired(problem: SearchProblem, cuts: Sequence[Cut]) -> Cut:
    """The best of some cuts after the repair, each on all rows that it is not solved on, whatever it costs.

    Raises:
        SearchError: As [`race`].
    """
    rows = RepairRows.of(problem)
    finite = best_few(problem.board, cuts, rows.judge, math.inf, len(cuts))
    return _best_repaired(problem, finite, rows, math.inf) if finite else problem.board.best(cuts)


@dataclass(frozen=True)
class RepairRows:
    """Which rows a repair is solved on, which choose its penalty, and which judge the cuts, no row twice."""

    fit: list[int]
    check: list[int]
    judge: list[int]

    @classmethod
    def of(cls, problem: SearchProblem) -> "RepairRows":
        """Drawn for a search; those that nobody has seen judge first."""
        objective, rows = problem.objective, problem.rows
        total = len(objective.tokens)
        fit, check = (max(1, round(share * total)) for share in (_FIT_SHARE, _CHECK_SHARE))
        if fit + check >= total:
            rule = "a repair is solved on some rows, its penalty is chosen on others, and others again judge it"
            raise SearchError.of("search.num_sequences", total, rule, "Give at least 3, or set search.repair='none'")
        if objective.mask is not None and not bool(objective.mask.all()):
            rule = "a repair is solved on full rows, and some of these have padding"
            raise SearchError.of("attention_mask", "with zeros", rule, "Give full rows, or set search.repair='none'")
        solved_on = rows.take(fit + check)
        return cls(solved_on[:fit], solved_on[fit:], rows.all_from_here()[: total - fit - check])


def _best_repaired(problem: SearchProblem, cuts: Sequence[Cut], rows: RepairRows, end: float) -> Cut:
    """The best after the repair; `cuts` are in order, and the last of them are left out if the work would pass `end`."""
    objective, board = problem.objective, problem.board
    seen = int(board.rows_of(cuts[0]).sum())
    fresh_first = rows.judge[seen:] + rows.judge[:seen]
    affordable = _rows_to_judge(objective, cuts, rows, end)
    while len(cuts) > _FEWEST and affordable < _LEAST_JUDGED * len(objective.tokens):
        cuts = cuts[:-1]
        affordable = _rows_to_judge(objective, cuts, rows, end)
    judge = fresh_first[: int(max(1, min(affordable, len(fresh_first))))]
    repairs = _Repairs(objective, cuts, RepairRows(rows.fit, rows.check, judge))
    for cut, kl in zip(cuts, repairs.judged(), strict=True):
        board.add_repaired(cut, judge, kl)
    return board.best(cuts, board.repaired)


def _rows_to_judge(objective: Objective, cuts: Sequence[Cut], rows: RepairRows, end: float) -> float:
    """How many rows some repaired cuts can be judged on, if they are solved for first."""
    total = len(objective.tokens)
    solving = sum(_estimated_solving(objective, cut, rows) for cut in cuts)
    states = objective.work.of(range(objective.num_layers), head=False) * (len(rows.fit) + len(rows.check)) / total
    one_row = (1 + sum(_judging(objective, cut) for cut in cuts)) / total
    return (end - objective.spent - solving - states) / one_row + 1e-9


def _judging(objective: Objective, cut: Cut) -> float:
    """Work of a pass of a repaired cut over all rows, from its first endpoint on, in forward-equivalents."""
    first = endpoint_layers(cut, objective.num_layers)[0]
    run = {first, *objective.stack.layers_run(gate_of(cut, objective.num_layers))}
    return objective.work.of(sorted(run))


def _estimated_solving(objective: Objective, cut: Cut, rows: RepairRows) -> float:
    """About what solving for a cut's endpoints will be, in forward-equivalents; what it was is counted."""
    width, length = text_config(objective.model.config).hidden_size, objective.tokens.shape[1]
    kept = kept_layers(cut, objective.num_layers)
    fit, check, flops = len(rows.fit), len(rows.check), 0.0
    for layer in (kept[i] for i in endpoint_layers(cut, objective.num_layers)):
        modules = objective.stack.layers[layer].modules()
        features = max(
            (m.in_features for m in modules if isinstance(m, nn.Linear) and m.out_features == width), default=0
        )
        passes = (fit + 2 * check) * objective.work.layers[layer]
        sums = 2 * (fit + check) * length * features * (features + width)
        systems = _PENALTIES * (features**3 / 3 + 2 * features**2 * width)
        flops += _SOLUTIONS * (passes + sums + systems)
    return flops / objective.work.forward / len(objective.tokens)


class _Repairs:
    """The closed form of some cuts, one after the other: there is never more than one cut's endpoints beside the model."""

    def __init__(self, objective: Objective, cuts: Sequence[Cut], rows: RepairRows):
        self.objective, self.cuts, self.rows = objective, cuts, rows

    def judged(self) -> list[list[float]]:
        """KL of each repaired cut on each row that judges, in nats per token."""
        objective, depth = self.objective, self.objective.num_layers
        wanted = set()
        for cut in self.cuts:
            layers, kept = endpoint_layers(cut, depth), kept_layers(cut, depth)
            wanted |= {layers[0], *(target_state(kept, i, depth) for i in layers)}
        options: dict[str, Any] = {"batch_size": objective.batch_size, "dealt": True, "quiet": objective.quiet}
        splits = [
            DenseOutputs(objective.model, objective.tokens[part], inputs_of=sorted(wanted), **options)
            for part in (self.rows.fit, self.rows.check, self.rows.judge)
        ]
        total, judge = len(objective.tokens), len(self.rows.judge)
        alone = objective.work.of(range(depth), head=False)
        objective.spend((len(self.rows.fit) + len(self.rows.check)) / total, alone, depth)
        objective.spend(judge / total, 1, depth)
        key = ["closed form", [[s.to_list() for s in cut] for cut in self.cuts], self.rows.fit, self.rows.check]

        def figures(which: list[int]) -> dict[str, Any]:
            return self._one(self.cuts[which[0]], splits)

        found = objective.over_rows([key, self.rows.judge], range(len(self.cuts)), 1, figures, "Repairing cuts")
        for cut, entry in zip(self.cuts, found, strict=True):
            objective.spend(1, entry["flops"] / objective.work.forward / total, entry["layer_rows"] / total)
            layers = depth - endpoint_layers(cut, depth)[0] - sum(map(len, cut))
            objective.spend(judge / total, _judging(objective, cut), layers)
        return [entry["kl"] for entry in found]

    def _one(self, cut: Cut, splits: Sequence[DenseOutputs]) -> dict[str, Any]:
        fit, check, judge = splits
        depth = self.objective.num_layers
        layers, kept = endpoint_layers(cut, depth), kept_layers(cut, depth)
        model = cut_model(self.objective.model, cut)
        for index in layers:
            own_storage(decoder_layers(model)[index])
        inputs = fit.hidden[layers[0]], check.hidden[layers[0]]
        size = self.objective.batch_size
        with torch.no_grad(), counted_flops() as counter:
            result = solve_endpoints(model, layers, kept, fit, check, inputs, batch_size=size, quiet=True)
        rows = _layer_rows(result, layers, len(self.rows.fit), len(self.rows.check))
        return {"kl": self._kl(model, layers[0], judge), "flops": counter.get_total_flops(), "layer_rows": rows}

    @torch.no_grad()
    def _kl(self, model: PreTrainedModel, first: int, judge: DenseOutputs) -> list[float]:
        """KL of each row, with passes that begin at the first layer that is not the dense model's."""
        stack, found = LayerStack(model), []
        last = len(stack)
        for rows in torch.arange(len(judge.tokens)).split(self.objective.micro_batch(1)):
            ids, dense = judge.tokens[rows], judge.hidden[self.objective.num_layers][rows].to(model.device)
            entering = judge.hidden[first][rows].to(model.device)
            with recorded_inputs(stack.layers, [last]) as states, stack.resumed(first, entering):
                run_without_head(model, ids)
            found += self.objective.figures(dense, [states[last]], ids)["kl"][0].tolist()
        return found


def _layer_rows(result: ClosedFormResult, layers: Sequence[int], fit: int, check: int) -> int:
    """Rows that went through a layer while a cut was solved for: for each solution, and on to the next endpoint."""
    return sum(fit + 2 * check for _ in result.steps) + (layers[-1] - layers[0]) * (fit + check)
