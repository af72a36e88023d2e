import copy

import pytest
import torch
from torch import nn

from optimum_clp.tuning.master_adamw import MasterAdamW

OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}


def gradients(shape, steps, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(steps)]


def parameter(dtype=torch.float32):
    return nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4).to(dtype))


def test_float32_steps_are_those_of_torch():
    ours, theirs = parameter(), parameter()
    one, two = MasterAdamW([ours], **OPTIONS), torch.optim.AdamW([theirs], **OPTIONS)
    for gradient in gradients((3, 4), 5):
        ours.grad, theirs.grad = gradient, gradient.clone()
        one.step()
        two.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    assert set(one.state[ours]) == {"step", "exp_avg", "exp_avg_sq"}


def test_bfloat16_weights_are_rounded_float32_ones():
    ours, theirs = parameter(torch.bfloat16), nn.Parameter(parameter(torch.bfloat16).detach().float())
    one, two = MasterAdamW([ours], **OPTIONS), torch.optim.AdamW([theirs], **OPTIONS)
    for gradient in gradients((3, 4), 40, torch.bfloat16):
        ours.grad, theirs.grad = gradient, gradient.float()
        one.step()
        two.step()
    state = one.state[ours]
    torch.testing.assert_close(state["master"], theirs.detach(), rtol=0, atol=1e-6)
    assert torch.equal(ours, state["master"].to(torch.bfloat16))
    assert {t.dtype for t in state.values()} == {torch.float32}


def test_a_parameter_without_a_gradient_stays():
    ours = parameter()
    before = ours.detach().clone()
    MasterAdamW([ours], **OPTIONS).step()
    assert torch.equal(ours, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_goes_on_exactly(dtype, tmp_path):
    ours = parameter(dtype)
    one = MasterAdamW([ours], **OPTIONS)
    steps = gradients((3, 4), 20, dtype)
    for gradient in steps[:10]:
        ours.grad = gradient
        one.step()
    torch.save(one.state_dict(), tmp_path / "state.pt")
    other = nn.Parameter(copy.deepcopy(ours.detach()))
    two = MasterAdamW([other], lr=1.0)
    two.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert {t.dtype for t in two.state[other].values()} == {torch.float32}
    for gradient in steps[10:]:
        ours.grad, other.grad = gradient, gradient.clone()
        one.step()
        two.step()
    assert torch.equal(ours, other)


def test_the_loaded_state_is_not_shared_with_what_it_came_from():
    ours = parameter(torch.bfloat16)
    one = MasterAdamW([ours], **OPTIONS)
    ours.grad = gradients((3, 4), 1, torch.bfloat16)[0]
    one.step()
    saved = copy.deepcopy(one.state_dict())
    kept = copy.deepcopy(saved)
    two = MasterAdamW([ours], **OPTIONS)
    two.load_state_dict(saved)
    two.step()
    assert all(torch.equal(saved["state"][0][k], kept["state"][0][k]) for k in saved["state"][0])
