"""What every strategy of the registry has to do: the built-in ones, and those of other packages that are installed."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from searches import problem_of, settings
from tiny_models import random_tokens, tiny_model
from zoo import ZOO, zoo_model

from optimum_clp.doors import STRATEGIES
from optimum_clp.search.problem import SearchOutcome, cut_of
from optimum_clp.search.segment_search import search_segments
from optimum_clp.segments import LayerSegment, check_segments, endpoint_layers

# these may take single layers from anywhere, however many segments were asked for
SCATTERED = {"block_influence", "taylor", "perplexity_greedy", "random"}
# built-in ones that never run the model
WITHOUT_A_PASS = {"tail", "random"}


def member(name):
    found = [tiny for tiny in ZOO if tiny.name == name]
    return found[0] if found else pytest.skip("not in this transformers")


def solved(name, model, tokens, num_removed, **options):
    config = settings(name)
    return STRATEGIES.get(name)(problem_of(model, tokens, num_removed, config=config, **options))


def left_behind(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(("num_removed", "num_segments"), [(1, 1), (3, 1), (3, 2), (7, 1)])
def test_as_many_layers_go_as_were_asked_for(name, num_removed, num_segments):
    model = tiny_model(num_layers=8)
    outcome = solved(name, model, random_tokens(4, 12), num_removed, num_segments=num_segments)
    assert isinstance(outcome, SearchOutcome)
    assert outcome.cut == check_segments(outcome.cut, 8) and sum(map(len, outcome.cut)) == num_removed
    # one that ranks layers takes them from anywhere
    assert len(outcome.cut) <= num_segments or name in SCATTERED or outcome.layer_scores
    assert endpoint_layers(outcome.cut, 8)  # something is left
    if outcome.layer_scores:  # every cut of this model is exact, so the layers of the smallest scores go
        assert len(outcome.layer_scores) == 8
        ranked = sorted(range(8), key=outcome.layer_scores.__getitem__)
        assert outcome.cut == cut_of(ranked[:num_removed], 8)
    assert outcome.used_strategy is None or outcome.used_strategy in STRATEGIES


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(("architecture", "num_removed"), [("jamba", 2), ("jamba", 4), ("minicpm3", 2), ("zamba", 3)])
def test_what_is_chosen_can_be_cut(name, architecture, num_removed):
    model = zoo_model(member(architecture))
    for seed in range(3):
        problem = problem_of(model, random_tokens(2, 12), num_removed, seed=seed, config=settings(name))
        cut = STRATEGIES.get(name)(problem).cut
        assert problem.is_allowed(cut) and sum(map(len, cut)) == num_removed
        if name != "random":
            break


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_model_is_left_as_it_was(name):
    model, tokens = tiny_model(), random_tokens(3, 12)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    logits, tokens_before = model(tokens).logits, tokens.clone()
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    outcomes = [solved(name, model, tokens, 2) for _ in range(2)]
    assert outcomes[0] == outcomes[1]
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == drawn[1:]
    assert torch.equal(model(tokens).logits, logits) and torch.equal(tokens, tokens_before)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert not left_behind(model)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_same_seed_gives_the_same_result(name):
    model, tokens = tiny_model(num_layers=8), random_tokens(8, 12)
    found = [search_segments(model, tokens, 2, settings(name), seed=5, quiet=True) for _ in range(2)]
    assert found[0] == found[1] and found[0].strategy == name
    assert found[0].forward_equivalents > 0 and found[0].score >= 0
    section = found[0].to_dict()
    assert json.loads(json.dumps(section)) == section and section["strategy"] == name


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("module", ["model.layers.3.mlp", "model.norm"])
def test_everything_comes_off_after_an_exception(name, module):
    model = tiny_model()
    problem = problem_of(model, random_tokens(4, 12), 2, config=settings(name))
    before, weights = [p.requires_grad for p in model.parameters()], [p.clone() for p in model.parameters()]
    broken = model.get_submodule(module)

    def fails(*args, **kwargs):
        raise RuntimeError("planted")

    broken.forward = fails
    try:
        STRATEGIES.get(name)(problem)
    except RuntimeError as error:
        assert str(error) == "planted"
    else:
        assert name in WITHOUT_A_PASS or STRATEGIES.row(name).package, "all others of ours run the model"
    del broken.__dict__["forward"]
    assert not left_behind(model)
    assert [p.requires_grad for p in model.parameters()] == before and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_work_that_is_done_is_counted(name):
    problem = problem_of(tiny_model(), random_tokens(4, 12), 2, config=settings(name))
    model, passes = problem.objective.model, []
    handle = model.model.layers[5].register_forward_hook(lambda *_: passes.append(1))
    before = problem.objective.spent
    STRATEGIES.get(name)(problem)
    handle.remove()
    assert (problem.objective.spent > before) == bool(passes)


def test_a_strategy_that_is_registered_can_be_searched_with(monkeypatch):
    monkeypatch.setattr(STRATEGIES, "_rows", dict(STRATEGIES._rows))
    STRATEGIES.register("first", lambda problem: SearchOutcome((problem.allowed[0],)), says="the first layers")
    model, tokens = tiny_model(), random_tokens(4, 12)
    result = search_segments(model, tokens, 2, settings("first"), quiet=True)
    assert result.segments == (LayerSegment(0, 2),) and result.strategy == result.used_strategy == "first"
    oracle = search_segments(model, tokens, 2, settings("exhaustive"), quiet=True).scored
    assert result.score == pytest.approx(next(s.kl for s in oracle if s.segment == LayerSegment(0, 2)), rel=1e-5)
    assert dataclasses.asdict(result)["dense_loss"] > 0
