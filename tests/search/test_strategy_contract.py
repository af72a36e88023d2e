"""What every strategy of the registry has to do: the built-in ones, and those of other packages that are installed.

A new built-in strategy gets a row in `RANKS`: whether it ranks single layers.
"""

import functools
import json
import math

import pytest
import torch
from searches import problem_of, settings
from tiny_models import random_tokens, tiny_model
from zoo import ZOO, zoo_model

from optimum_clp.architecture.lookup import allowed_segments, num_layers
from optimum_clp.doors import STRATEGIES
from optimum_clp.errors import ConfigurationError
from optimum_clp.registry import Registry
from optimum_clp.search import search_segments
from optimum_clp.search.problem import SearchOutcome, cut_of
from optimum_clp.segments import check_segments, kept_layers
from optimum_clp.surgery.cut import cut_model

# whether it gives an importance of each layer
RANKS = {
    "auto": False,
    "gate": False,
    "exhaustive": False,
    "halving": False,
    "block_influence": True,
    "angular": False,
    "cosine_block": False,
    "taylor": True,
    "perplexity_greedy": False,
    "tail": False,
    "random": False,
}


def outcome_of(name, model, tokens, num_removed, **options):
    problem = problem_of(model, tokens, num_removed, config=settings(name), **options)
    return STRATEGIES.get(name)(problem)


@functools.cache
def member_of_the_zoo(name):
    (tiny,) = [tiny for tiny in ZOO if tiny.name == name]
    return zoo_model(tiny)


def check_cut(cut, model, num_removed):
    """It is made of segments in order, none of which touch, and can be cut exactly."""
    count = num_layers(model.config)
    assert check_segments(cut, count) == cut and sum(map(len, cut)) == num_removed
    smaller = cut_model(model, cut)
    assert num_layers(smaller.config) == count - num_removed == len(kept_layers(cut, count))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(("num_removed", "num_segments"), [(1, 1), (3, 1), (3, 2)])
def test_as_many_layers_as_are_asked_for_are_chosen(name, num_removed, num_segments):
    model, tokens = tiny_model(num_layers=7), random_tokens(4, 12)
    outcome = outcome_of(name, model, tokens, num_removed, num_segments=num_segments)
    check_cut(outcome.cut, model, num_removed)
    assert outcome.used_strategy is None or outcome.used_strategy in STRATEGIES


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(
    ("member", "num_removed", "num_segments"),
    [("jamba", 2, 1), ("zamba", 3, 1), ("modernbert-decoder", 2, 2)],
)
def test_only_what_can_be_cut_is_chosen(name, member, num_removed, num_segments):
    """Of these models not every cut is exact."""
    model, tokens = member_of_the_zoo(member), random_tokens(2, 12)
    assert len(allowed_segments(model.config, num_removed)) < num_layers(model.config) - num_removed + 1
    outcome = outcome_of(name, model, tokens, num_removed, num_segments=num_segments)
    check_cut(outcome.cut, model, num_removed)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_same_seed_gives_the_same_choice_and_the_model_is_left_as_it_was(name):
    model, tokens = tiny_model(num_layers=8), random_tokens(8, 16)
    model.model.layers[2].mlp.down_proj.weight.requires_grad_(False)
    before = {n: (t.data_ptr(), t.clone()) for n, t in model.state_dict().items()}
    wanted = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    outcomes = [outcome_of(name, model, tokens, 2, seed=3) for _ in range(2)]
    assert outcomes[0] == outcomes[1]
    assert torch.equal(torch.random.get_rng_state(), state)
    now = model.state_dict()
    assert all(now[n].data_ptr() == address and torch.equal(now[n], tensor) for n, (address, tensor) in before.items())
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters()) and not model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_search_by_it_is_scored_counted_and_ready_for_the_report(name):
    model, tokens = tiny_model(num_layers=8), random_tokens(8, 16)
    result = search_segments(model, tokens, 3, settings(name), quiet=True)
    check_cut(result.segments, model, 3)
    assert math.isfinite(result.score) and result.score > 0 and result.forward_equivalents > 0
    assert (result.strategy, result.num_removed) == (name, 3) and result.used_strategy in STRATEGIES
    assert any(scored.segments == result.segments for scored in result.scored)
    assert json.loads(json.dumps(result.to_dict()))["strategy"] == name


@pytest.mark.parametrize("name", STRATEGIES)
def test_scores_of_layers_are_those_that_the_choice_was_made_by(name):
    outcome = outcome_of(name, tiny_model(num_layers=8), random_tokens(8, 16), 3)
    scores = outcome.layer_scores
    if name in RANKS:
        assert bool(scores) == RANKS[name]
    if scores:
        assert len(scores) == 8 and all(map(math.isfinite, scores))
        smallest = sorted(range(8), key=lambda index: scores[index])[:3]
        assert outcome.cut == cut_of(smallest, 8)


def test_every_strategy_of_this_package_has_a_row_here():
    assert set(RANKS) == {name for name in STRATEGIES if STRATEGIES.row(name).package is None}


def magnitude(problem):
    """A strategy of another package: the layers whose weights are smallest."""
    scores = [
        sum(p.detach().abs().sum().item() for p in layer.parameters()) for layer in problem.objective.stack.layers
    ]
    smallest = sorted(range(problem.num_layers), key=scores.__getitem__)[: problem.num_removed]
    return SearchOutcome(cut_of(smallest, problem.num_layers), layer_scores=tuple(scores))


def test_a_strategy_that_is_registered_can_be_searched_by(monkeypatch):
    registry = Registry("strategy", "optimum_clp.strategies")
    monkeypatch.setattr("optimum_clp.search.segment_search.STRATEGIES", registry)
    registry.register("magnitude", magnitude)
    model = tiny_model(num_layers=8)
    with torch.no_grad():
        for index in (1, 4, 5):
            for parameter in model.model.layers[index].parameters():
                parameter.mul_(0.5)
    result = search_segments(model, random_tokens(4, 16), 3, settings("magnitude"), quiet=True)
    assert [s.to_list() for s in result.segments] == [[1, 2], [4, 6]]
    assert (result.strategy, result.used_strategy) == ("magnitude", "magnitude")
    assert set(sorted(range(8), key=lambda index: result.layer_scores[index])[:3]) == {1, 4, 5}


def test_a_strategy_that_there_is_not_is_named():
    with pytest.raises(ConfigurationError, match="strategy is 'best': it must be one of 'auto', 'gate', 'exhaustive'"):
        search_segments(tiny_model(), random_tokens(2, 12), 2, settings("best"), quiet=True)
