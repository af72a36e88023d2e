"""Experts in the form that is traced, and what stands in for functions while it is, against the models' own."""

import pytest
import torch
from tiny_models import random_tokens
from zoo import ZOO, zoo_model

from optimum_clp.exporters.experts import experts_modules, unrolled_experts
from optimum_clp.exporters.graph.trace import traceable
from optimum_clp.exporters.obstacle import onnx_obstacle


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def members():
    return [pytest.param(tiny, id=tiny.name) for tiny in ZOO]


@pytest.mark.parametrize("tiny", members())
def test_unrolled_experts_are_the_experts(tiny):
    model, ids = zoo_model(tiny), random_tokens(3, 11)
    modules = dict(model.named_modules())
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    if not experts_modules(model):
        # no stack of matrices is overlooked in a model that can be exported
        stacks = [name for name, p in model.named_parameters() if p.ndim == 3 and "vision" not in name]
        assert not stacks or onnx_obstacle(model) is not None
        return
    expected = logits(model, ids)
    with unrolled_experts(model):
        assert not experts_modules(model)
        assert {p.untyped_storage().data_ptr() for p in model.parameters()} <= storages
        found = logits(model, ids)
    assert dict(model.named_modules()) == modules
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_experts_come_back_after_an_error():
    model = zoo_model(next(tiny for tiny in ZOO if tiny.name == "gpt_oss"))
    modules = dict(model.named_modules())
    with pytest.raises(KeyError), unrolled_experts(model):
        raise KeyError
    assert dict(model.named_modules()) == modules


def test_complex_rotation_in_real_numbers():
    """What Llama 4 and DeepSeek-V2 do, with and without complex numbers."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 5, 3, 8, generator=generator)
    angles = torch.randn(2, 5, 4, generator=generator)

    def rotate():
        frequencies = torch.polar(torch.ones_like(angles), angles) * 1.5
        pairs = torch.view_as_complex(states.reshape(2, 5, 3, 4, 2))
        first = torch.view_as_real(pairs * frequencies[:, :, None, :]).flatten(3)
        frequencies = frequencies.unsqueeze(2).to(pairs.device)
        return first, torch.view_as_real(pairs * frequencies).flatten(3)

    expected, functions = rotate(), (torch.polar, torch.view_as_complex, torch.view_as_real)
    model = zoo_model(next(tiny for tiny in ZOO if tiny.name == "llama"))
    with traceable(model):
        found = rotate()
    assert (torch.polar, torch.view_as_complex, torch.view_as_real) == functions
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_alibi_of_mpt_is_cut_as_usual():
    model, ids = zoo_model(next(tiny for tiny in ZOO if tiny.name == "mpt")), random_tokens(2, 9)
    expected = logits(model, ids)
    with traceable(model):
        assert torch.equal(logits(model, ids), expected)
