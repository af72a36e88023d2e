"""Hooks that last as long as a block, and what they record or replace."""

import pytest
import torch
from tiny_models import random_tokens, tiny_model
from torch import nn

from optimum_clp.forward.hooks import (
    hooked,
    only_trainable,
    recorded_inputs,
    recorded_outputs,
    replaced_output,
)


def left(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_called_in_order_and_come_off():
    model, calls = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), []

    def before(name):
        return lambda module, args, kwargs: calls.append((name, module, len(args), kwargs))

    def after(name):
        return lambda module, args, kwargs, output: calls.append((name, module, output.shape))

    first, second = model
    with hooked([(second, before("a")), (first, before("b"))], [(first, after("c")), (first, after("d"))]):
        model(torch.zeros(2, 3))
    shape = torch.Size([2, 3])
    assert calls == [("b", first, 1, {}), ("c", first, shape), ("d", first, shape), ("a", second, 1, {})]
    assert left(model) == 0
    model(torch.zeros(2, 3))
    assert len(calls) == 4


def test_hooks_can_change_what_enters_and_what_leaves():
    layer = nn.Identity()
    with hooked(
        before=[(layer, lambda module, args, kwargs: ((args[0] + 1,), kwargs))],
        after=[(layer, lambda module, args, kwargs, output: output * 10)],
    ):
        assert layer(torch.tensor(2.0)) == 30
    assert layer(torch.tensor(2.0)) == 2


@pytest.mark.parametrize("fails", ["while they are put on", "in the block", "in a hook"])
def test_hooks_come_off_after_an_exception(fails):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def hook(module, args, kwargs):
        if fails == "in a hook":
            raise RuntimeError("planted")

    def hooks():
        yield model[0], hook
        if fails == "while they are put on":
            raise RuntimeError("planted")
        yield model[1], hook

    with pytest.raises(RuntimeError, match="planted"), hooked(before=hooks()):
        assert left(model) == 2
        model(torch.zeros(1, 3))
        raise RuntimeError("planted")
    assert left(model) == 0


@pytest.mark.parametrize("always", [False, True])
def test_hooks_can_be_called_after_a_forward_that_failed(always):
    layer, calls = nn.Linear(3, 3), []
    with pytest.raises(RuntimeError), hooked(after=[(layer, lambda *_: calls.append(1))], always_call=always):
        layer(torch.zeros(1, 4))
    assert calls == ([1] if always else [])


def test_what_leaves_a_layer_enters_the_next_and_keeps_its_gradient():
    model, ids = tiny_model(), random_tokens(2, 9)
    layers = model.model.layers
    with recorded_inputs(layers, [1, 4, 6]) as entered, recorded_outputs(layers, [0, 3, 5]) as leaving:
        model(ids)
    assert sorted(entered) == [1, 4, 6] and sorted(leaving) == [0, 3, 5]
    for index, states in leaving.items():
        assert torch.equal(states, entered[index + 1]) and states.shape == (2, 9, 32)
        assert states.requires_grad and not entered[index + 1].requires_grad
    assert left(model) == 0


def test_other_states_can_leave_a_layer_and_are_not_written_to():
    model, ids = tiny_model(), random_tokens(2, 9)
    layers, given = model.model.layers, torch.randn(2, 9, 32)
    before = given.clone()
    with torch.no_grad(), replaced_output(layers[2], given), recorded_inputs(layers, [3]) as found:
        model(ids)
        assert torch.equal(found[3], given)
        found[3].add_(1)
        model(ids)
        assert torch.equal(found[3], before)
    assert torch.equal(given, before) and left(model) == 0


def test_only_some_parameters_are_trainable_for_a_while():
    model = tiny_model()
    model.lm_head.requires_grad_(False)
    kept = torch.ones_like(model.model.norm.weight)
    model.model.norm.weight.grad = kept
    before = [p.requires_grad for p in model.parameters()]
    chosen = [*model.model.layers[2].parameters(), model.lm_head.weight]
    with pytest.raises(RuntimeError, match="planted"), only_trainable(model, chosen):
        model(random_tokens(1, 5)).logits.sum().backward()
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in chosen}
        assert all(p.grad is not None for p in chosen)
        raise RuntimeError("planted")
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in chosen) and model.model.norm.weight.grad is kept
