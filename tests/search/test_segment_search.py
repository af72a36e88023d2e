import pytest
import torch
from tiny_models import MODEL_TYPES, make_identity, random_tokens, tiny_model

from optimum_clp.configuration import SearchConfig
from optimum_clp.errors import SearchError
from optimum_clp.evaluation import evaluate_tokens
from optimum_clp.gate import concave_gate
from optimum_clp.gating import gated
from optimum_clp.losses import kl_divergence
from optimum_clp.search import search_segments
from optimum_clp.segments import LayerSegment, candidate_segments
from optimum_clp.surgery import cut_model
from optimum_clp.teacher import DenseOutputs


def settings(strategy, **overrides):
    return SearchConfig(**{"strategy": strategy, "num_sequences": 8, "batch_size": 4, **overrides})


@pytest.mark.parametrize("strategy", ["gate", "exhaustive"])
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


def test_the_work_that_is_counted_is_the_work_that_is_done():
    model, tokens = tiny_model(), random_tokens(8, 20)
    calls = []
    # one pass of a single token shows what the layers return; it is not counted
    handles = [
        layer.self_attn.register_forward_hook(lambda m, a, o: calls.extend([1] * (o[0].shape[1] > 1)))
        for layer in model.model.layers
    ]
    result = search_segments(model, tokens, 2, settings("exhaustive", batch_size=8), quiet=True)
    for handle in handles:
        handle.remove()
    # L for the dense pass, L - n for the inputs of every start, then what lies above each segment
    assert result.layer_passes == len(calls) == 6 + 4 + (4 + 3 + 2 + 1 + 0)


def test_the_central_difference_is_the_gradient():
    """The gate search differentiates by two forwards; autograd through the gate is the independent truth."""
    from optimum_clp.search import _Objective

    model, tokens = tiny_model(), random_tokens(4, 20)
    model.requires_grad_(False)
    objective = _Objective(model, tokens, 4, quiet=True)
    rows = torch.arange(4)
    for start, steepness in ((1.3, 0.5), (2.6, 2.0)):
        position = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        with gated(objective.layers, concave_gate(position, 2, 6, steepness)):
            objective.row_kl(rows, objective.dense.logits(rows)).mean().backward()
        below, above = objective.gate_loss([start - 0.05, start + 0.05], 2, steepness, rows)
        assert (above - below) / 0.1 == pytest.approx(position.grad.item(), rel=0.03, abs=1e-3)


def test_the_gate_scores_few_segments_and_agrees_with_the_oracle_there():
    model, tokens = tiny_model(num_layers=12), random_tokens(8, 24)
    gate = search_segments(model, tokens, 3, settings("gate"), quiet=True)
    oracle = {s.segment: s.kl for s in search_segments(model, tokens, 3, settings("exhaustive"), quiet=True).scored}
    assert len(gate.scored) == 5
    for scored in gate.scored:
        assert scored.kl == pytest.approx(oracle[scored.segment], rel=1e-5)
    steepness = [t.steepness for t in gate.trajectory if t.step > 0]
    assert steepness == sorted(steepness) and len(steepness) == 16
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

    result = search_segments(tiny_model(), random_tokens(2, 12), 2, settings("gate", steps=3), quiet=True)
    section = json.loads(json.dumps(result.to_dict()))
    assert section["segments"] == [[result.segments[0].start, result.segments[0].stop]]
    assert {"start", "stop", "kl", "standard_error"} == set(section["scored"][0])
