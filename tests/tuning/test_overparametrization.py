"""More parameters while training: the same model before and after, and the formula, written plainly, in between."""

import copy

import pytest
import torch
from tiny_models import random_tokens, tiny_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from optimum_clp.configuration.stages import TuningConfig
from optimum_clp.forward.losses import kl_divergence
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model
from optimum_clp.tuning.endpoints import tune_layers
from optimum_clp.tuning.loop import TrainingLoop
from optimum_clp.tuning.overparametrization import (
    Annealing,
    Factors,
    merge,
    new_sizes,
    overparametrized,
    plain_weights,
    projections,
)

SETTINGS = {"init": "none", "hidden_epochs": 0, "epochs": 3, "batch_size": 4, "learning_rate": 1e-3}
SIDES = ("output", "input")


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64)).eval()


MODELS = {
    "llama": lambda: tiny_model(),
    "qwen2": lambda: tiny_model("qwen2"),  # with biases
    "gpt2": gpt2,  # Conv1D
}


def layers_of(model):
    """Two layers."""
    layers = model.transformer.h if isinstance(model, GPT2LMHeadModel) else model.model.layers
    return [layers[1], layers[2]]


def disturb(layers, seed=3):
    """Random numbers in place of all parameters of the products, but not of what is frozen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers:
            for name, parameter in layer.named_parameters():
                if ".parametrizations." in name and parameter.requires_grad:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def matrices(module):
    """`P`, `W` and `D` of a projection, `[outputs, inputs]`, and the side on which `D` is."""
    weight = module.parametrizations.weight
    original, added = weight.original.detach(), weight[0].added.detach()
    left, right = weight[0].left, weight[0].right
    factor = (right if left is None else left).detach()
    side = "output" if right is None else "input"
    if isinstance(module, Conv1D):
        original, added, factor = original.T, added.T, factor.T
        side = SIDES[side == "output"]
    return original, added, torch.eye(len(factor), dtype=factor.dtype) + factor, side


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_merged_and_unmerged_give_the_same_bits(name, dtype, side):
    model, tokens = MODELS[name]().to(dtype), random_tokens(3, 16)
    layers, annealing = layers_of(model), Annealing()
    before, types = model(tokens).logits, [type(m) for m in model.modules()]
    with overparametrized(model, layers, annealing, lambda place, name: Factors(side=side)):
        assert torch.equal(model(tokens).logits, before)
        disturb(layers)
        unmerged = model(tokens).logits
        assert (unmerged - before).abs().max() > 1e-3
        names = {f"{i}.{n}": t for i, layer in enumerate(layers) for n, t in layer.state_dict().items()}
    assert torch.equal(model(tokens).logits, unmerged)
    assert [type(m) for m in model.modules()] == types
    plain = plain_weights(names)
    merged = {f"{i}.{n}": t for i, layer in enumerate(layers) for n, t in layer.state_dict().items()}
    assert plain.keys() == merged.keys() and all(torch.equal(plain[n], t) for n, t in merged.items())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_projection_computes_the_formula(kind, share, side):
    torch.manual_seed(0)
    module = (nn.Linear(5, 7) if kind is nn.Linear else Conv1D(7, 5)).double()
    layer, entered, annealing = nn.ModuleList([module]), torch.randn(4, 5).double(), Annealing()
    nn.init.normal_(module.bias)
    module_before = copy.deepcopy(module)
    with overparametrized(layer, [layer], annealing, lambda place, name: Factors(side=side)):
        disturb([layer])
        annealing.share = share
        found = module(entered)
        original, added, factor, where = matrices(module)
        assert where == side
        assert sorted(new_sizes(module_before, Factors(side=side))) == sorted([added.numel(), factor.numel()])

        def activated(x):
            return share * x / (1 + torch.exp(-x)) + (1 - share) * x

        states = entered.T
        inner = activated((original + added) @ states) if side == "output" else activated(factor @ states)
        expected = (factor @ inner if side == "output" else (original + added) @ inner).T + module.bias
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        with torch.no_grad():  # what is evaluated is what will be left
            plain = factor @ (original + added) if side == "output" else (original + added) @ factor
            torch.testing.assert_close(module(entered), entered @ plain.T + module.bias, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module(entered), entered @ plain.T + module.bias, rtol=1e-12, atol=1e-12)


def test_gradients_reach_what_is_trained_and_nothing_else():
    model, tokens = tiny_model(), random_tokens(2, 12)
    layers, annealing = layers_of(model), Annealing()
    with overparametrized(model, layers, annealing):
        annealing.share = 0.5
        model(tokens).logits.square().mean().backward()
        for name, parameter in nn.ModuleList(layers).named_parameters():
            assert (parameter.grad is None) == name.endswith("original"), name
            # W is 0 and D the identity, but both have a gradient at once
            assert parameter.grad is None or parameter.grad.abs().max() > 0, name
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_activation_comes_and_goes_and_is_gone_before_the_end():
    annealing = Annealing()

    def at(done):
        annealing.at(done)
        return annealing.share

    assert at(0) == 0 and at(0.005) == pytest.approx(0.5) and at(0.01) == 1
    assert at(0.405) == pytest.approx(0.5) and at(0.2) > at(0.4) > at(0.6) > 0
    assert at(0.8) == at(0.9) == at(1) == 0


def test_shared_weights_and_a_trained_original():
    model = tiny_model()
    layers = layers_of(model)
    layers[0].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    names = [(place, name) for place, name, _ in projections(model, layers)]
    assert len(names) == 2 * 7 - 2 and (0, "mlp.up_proj") not in names and (1, "mlp.up_proj") not in names
    given = {"self_attn.q_proj": Factors(side=None), "mlp.down_proj": Factors(added=False, frozen=False)}
    with overparametrized(model, layers, factors=lambda place, name: given.get(name, Factors(False, None))):
        found = {n for n, p in layers[0].named_parameters() if "parametrizations" in n and p.requires_grad}
        assert found == {
            "self_attn.q_proj.parametrizations.weight.0.added",
            "mlp.down_proj.parametrizations.weight.0.left",
            "mlp.down_proj.parametrizations.weight.original",
        }
    assert layers[0].mlp.up_proj.weight is layers[1].mlp.up_proj.weight
    merge(layers)  # nothing is left to be done


def tuned(mode, folder=None, dtype=torch.float32, **settings):
    dense = tiny_model(dtype=dtype)
    cut = cut_model(dense, [LayerSegment(2, 4)])
    rows = random_tokens(16, 20, seed=1), random_tokens(4, 20, seed=2)
    config = TuningConfig(**{**SETTINGS, "overparametrization": mode, **settings})
    return cut, tune_layers(cut, dense, (1, 2), *rows, config, kept=[0, 1, 4, 5], folder=folder, quiet=True)


def loss_of(cut, dtype=torch.float32):
    rows = random_tokens(4, 20, seed=2)
    with torch.no_grad():
        return kl_divergence(tiny_model(dtype=dtype)(rows).logits, cut(rows).logits).mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["linear", "annealed"])
def test_tuning_leaves_a_plain_model_with_the_loss_that_it_says(mode, dtype):
    cut, result = tuned(mode, dtype=dtype, train_head=True, train_final_norm=True)
    plain = cut_model(tiny_model(dtype=dtype), [LayerSegment(2, 4)])
    assert [type(m) for m in cut.modules()] == [type(m) for m in plain.modules()]
    assert cut.state_dict().keys() == plain.state_dict().keys()
    assert {p.dtype for p in cut.parameters()} == {dtype} and all(p.requires_grad for p in cut.parameters())
    for name, tensor in cut.state_dict().items():
        trained = name.startswith(("model.layers.1.", "model.layers.2.", "model.norm", "lm_head"))
        assert torch.equal(tensor, plain.state_dict()[name]) != trained, name
    assert result.improved and result.best_step > 0
    assert result.best_validation_loss == pytest.approx(loss_of(cut, dtype), rel=1e-4)
    assert not any(module._forward_hooks for module in cut.modules())


def test_added_weights_alone_are_plain_tuning():
    """With `P` frozen and no weight decay a step on `W` is a step on `P`."""
    plain, expected = tuned("none")
    cut = cut_model(tiny_model(), [LayerSegment(2, 4)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optimum_clp.tuning.overparametrization.EVERYWHERE", Factors(side=None))
        cut, result = tuned("linear")
    for a, b in zip(cut.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert result.best_validation_loss == pytest.approx(expected.best_validation_loss, rel=1e-3)


def test_patience_begins_when_the_activation_is_gone():
    _, result = tuned("annealed", learning_rate=5.0, max_grad_norm=1e6, patience=2, epochs=10)
    assert result.stopped == "patience" and result.best_step == 0
    # of 40 steps, with an evaluation after every second: 32 with an activation, 34 and 36 without one
    assert result.steps == 36


@pytest.mark.parametrize(("mode", "stop_at"), [("linear", 5), ("annealed", 5), ("annealed", 11)])
def test_a_run_that_fails_goes_on_to_the_same_weights(tmp_path, mode, stop_at, monkeypatch):
    whole, result = tuned(mode, checkpoint_seconds=0)
    step = TrainingLoop._train_step

    def failing(loop):
        if loop.state.step == stop_at:
            raise RuntimeError("planted")
        return step(loop)

    monkeypatch.setattr(TrainingLoop, "_train_step", failing)
    with pytest.raises(RuntimeError, match="planted"):
        tuned(mode, tmp_path, checkpoint_seconds=0)
    monkeypatch.undo()
    resumed, again = tuned(mode, tmp_path, checkpoint_seconds=0)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert again == result
    (best,) = tmp_path.glob(f"best-{result.best_step}.pt")
    assert not any("parametrizations" in name for name in torch.load(best))


def test_a_failure_leaves_the_best_weights(monkeypatch):
    step, dense = TrainingLoop._train_step, tiny_model()
    cut = cut_model(dense, [LayerSegment(2, 4)])
    untuned = copy.deepcopy(cut.state_dict())

    def failing(loop):
        if loop.state.step == 7:
            raise RuntimeError("planted")
        return step(loop)

    monkeypatch.setattr(TrainingLoop, "_train_step", failing)
    rows = random_tokens(16, 20, seed=1), random_tokens(4, 20, seed=2)
    config = TuningConfig(**SETTINGS, overparametrization="linear")
    with pytest.raises(RuntimeError, match="planted"):
        tune_layers(cut, dense, (1, 2), *rows, config, quiet=True)
    monkeypatch.undo()
    assert cut.state_dict().keys() == untuned.keys()
    _, whole = tuned("linear")
    assert loss_of(cut) == pytest.approx(min(h.validation_loss for h in whole.history if h.step < 7), rel=1e-4)
