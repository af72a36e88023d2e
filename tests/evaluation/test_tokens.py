import math

import pytest
import torch
from tiny_models import VOCABULARY, random_tokens, tiny_model

from optimum_clp.evaluation.speed import measure_speed
from optimum_clp.evaluation.tokens import evaluate_tokens
from optimum_clp.forward.dense_outputs import DenseOutputs
from optimum_clp.forward.layer_major import Residence
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model


def test_a_uniform_model_has_the_perplexity_of_the_vocabulary():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert evaluate_tokens(model, random_tokens(3, 17)).perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_figures_match_a_plain_float64_computation():
    model, ids = tiny_model(), random_tokens(5, 16)
    smaller = cut_model(model, [LayerSegment(2, 4)])
    result = evaluate_tokens(smaller, ids, reference=DenseOutputs(model, ids))
    with torch.no_grad():
        p, q = (m(ids).logits.double().log_softmax(-1) for m in (model, smaller))
    loss = -q[:, :-1].gather(-1, ids[:, 1:, None]).mean().item()
    dense_loss = -p[:, :-1].gather(-1, ids[:, 1:, None]).mean().item()
    assert result.num_tokens == 5 * 15
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert result.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert result.top1_agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert result.retention == pytest.approx(math.exp(dense_loss - loss), rel=1e-5)


def test_the_batch_size_does_not_matter():
    model, ids = tiny_model(), random_tokens(7, 16)
    reference = DenseOutputs(model, ids, batch_size=3)
    one = evaluate_tokens(cut_model(model, [LayerSegment(1, 3)]), ids, reference=reference, batch_size=1)
    all_ = evaluate_tokens(cut_model(model, [LayerSegment(1, 3)]), ids, reference=reference, batch_size=7)
    assert one.perplexity == pytest.approx(all_.perplexity, rel=1e-5)
    assert one.kl == pytest.approx(all_.kl, rel=1e-5)


def test_the_dense_model_retains_everything():
    model, ids = tiny_model(), random_tokens(2, 16)
    result = evaluate_tokens(model, ids, reference=DenseOutputs(model, ids))
    assert result.kl == pytest.approx(0, abs=1e-6)
    assert result.top1_agreement == 1 and result.retention == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([4, 0])])
def test_dense_outputs_give_the_models_own_logits(rows):
    model, ids = tiny_model("qwen3"), random_tokens(5, 16)
    with torch.no_grad():
        expected = model(ids[rows], use_cache=False).logits
    torch.testing.assert_close(DenseOutputs(model, ids, batch_size=2).logits(rows), expected, atol=1e-5, rtol=1e-5)


def test_speed_is_measured_in_rounds_that_drop_each_model():
    model, made = tiny_model(), []

    def make():
        made.append(1)
        return model

    speeds = measure_speed({"a": make, "b": make}, random_tokens(1, 16), new_tokens=4, rounds=2, quiet=True)
    assert len(made) == 4
    assert all(s.prefill_tokens_per_second > 0 and s.decode_tokens_per_second > 0 for s in speeds.values())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_both_orders_give_the_same_figures(batch_size):
    model, ids = tiny_model(), random_tokens(7, 16)
    smaller = cut_model(model, [LayerSegment(1, 3)])
    plain = evaluate_tokens(
        smaller, ids, reference=DenseOutputs(model, ids, batch_size=batch_size), batch_size=batch_size
    )
    options = {"batch_size": batch_size, "residence": Residence(2), "quiet": True}
    other = evaluate_tokens(smaller, ids, reference=DenseOutputs(model, ids, **options), **options)
    assert other == plain


def test_no_more_logits_exist_at_once_than_memory_may_hold(monkeypatch):
    model, ids, sizes = tiny_model(), random_tokens(6, 16), []
    logits = DenseOutputs.logits
    monkeypatch.setattr(DenseOutputs, "logits", lambda self, rows: sizes.append(rows) or logits(self, rows))
    room = Residence(work_memory=2 * 16 * VOCABULARY * 24)
    found = evaluate_tokens(model, ids, residence=room, quiet=True)
    assert [rows.stop - rows.start for rows in sizes] == [2, 2, 2]
    assert found.loss == pytest.approx(evaluate_tokens(model, ids).loss, rel=1e-6)
