import copy

import pytest
import torch
from searches import problem_of, settings
from tiny_models import random_tokens, tiny_model
from torch import nn

from optimum_clp.architecture.lookup import decoder_layers
from optimum_clp.closed_form.ridge import RIDGES
from optimum_clp.closed_form.solver import solve_endpoints
from optimum_clp.errors import SearchError
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.forward.losses import kl_divergence
from optimum_clp.search.problem import Rows
from optimum_clp.search.repaired_race import RepairRows, race
from optimum_clp.search.segment_search import search_segments
from optimum_clp.search.work import counted_flops
from optimum_clp.segments import LayerSegment, endpoint_layers, kept_layers
from optimum_clp.surgery.cut import cut_model, own_storage

HEALED, HARMLESS = (LayerSegment(2, 3),), (LayerSegment(4, 5),)


def model_that_heals():
    """Without layer 2 much is lost, and layer 1, which does nothing, can do all of it; without layer 4 little is lost."""
    model = tiny_model(num_layers=6)
    layers = model.model.layers
    with torch.no_grad():
        for index in (1, 2):
            layers[index].self_attn.o_proj.weight.zero_()
        layers[2].mlp.gate_proj.weight.copy_(layers[1].mlp.gate_proj.weight)
        layers[2].mlp.up_proj.weight.copy_(layers[1].mlp.up_proj.weight)
        layers[2].mlp.down_proj.weight *= 2
        layers[1].mlp.down_proj.weight.zero_()
        for module in (layers[4].self_attn.o_proj, layers[4].mlp.down_proj):
            module.weight *= 0.5
    return model


def repaired(strategy="halving", **overrides):
    return settings(strategy, **{"num_sequences": 16, "repair": "closed_form", "budget": 30.0, **overrides})


def test_the_cut_that_heals_is_chosen_and_without_a_repair_the_one_that_does_less_harm():
    model, tokens = model_that_heals(), random_tokens(16, 24)
    chosen = {}
    for config in (settings("halving", num_sequences=16, budget=30.0), repaired()):
        problem = problem_of(model, tokens, 1, config=config)
        chosen[config.repair] = race(problem, [HEALED, HARMLESS], problem.budget)
    assert chosen == {"none": HARMLESS, "closed_form": HEALED}
    kl, after = problem.board.mean(HEALED), problem.board.mean(HEALED, problem.board.repaired)
    assert kl > problem.board.mean(HARMLESS) and after < 0.05 * kl


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_repaired_cut_is_scored_as_the_repaired_model_by_whole_passes(model_type):
    model, tokens = tiny_model(model_type, num_layers=6), random_tokens(16, 20)
    result = search_segments(model, tokens, 2, repaired("exhaustive"), seed=3, quiet=True)
    order = Rows(16, 3).order
    fit, check, judge = (tokens[rows] for rows in (order[:4], order[4:6], order[6:]))
    assert len(result.scored) == 5
    for scored in result.scored:
        cut, layers = cut_model(model, scored.segments), endpoint_layers(scored.segments, 6)
        for index in layers:
            own_storage(decoder_layers(cut)[index])
        outputs = [DenseOutputs(model, rows, inputs_of=range(6)) for rows in (fit, check)]
        # what enters the first endpoint, by a pass of the cut model's own
        inputs = tuple(DenseOutputs(cut, rows, inputs_of=layers[:1]).hidden[layers[0]] for rows in (fit, check))
        solve_endpoints(cut, layers, kept_layers(scored.segments, 6), *outputs, inputs, batch_size=4, quiet=True)
        truth = evaluate_tokens(cut, judge, reference=DenseOutputs(model, judge)).kl
        assert scored.repaired_kl == pytest.approx(truth, rel=1e-4)
    best = min(result.scored, key=lambda scored: scored.repaired_kl)
    assert result.segments == best.segments and best.repaired_kl < best.kl


class Added(nn.Module):
    """A layer that adds a linear function of the states."""

    def __init__(self, matrix, shift):
        super().__init__()
        self.matrix, self.shift = matrix, shift

    def forward(self, hidden, *args, **kwargs):
        return hidden + hidden @ self.matrix.T + self.shift


def ridge(entering, leaving, penalty):
    """What is to be added: least squares with rows for the penalty, around the means."""
    x, y = entering.double().flatten(0, 1), (leaving.double() - entering.double()).flatten(0, 1)
    centred = x - x.mean(0)
    rows = (penalty * centred.square().sum() / x.shape[1]).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
    stacked = torch.cat([centred, rows]), torch.cat([y - y.mean(0), torch.zeros_like(rows)])
    matrix = torch.linalg.lstsq(*stacked).solution.T
    return matrix, y.mean(0) - matrix @ x.mean(0)


def test_a_linear_map_is_scored_as_a_layer_that_adds_it():
    model, tokens = tiny_model(num_layers=6), random_tokens(16, 20)
    cuts = [((0, 2),), ((2, 4),), ((4, 6),), ((1, 2), (3, 4))]
    cuts = [tuple(LayerSegment(*bounds) for bounds in cut) for cut in cuts]
    problem = problem_of(model, tokens, 2, num_segments=2, config=repaired(repair="linear_map"))
    chosen = race(problem, cuts, 1e9)
    order = problem.rows.order
    fit, check, judge = (tokens[rows] for rows in (order[:4], order[4:6], order[6:]))
    states = [DenseOutputs(model, rows, inputs_of=range(6)).hidden for rows in (fit, check)]
    for cut in cuts:
        added, layers = {}, list(model.model.layers)
        for segment in cut:
            (x, y), (x_check, y_check) = ((hidden[segment.start], hidden[segment.stop]) for hidden in states)
            found = [ridge(x, y, penalty) for penalty in RIDGES]
            errors = [(y_check - x_check - x_check.double() @ m.T - b).square().sum().item() for m, b in found]
            added[segment.start] = found[errors.index(min(errors))]
        gone = {i for segment in cut for i in range(segment.start, segment.stop)}
        repaired_model = copy.deepcopy(model)
        repaired_model.model.layers = nn.ModuleList(
            Added(*(part.float() for part in added[i])) if i in added else layer
            for i, layer in enumerate(layers)
            if i in added or i not in gone
        )
        repaired_model.config.num_hidden_layers = len(repaired_model.model.layers)
        with torch.no_grad():
            truth = kl_divergence(model(judge).logits, repaired_model(judge, use_cache=False).logits).mean()
        assert problem.board.mean(cut, problem.board.repaired) == pytest.approx(truth.item(), rel=1e-3)
    assert chosen == min(cuts, key=lambda cut: problem.board.mean(cut, problem.board.repaired))


@pytest.mark.parametrize("strategy", ["auto", "gate", "halving"])
def test_the_budget_holds_with_a_repair(strategy):
    model, tokens = tiny_model(num_layers=24, vocab_size=1000), random_tokens(32, 16)
    config = settings(strategy, num_sequences=32, repair="closed_form")
    result = search_segments(model, tokens, 5, config, quiet=True)
    assert result.forward_equivalents <= 4
    assert 2 <= sum(scored.repaired_kl is not None for scored in result.scored) <= 5
    # a shallow model takes the race too: what exhaustive search of all cuts would cost is not what repairs do
    assert result.used_strategy == {"auto": "halving"}.get(strategy, strategy)


@pytest.mark.parametrize("repair", ["linear_map", "closed_form"])
def test_the_work_of_a_repair_is_counted_as_it_is_done(repair):
    model, tokens = tiny_model(num_layers=8, vocab_size=2000), random_tokens(16, 24)
    problem = problem_of(model, tokens, 2, config=repaired(repair=repair))
    cuts, before = [(LayerSegment(s, s + 2),) for s in (1, 4)], problem.objective.spent
    with counted_flops() as counter:
        race(problem, cuts, 30.0)
    spent = (problem.objective.spent - before) * problem.objective.work.forward * len(tokens)
    assert spent == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_the_model_is_left_as_it_was_and_the_search_comes_out_the_same_again():
    model, tokens = tiny_model(), random_tokens(16, 12)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = [search_segments(model, tokens, 2, repaired(), seed=5, quiet=True) for _ in range(2)]
    assert found[0] == found[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__]
    section = found[0].to_dict()["scored"]
    assert all(
        ("repaired_kl" in entry) == (s.repaired_kl is not None)
        for entry, s in zip(section, found[0].scored, strict=True)
    )


def test_an_interrupted_search_does_not_repair_again(tmp_path, monkeypatch):
    model, tokens = tiny_model(), random_tokens(16, 12)
    whole = search_segments(model, tokens, 2, repaired(), quiet=True)
    calls = []

    def solve(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return solve_endpoints(*args, **kwargs)

    monkeypatch.setattr("optimum_clp.search.repair.solve_endpoints", solve)
    journal = tmp_path / "journal.jsonl"
    with pytest.raises(KeyboardInterrupt):
        search_segments(model, tokens, 2, repaired(), journal=journal, quiet=True)
    again = search_segments(model, tokens, 2, repaired(), journal=journal, quiet=True)
    assert again == whole and len(calls) == 3 + len([s for s in whole.scored if s.repaired_kl is not None]) - 2


@pytest.mark.parametrize("num_rows", [3, 8, 32])
def test_no_row_is_fitted_on_and_judged_by(num_rows):
    problem = problem_of(tiny_model(), random_tokens(num_rows, 12), 2)
    problem.rows.take(1)
    rows = RepairRows.of(problem)
    assert sorted([*rows.fit, *rows.check, *rows.judge]) == list(range(num_rows))
    assert min(map(len, (rows.fit, rows.check, rows.judge))) >= 1


def test_rows_that_a_repair_cannot_be_fitted_on_are_refused():
    with pytest.raises(
        SearchError, match=r"search.num_sequences is 2: a repair is fitted on some rows.* Give at least 3"
    ):
        search_segments(tiny_model(), random_tokens(2, 12), 2, repaired(), quiet=True)
    mask = torch.ones(16, 12, dtype=torch.long)
    mask[3, 5:] = 0
    with pytest.raises(SearchError, match=r"attention_mask.*some of these have padding"):
        search_segments(tiny_model(), random_tokens(16, 12), 2, repaired(), attention_mask=mask, quiet=True)
