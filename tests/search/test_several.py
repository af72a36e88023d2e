import itertools
import random

import pytest
import torch
from searches import problem_of, settings
from tiny_models import make_identity, random_tokens, tiny_model
from zoo import ZOO, zoo_model

from optimum_clp.architecture.lookup import cut_obstacle
from optimum_clp.errors import ModelError, SearchError
from optimum_clp.search.enumeration import every_cut, number_of_cuts
from optimum_clp.search.segment_search import search_segments
from optimum_clp.search.several import _best_sums, _feasible, _integers_near
from optimum_clp.segments import LayerSegment, kept_layers


def runs_of(layers):
    """Segments of a set of layers, by another way than the package's."""
    runs = []
    for layer in sorted(layers):
        if runs and runs[-1][1] == layer:
            runs[-1][1] = layer + 1
        else:
            runs.append([layer, layer + 1])
    return tuple(LayerSegment(*r) for r in runs)


@pytest.mark.parametrize(("layers", "removed", "segments"), [(7, 3, 2), (8, 4, 3), (6, 2, 2), (9, 5, 1)])
def test_every_cut_is_every_choice_of_layers_in_so_few_runs(layers, removed, segments):
    model = tiny_model(num_layers=layers)
    problem = problem_of(model, random_tokens(2, 12), removed, num_segments=segments)
    choices = {runs_of(c) for c in itertools.combinations(range(layers), removed)}
    few = {c for c in choices if len(c) <= segments}
    assert set(every_cut(problem)) == few
    assert len(every_cut(problem)) == len(few) == number_of_cuts(layers, removed, segments)


@pytest.mark.parametrize("strategy", ["gate", "exhaustive", "halving", "auto"])
@pytest.mark.parametrize("planted", [((1, 3), (7, 8)), ((2, 3), (9, 11))])
def test_planted_identity_layers_in_two_places_are_found(strategy, planted):
    layers = [i for start, stop in planted for i in range(start, stop)]
    model = make_identity(tiny_model(num_layers=12), layers)
    result = search_segments(model, random_tokens(8, 24), 3, settings(strategy), num_segments=2, quiet=True)
    assert result.segments == tuple(LayerSegment(*p) for p in planted)
    assert result.score == pytest.approx(0, abs=1e-6)


def test_a_single_segment_is_chosen_where_it_is_better():
    model = make_identity(tiny_model(num_layers=12), [4, 5, 6])
    result = search_segments(model, random_tokens(8, 24), 3, settings("gate"), num_segments=3, quiet=True)
    assert result.segments == (LayerSegment(4, 7),)


def test_the_budget_is_for_each_parameter():
    model, tokens = tiny_model(num_layers=24), random_tokens(32, 16)
    config = settings("gate", num_sequences=32)
    for segments in (1, 2, 3):
        result = search_segments(model, tokens, 6, config, num_segments=segments, quiet=True)
        assert result.forward_equivalents <= 4 * (2 * segments - 1)
        assert len(result.scored) <= 5 * (2 * segments - 1)
        assert sum(map(len, result.segments)) == 6 and len(result.segments) <= segments
        for step in result.trajectory:
            assert sum(length for _, length in step.valleys) == pytest.approx(6)


def test_one_layer_is_one_segment():
    model, tokens = tiny_model(num_layers=8), random_tokens(8, 16)
    result = search_segments(model, tokens, 1, settings("gate"), num_segments=3, quiet=True)
    assert len(result.segments) == 1


def test_too_many_cuts_are_refused():
    problem = problem_of(tiny_model(num_layers=40), random_tokens(1, 8), 20, num_segments=4)
    count = number_of_cuts(40, 20, 4)
    with pytest.raises(SearchError, match=f"num_segments is 4: there are {count:,} ways to remove 20 of 40 layers"):
        every_cut(problem)


def test_only_cuts_that_are_exact_are_looked_at():
    jamba = next(tiny for tiny in ZOO if tiny.name == "jamba")
    model = zoo_model(jamba)
    depth = model.config.num_hidden_layers
    for strategy in ("gate", "exhaustive"):
        result = search_segments(model, random_tokens(4, 16), 2, settings(strategy), num_segments=2, quiet=True)
        for scored in result.scored:
            assert cut_obstacle(model.config, kept_layers(scored.segments, depth)) is None


def test_no_exact_cut_is_an_error(monkeypatch):
    problem = problem_of(tiny_model(), random_tokens(1, 8), 2, num_segments=2, allowed=[])
    monkeypatch.setattr("optimum_clp.search.problem.cut_obstacle", lambda config, kept: "a reason")
    with pytest.raises(ModelError, match="num_removed is 2: no 2 of the model's 6 layers can be removed exactly"):
        every_cut(problem)


def test_the_best_sums_are_those_of_brute_force(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    table = [[0.0] * 9] + [torch.rand(8 - n + 1, generator=generator).tolist() for n in range(1, 5)]
    monkeypatch.setattr("optimum_clp.search.several._cost_of_single_valleys", lambda problem: table)
    problem = problem_of(tiny_model(num_layers=8), random_tokens(1, 8), 4, num_segments=3)
    choices = {runs_of(c) for c in itertools.combinations(range(8), 4)}
    costs = {c: sum(table[len(s)][s.start] for s in c) for c in choices if len(c) <= 3}
    found = _best_sums(problem)
    assert len(found) == len(set(found))
    assert found[:10] == sorted(costs, key=lambda c: costs[c])[:10]


def test_feasible_valleys_keep_their_sum_and_a_layer_between_them():
    numbers = random.Random(0)
    for _ in range(500):
        count = numbers.choice([2, 3])
        lengths = [numbers.uniform(-1, 4) for _ in range(count)]
        if sum(lengths) < count:
            continue
        valleys = tuple((numbers.uniform(-3, 22), n) for n in lengths)
        fixed = _feasible(tuple(sorted(valleys)), 20)
        assert sum(n for _, n in fixed) == pytest.approx(sum(lengths))
        assert all(n >= 0.5 - 1e-9 for _, n in fixed) and fixed[0][0] >= 0
        assert fixed[-1][0] + fixed[-1][1] <= 20 + 1e-9
        for (s, n), (t, _) in itertools.pairwise(fixed):
            assert s + n + 1 <= t + 1e-9


def test_integers_near_real_valleys():
    problem = problem_of(tiny_model(num_layers=12), random_tokens(1, 8), 4, num_segments=2)
    found = _integers_near(((1.2, 1.6), (7.9, 2.4)), problem)
    assert found[0] == (LayerSegment(1, 3), LayerSegment(8, 10))
    assert all(sum(map(len, cut)) == 4 for cut in found)
    assert len(found) == len(set(found)) > 1
