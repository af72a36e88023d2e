import pytest
import torch
from gates import gated
from searches import settings
from tiny_models import MODEL_TYPES, random_tokens, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from optimum_clp.evaluation.live_memory import LiveTensorBytes
from optimum_clp.forward.layer_major import Residence
from optimum_clp.forward.losses import kl_divergence, next_token_cross_entropy
from optimum_clp.resume import Journal
from optimum_clp.search.gate import concave_gate
from optimum_clp.search.gate_descent import snapped
from optimum_clp.search.objective import Objective, gate_of
from optimum_clp.search.segment_search import search_segments
from optimum_clp.search.work import _attention_flops
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model


def truth(model, tokens, gate):
    """KL and cross-entropy by whole forward passes through all layers."""
    with torch.no_grad():
        dense = model(tokens).logits
        with gated(model.model.layers, torch.tensor(gate, dtype=torch.float64)):
            soft = model(tokens).logits
    return kl_divergence(dense, soft).double().mean(-1), next_token_cross_entropy(soft, tokens).double().mean(-1)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_soft_and_hard_gates_are_measured_as_by_whole_passes(model_type):
    model, tokens = tiny_model(model_type, num_layers=8), random_tokens(5, 20)
    gates = [
        snapped(concave_gate(2.3, 3, 8, 1.5)),
        snapped(concave_gate(4.7, 2, 8, 9.0)),
        gate_of([LayerSegment(2, 4)], 8),
        gate_of([LayerSegment(0, 1), LayerSegment(5, 7)], 8),
        gate_of([LayerSegment(6, 8)], 8),
        (1.0,) * 8,
    ]
    found = Objective(model, tokens, batch_size=2, quiet=True).measure(gates, [4, 0, 2])
    for index, gate in enumerate(gates):
        kl, loss = truth(model, tokens[[4, 0, 2]], gate)
        assert torch.allclose(found.kl[index], kl, rtol=1e-4, atol=1e-6)
        assert torch.allclose(found.loss[index], loss, rtol=1e-5)
    assert torch.equal(found.kl[-1], torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(found.dense_loss, found.loss[-1])


def test_a_cut_is_measured_as_the_physically_cut_model():
    model, tokens = tiny_model(), random_tokens(4, 20)
    cut = [LayerSegment(1, 2), LayerSegment(4, 6)]
    found = Objective(model, tokens, quiet=True).measure([gate_of(cut, 6)], range(4))
    with torch.no_grad():
        smaller = cut_model(model, cut)(tokens).logits
    assert torch.allclose(found.loss[0], next_token_cross_entropy(smaller, tokens).double().mean(-1), rtol=1e-6)


def test_padding_is_measured_by_nothing():
    model, tokens = tiny_model(), random_tokens(3, 20)
    mask = torch.ones_like(tokens)
    mask[0, 12:] = mask[2, 7:] = 0
    gate = [gate_of([LayerSegment(2, 4)], 6)]
    garbage = torch.where(mask.bool(), tokens, random_tokens(3, 20, seed=9))
    objective = Objective(model, garbage, attention_mask=mask, quiet=True)
    found = objective.measure(gate, range(3))
    assert objective.weights.tolist() == [12, 20, 7]
    for row, length in enumerate((12, 20, 7)):
        alone = Objective(model, tokens[row : row + 1, :length], quiet=True).measure(gate, [0])
        assert found.kl[0, row].item() == pytest.approx(alone.kl.item(), rel=1e-4)
        assert found.loss[0, row].item() == pytest.approx(alone.loss.item(), rel=1e-5)


def test_the_work_that_is_counted_is_the_work_that_is_done():
    """Against PyTorch's counter over the whole run, with attention by formula."""
    model, tokens = tiny_model(num_layers=8), random_tokens(8, 24)
    gates = [gate_of([LayerSegment(s, s + 2)], 8) for s in range(7)] + [snapped(concave_gate(3.4, 2, 8, 3.0))]
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}

    def counted(work):
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            work()
        return counter.get_total_flops()

    objective = Objective(model, tokens, batch_size=8, quiet=True)
    before = objective.spent
    done = counted(lambda: objective.measure(gates, range(8)))
    forward = counted(lambda: model(tokens, use_cache=False))
    assert objective.spent - before == pytest.approx(done / forward, rel=0.01)


def test_the_cost_of_exhaustive_search_is_the_formula():
    model, tokens = tiny_model(num_layers=12), random_tokens(8, 24)
    objective = Objective(model, tokens, quiet=True)
    layers, removed = 12, 3
    head = objective.work.head / objective.work.layers[0]
    around = (
        objective.work.around / objective.work.layers[0]
    )  # transformers 4 multiplies matrices for its rotary angles
    gates = [gate_of([LayerSegment(s, s + removed)], layers) for s in range(layers - removed + 1)]
    before = objective.spent
    objective.measure(gates, range(8))
    rest = layers - removed
    expected = 1 + (rest * (rest + 1) / 2 + (rest + 1) * head + rest * around) / (layers + head + around)
    assert objective.spent - before == pytest.approx(expected, rel=1e-6)


def test_one_batch_or_many_give_the_same_figures():
    model, tokens = tiny_model(), random_tokens(8, 20)
    gates = [gate_of([LayerSegment(s, s + 2)], 6) for s in range(5)]
    small, large = (Objective(model, tokens, batch_size=b, quiet=True).measure(gates, range(8)) for b in (1, 8))
    assert torch.allclose(small.kl, large.kl, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [500, 8000])
def test_memory_stays_within_a_quarter_more_than_a_plain_forward_pass(vocabulary):
    model = tiny_model(num_layers=24, hidden_size=64, vocab_size=vocabulary, max_position_embeddings=256)
    tokens = random_tokens(8, 128)
    with torch.no_grad(), LiveTensorBytes(model) as plain:
        model(tokens, use_cache=False)
    objective = Objective(model, tokens, batch_size=8, quiet=True)
    gates = [gate_of([LayerSegment(s, s + 3)], 24) for s in range(22)]
    with LiveTensorBytes(model) as searching:
        objective.measure(gates, range(8))
    assert searching.peak <= 1.25 * plain.peak
    with torch.no_grad(), LiveTensorBytes(model) as two:  # the counter sees a second copy of the logits
        kept = model(tokens, use_cache=False).logits
        kept = kept, model(tokens, use_cache=False).logits
    assert two.peak >= plain.peak + kept[0].nbytes


@pytest.mark.parametrize("together", [1, 3])
def test_both_orders_give_the_same_figures_and_the_same_work(together, tmp_path):
    model, tokens = tiny_model(num_layers=8), random_tokens(7, 20)
    gates = [gate_of([LayerSegment(s, s + 3)], 8) for s in range(6)]
    gates += [snapped(concave_gate(2.3, 3, 8, 1.5)), gate_of([LayerSegment(0, 1), LayerSegment(5, 7)], 8), (1.0,) * 8]
    plain = Objective(model, tokens, batch_size=2, quiet=True)
    residence = Residence(together, state_memory=10_000, folder=tmp_path)
    layer_major = Objective(model, tokens, batch_size=2, quiet=True, residence=residence)
    rows = [6, 0, 3, 4, 1]
    expected, found = (objective.measure(gates, rows) for objective in (plain, layer_major))
    for name in ("kl", "loss", "dense_loss"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert (layer_major.spent, layer_major.layer_passes) == (plain.spent, plain.layer_passes)
    assert layer_major.work == plain.work


def test_padded_rows_have_the_same_figures_in_both_orders():
    model, tokens = tiny_model("qwen3"), random_tokens(3, 20)
    mask = torch.ones_like(tokens)
    mask[0, 12:] = mask[2, 7:] = 0
    gate = [gate_of([LayerSegment(2, 4)], 6)]
    options = {"attention_mask": mask, "batch_size": 2, "quiet": True}
    plain, other = (
        Objective(model, tokens, **options, residence=r).measure(gate, range(3)) for r in (None, Residence())
    )
    assert torch.equal(plain.kl, other.kl) and torch.equal(plain.loss, other.loss)


def test_what_the_journal_knows_is_not_run_again(tmp_path):
    """A search that was begun in one order goes on in the other."""
    model, tokens = tiny_model(), random_tokens(6, 16)
    gates, file = [gate_of([LayerSegment(s, s + 2)], 6) for s in range(5)], tmp_path / "journal.jsonl"
    options = {"batch_size": 2, "quiet": True}
    first = Objective(model, tokens, **options, journal=Journal(file)).measure(gates, range(4))
    ran = []
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: ran.append(1))
    objective = Objective(model, tokens, **options, journal=Journal(file), residence=Residence())
    ran.clear()  # the work was counted
    again = objective.measure(gates, range(4))
    assert torch.equal(again.kl, first.kl) and not ran
    assert objective.measure(gates, [4, 5]).kl.shape == (5, 2) and ran


def test_the_memory_that_may_be_used_bounds_what_runs_at_once():
    model, tokens = tiny_model(), random_tokens(8, 64)
    small = Objective(model, tokens, quiet=True, residence=Residence(work_memory=30_000))
    assert small.micro_batch(3) < Objective(model, tokens, quiet=True, residence=Residence()).micro_batch(3)


@pytest.mark.parametrize("strategy", ["exhaustive", "halving", "gate"])
def test_a_search_layer_by_layer_runs_no_layer_more_often(strategy):
    """By a hook on every layer, times its rows."""
    model, tokens, ran = (
        tiny_model(num_layers=24, hidden_size=8, intermediate_size=8, head_dim=4),
        random_tokens(8, 16),
        [],
    )
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: ran.append(len(output)))
    config, counts = settings(strategy, num_sequences=8, batch_size=4), []
    for residence in (None, Residence()):
        ran.clear()
        search_segments(model, tokens, 6, config, residence=residence, quiet=True)
        counts.append(sum(ran))
    # in the plain order each layer also runs for one token, which shows what it returns
    assert counts[0] - 24 <= counts[1] <= counts[0] and counts[1] > 24 * 8
