import pytest
import torch
from gates import gated
from tiny_models import MODEL_TYPES, random_tokens, tiny_model

from optimum_clp.architecture.lookup import decoder_layers
from optimum_clp.forward.hooks import recorded_inputs, replaced_forward, replaced_input, stopped_before
from optimum_clp.forward.layer_stack import LayerStack
from optimum_clp.search.gate import concave_gate, hard_gate


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) + sum(
        "forward" in m.__dict__ for m in model.modules()
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_open_gate_changes_no_bit(model_type):
    model, ids = tiny_model(model_type), random_tokens(2, 20)
    with torch.no_grad():
        before = model(ids).logits
        with gated(decoder_layers(model), torch.ones(6)):
            assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(("start", "stop"), [(0, 2), (2, 4), (5, 6)])
def test_resuming_behind_a_segment_equals_the_closed_gate(model_type, start, stop):
    model, ids = tiny_model(model_type), random_tokens(2, 20)
    layers = decoder_layers(model)
    with torch.no_grad():
        with gated(layers, hard_gate(start, stop - start, 6)):
            expected = model(ids, use_cache=False).logits
        with recorded_inputs(layers, [start]) as found:
            model(ids, use_cache=False)
        with LayerStack(model).resumed(stop, found[start]):
            assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_a_forward_pass_can_end_before_a_layer():
    model, ids, ran = tiny_model(), random_tokens(2, 20), []
    layers = decoder_layers(model)
    handles = [layer.register_forward_hook(lambda m, a, o, i=i: ran.append(i)) for i, layer in enumerate(layers)]
    with torch.no_grad():
        with recorded_inputs(layers, [1, 3]) as whole:
            model(ids)
        ran.clear()
        with recorded_inputs(layers, [1, 3]) as found, stopped_before(layers[3]):
            model(ids)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 2]
    assert torch.equal(found[1], whole[1]) and torch.equal(found[3], whole[3])
    assert hooks(model) == 0


def test_a_partly_open_layer_is_the_mixture():
    model, ids = tiny_model(num_layers=1), random_tokens(1, 9)
    layers = decoder_layers(model)
    with torch.no_grad():
        with recorded_inputs(layers, [0, 1]) as plain:
            model(ids)
        seen = {}
        with LayerStack(model).gated([0.25], plain[0]):
            handle = model.model.norm.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
            model(ids)
            handle.remove()
    torch.testing.assert_close(seen["x"], 0.25 * plain[1] + 0.75 * plain[0], atol=1e-6, rtol=1e-5)


def test_gradients_reach_the_gate():
    model, ids = tiny_model(), random_tokens(1, 12)
    model.requires_grad_(False)
    start = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)

    def loss(position):
        with gated(decoder_layers(model), concave_gate(position, 2, 6, 1.5)):
            return model(ids, use_cache=False).logits.double().square().mean()

    loss(start).backward()
    with torch.no_grad():
        slope = (loss(start + 1e-2) - loss(start - 1e-2)) / 2e-2
    assert start.grad.item() == pytest.approx(slope.item(), rel=1e-2)


@pytest.mark.parametrize("block", ["gated", "recorded", "resumed"])
def test_everything_comes_off_after_an_exception(block):
    model, ids = tiny_model(), random_tokens(1, 8)
    layers = decoder_layers(model)
    with torch.no_grad():
        before = model(ids).logits
    blocks = {
        "gated": lambda: LayerStack(model).gated([0.5] * 6, torch.zeros(1, 8, 32)),
        "recorded": lambda: recorded_inputs(layers, [0, 3, 6]),
        "resumed": lambda: LayerStack(model).resumed(3, torch.zeros(1, 8, 32)),
    }
    with pytest.raises(RuntimeError, match="planted"):
        with blocks[block]():
            assert hooks(model) > 0
            raise RuntimeError("planted")
    assert hooks(model) == 0
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_a_forward_that_was_replaced_before_is_put_back():
    model = tiny_model()
    layers = decoder_layers(model)
    original = layers[0].forward

    def theirs(*args, **kwargs):
        return original(*args, **kwargs)

    layers[0].forward = theirs
    with replaced_forward(layers[0], lambda *args, **kwargs: args[0]):
        assert layers[0].forward is not theirs
    assert layers[0].forward is theirs


def test_other_states_can_enter_a_layer():
    model, ids = tiny_model(), random_tokens(2, 20)
    layers = decoder_layers(model)
    with torch.no_grad():
        with recorded_inputs(layers, [0, 2]) as found:
            plain = model(ids).logits
        with replaced_input(layers[0], found[0]):
            assert torch.equal(model(ids).logits, plain)
        with LayerStack(model).resumed(2, found[0]):
            expected = model(ids, use_cache=False).logits
        with replaced_input(layers[2], found[0]):
            assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert hooks(model) == 0
