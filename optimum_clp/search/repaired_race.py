"""A race in which the best cuts are scored after a cheap repair, as tuning will find them.

The cut that does least harm is not always the one that heals best. A repair has a price, so only the best few by their
untouched KL get one, all fitted on the same rows, and judged on others. `docs/search.md` has what it is worth.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import SearchError
from ..forward.dense_outputs import DenseOutputs
from ..forward.hooks import only_trainable, recorded_inputs, run_without_head
from ..forward.layer_stack import LayerStack
from ..segments import kept_layers
from .objective import Objective, gate_of
from .problem import SearchProblem
from .races import best_few, successive_halving
from .repair import ClosedFormRepair, LinearMapRepair, Repair
from .scoreboard import Cut
from .work import counted_flops

_FIT_SHARE, _CHECK_SHARE = 0.25, 0.125  # of the rows: fitted on, and to choose the penalty; the others judge
# of the budget: the cuts as they are, where only some of them can be repaired, and where all are anyway
_SCREEN_SHARE, _LOOK_SHARE = 0.4, 0.1
_LEAST_JUDGED = 0.25  # of the rows; fewer cuts are repaired where the budget does not pay for as many
_FEWEST = 2
_REPAIRS: dict[str, type[Repair]] = {"closed_form": ClosedFormRepair, "linear_map": LinearMapRepair}


def race(problem: SearchProblem, cuts: Sequence[Cut], budget: float) -> Cut:
    """The best of some cuts: as they are, or after the repair that the recipe asks for.

    Args:
        problem ([`SearchProblem`]): Its `config.repair` says which; at most `config.num_rescored` cuts are repaired.
        cuts (`Sequence[Cut]`): At least one.
        budget (`float`): In forward-equivalents.

    Raises:
        SearchError: If there are too few rows to fit on some and to judge on others, or rows with padding.
    """
    if problem.config.repair == "none":
        return successive_halving(problem.board, cuts, problem.rows.all_from_here(), budget)
    end = problem.objective.spent + budget
    rows, most = RepairRows.of(problem), problem.config.num_rescored
    share = _SCREEN_SHARE if len(cuts) > most else _LOOK_SHARE
    finalists = best_few(problem.board, cuts, rows.judge, share * budget, most)
    return _best_repaired(problem, finalists, rows, end) if finalists else problem.board.best(cuts)


def every_one_repaired(problem: SearchProblem, cuts: Sequence[Cut]) -> Cut:
    """The best of some cuts after the repair, each on all rows that it is not fitted on, whatever it costs.

    Raises:
        SearchError: As [`race`].
    """
    rows = RepairRows.of(problem)
    finite = best_few(problem.board, cuts, rows.judge, math.inf, len(cuts))
    return _best_repaired(problem, finite, rows, math.inf) if finite else problem.board.best(cuts)


@dataclass(frozen=True)
class RepairRows:
    """Numbers of the rows that a repair is fitted on, that choose its penalty, and that judge the cuts; none twice."""

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
            rule = "a repair is fitted on some rows, its penalty is chosen on others, and others again judge it"
            raise SearchError.of("search.num_sequences", total, rule, "Give at least 3, or set search.repair='none'")
        if objective.mask is not None and not bool(objective.mask.all()):
            rule = "a repair is fitted on full rows, and some of these have padding"
            raise SearchError.of("attention_mask", "with zeros", rule, "Give full rows, or set search.repair='none'")
        fitted_on = rows.take(fit + check)
        return cls(fitted_on[:fit], fitted_on[fit:], rows.all_from_here()[: total - fit - check])


def _best_repaired(problem: SearchProblem, cuts: Sequence[Cut], rows: RepairRows, end: float) -> Cut:
    """The best after the repair; `cuts` are in order, and the last of them are left out if the work would pass `end`."""
    objective, board = problem.objective, problem.board
    repair = _REPAIRS[problem.config.repair](objective)
    seen = int(board.rows_of(cuts[0]).sum())
    fresh_first = rows.judge[seen:] + rows.judge[:seen]
    affordable = _rows_to_judge(objective, repair, cuts, rows, end)
    while len(cuts) > _FEWEST and affordable < _LEAST_JUDGED * len(objective.tokens):
        cuts = cuts[:-1]
        affordable = _rows_to_judge(objective, repair, cuts, rows, end)
    judge = fresh_first[: int(max(1, min(affordable, len(fresh_first))))]
    judged = _judged(objective, repair, cuts, RepairRows(rows.fit, rows.check, judge), problem.config.repair)
    for cut, kl in zip(cuts, judged, strict=True):
        board.add_repaired(cut, judge, kl)
    return board.best(cuts, board.repaired)


def _rows_to_judge(objective: Objective, repair: Repair, cuts: Sequence[Cut], rows: RepairRows, end: float) -> float:
    """How many rows some repaired cuts can be judged on, after they are fitted."""
    total, fit, check = len(objective.tokens), len(rows.fit), len(rows.check)
    fitting = sum(repair.flops(cut, fit, check) for cut in cuts) / objective.work.forward / total
    dense, head = objective.work.of(range(objective.num_layers), head=False), objective.work.of([])
    # the dense model's logits are made again for each cut: those of all rows would be too much to keep
    judging = dense + sum(objective.work.of(_layers_run(objective, repair, cut)) + head for cut in cuts)
    return (end - objective.spent - fitting - dense * (fit + check) / total) * total / judging + 1e-9


def _layers_run(objective: Objective, repair: Repair, cut: Cut) -> list[int]:
    """The dense model's layers that a pass of a repaired cut runs."""
    kept, first = kept_layers(cut, objective.num_layers), repair.first(cut)
    return sorted({*kept[first : first + 1], *objective.stack.layers_run(gate_of(cut, objective.num_layers))})


def _judged(
    objective: Objective, repair: Repair, cuts: Sequence[Cut], rows: RepairRows, name: str
) -> list[list[float]]:
    """KL of each repaired cut on each row that judges, in nats per token. One cut's repair exists at a time."""
    total, depth = len(objective.tokens), objective.num_layers
    wanted = sorted(set().union(*(repair.states(cut) for cut in cuts)))
    options: dict[str, Any] = {"batch_size": objective.batch_size, "dealt": True, "quiet": objective.quiet}
    options["residence"] = objective.residence
    fit, check, judge = (
        DenseOutputs(objective.model, objective.tokens[part], inputs_of=wanted, **options)
        for part in (rows.fit, rows.check, rows.judge)
    )
    seen = len(rows.fit) + len(rows.check) + len(rows.judge)
    objective.spend(seen / total, objective.work.of(range(depth), head=False), depth)

    def figures(which: list[int]) -> dict[str, Any]:
        cut = cuts[which[0]]
        with torch.no_grad(), only_trainable(objective.model, ()), counted_flops() as counter:
            with repair.applied(cut, fit, check) as (model, layer_rows):
                kl = _kl(objective, model, repair.first(cut), judge)
        return {"kl": kl, "flops": counter.get_total_flops(), "layer_rows": layer_rows}

    key = [name, [[s.to_list() for s in cut] for cut in cuts], rows.fit, rows.check, rows.judge]
    found = objective.over_rows(key, range(len(cuts)), 1, figures, "Repairing cuts")
    for cut, entry in zip(cuts, found, strict=True):
        layers = entry["layer_rows"] + len(rows.judge) * len(_layers_run(objective, repair, cut))
        objective.spend(1 / total, entry["flops"] / objective.work.forward, layers)
    return [entry["kl"] for entry in found]


def _kl(objective: Objective, model: PreTrainedModel, first: int, judge: DenseOutputs) -> list[float]:
    """KL of each row, with passes that begin at the first layer that is not the dense model's."""
    stack, found = LayerStack(model), []
    last = len(stack)
    for rows in torch.arange(len(judge.tokens)).split(objective.micro_batch(1)):
        ids, dense = judge.tokens[rows], judge.hidden[objective.num_layers][rows].to(model.device)
        entering = judge.hidden[first][rows].to(model.device)
        with recorded_inputs(stack.layers, [last]) as states, stack.resumed(first, entering):
            run_without_head(model, ids)
        found += objective.figures(dense, [states[last]], ids)["kl"][0].tolist()
    return found
