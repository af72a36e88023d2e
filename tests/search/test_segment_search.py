import pytest
import torch
from gates import gated
from searches import settings
from tiny_models import MODEL_TYPES, make_identity, random_tokens, tiny_model

from optimum_clp.errors import SearchError
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.forward.losses import kl_divergence
from optimum_clp.search.gate import concave_gate
from optimum_clp.search.gate_descent import snapped
from optimum_clp.search.objective import Objective
from optimum_clp.search.segment_search import search_segments
from optimum_clp.segments import LayerSegment, candidate_segments
from optimum_clp.surgery.cut import cut_model


@pytest.mark.parametrize("strategy", ["auto", "gate", "exhaustive", "halving"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("start", [1, 7])
def test_planted_identity_layers_are_found(strategy, model_type, start):
    model = make_identity(tiny_model(model_type, num_layers=12), [start, start + 1, start + 2])
    result = search_segments(model, random_tokens(8, 24), 3, settings(strategy), quiet=True)
    assert result.segments == (LayerSegment(start, start + 3),)
    assert result.score == pytest.approx(0, abs=1e-6)


def test_exhaustive_scores_are_the_divergence_of_the_physically_cut_models():
    model, tokens = tiny_model("qwen3"), random_tokens(6, 20)
    result = search_segments(model, tokens, 2, settings("exhaustive"), quiet=True)
    assert [s.segment for s in result.scored] == candidate_segments(6, 2)
    for scored in result.scored:
        truth = evaluate_tokens(cut_model(model, [scored.segment]), tokens, reference=DenseOutputs(model, tokens)).kl
        assert scored.kl == pytest.approx(truth, rel=1e-5)
    assert result.score == min(s.kl for s in result.scored)


def test_standard_error_is_that_of_the_row_means():
    model, tokens = tiny_model(), random_tokens(8, 20)
    result = search_segments(model, tokens, 2, settings("exhaustive"), quiet=True)
    with torch.no_grad():
        cut = cut_model(model, [result.scored[0].segment])
        rows = kl_divergence(model(tokens).logits, cut(tokens).logits).double().mean(-1)
    assert result.scored[0].standard_error == pytest.approx((rows.std() / 8**0.5).item(), rel=1e-4)


def test_the_central_difference_is_the_gradient():
    """The gate search differentiates by two forwards; autograd through the gate is the independent truth."""
    model, tokens = tiny_model(), random_tokens(4, 20)
    model.requires_grad_(False)
    objective = Objective(model, tokens, batch_size=4, quiet=True)
    dense = model(tokens).logits
    for start, steepness in ((1.3, 0.5), (2.6, 2.0)):
        position = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        with gated(model.model.layers, concave_gate(position, 2, 6, steepness)):
            kl_divergence(dense, model(tokens).logits).mean().backward()
        pair = [snapped(concave_gate(start + side * 0.05, 2, 6, steepness)) for side in (-1, 1)]
        below, above = objective.measure(pair, range(4)).kl.mean(1).tolist()
        assert (above - below) / 0.1 == pytest.approx(position.grad.item(), rel=0.03, abs=1e-3)


@pytest.mark.parametrize("num_layers", [12, 40])
@pytest.mark.parametrize("strategy", ["gate", "halving", "auto"])
def test_four_forward_equivalents_are_enough_at_any_depth(strategy, num_layers):
    model, tokens = tiny_model(num_layers=num_layers), random_tokens(32, 16)
    config = settings(strategy, num_sequences=32)
    for removed in (num_layers // 10, num_layers // 5, num_layers // 2):
        result = search_segments(model, tokens, removed, config, quiet=True)
        assert result.forward_equivalents <= 4
        assert len(result.scored) <= (5 if result.used_strategy == "gate" else num_layers - removed + 1)


def test_the_gate_agrees_with_the_oracle_on_what_it_scores():
    model, tokens = tiny_model(num_layers=12), random_tokens(16, 24)
    gate = search_segments(model, tokens, 3, settings("gate", num_sequences=16), quiet=True)
    everything = settings("exhaustive", num_sequences=16)
    oracle = {s.segment: s for s in search_segments(model, tokens, 3, everything, quiet=True).scored}
    whole = [s for s in gate.scored if s.num_rows == 16]
    assert whole
    for scored in whole:
        assert scored.kl == pytest.approx(oracle[scored.segment].kl, rel=1e-5)
        assert scored.loss == pytest.approx(oracle[scored.segment].loss, rel=1e-5)
    steepness = [t.steepness for t in gate.trajectory if t.step > 0]
    assert steepness == sorted(steepness) and len(steepness) > 1
    assert all(0 <= t.start <= 9 for t in gate.trajectory)


def test_the_same_seed_gives_the_same_search_and_nothing_is_left_behind():
    model, tokens = tiny_model(num_layers=8), random_tokens(8, 24)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    results = [search_segments(model, tokens, 2, settings("gate"), seed=3, quiet=True) for _ in range(2)]
    assert results[0] == results[1]
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_scores_that_are_not_finite_are_an_error():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(SearchError, match="search score is nan: the divergence from the dense model is not finite"):
        search_segments(model, random_tokens(2, 12), 2, settings("exhaustive"), quiet=True)


def test_the_result_is_json_ready():
    import json

    result = search_segments(tiny_model(), random_tokens(2, 12), 2, settings("gate"), quiet=True)
    section = json.loads(json.dumps(result.to_dict()))
    assert section["segments"] == [[result.segments[0].start, result.segments[0].stop]]
    assert {"segments", "kl", "standard_error", "loss", "num_rows", "behind"} <= set(section["scored"][0])
