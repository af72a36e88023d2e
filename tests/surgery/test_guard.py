"""Faults that other tools let through, planted one at a time; the contract suite mutates every field of every type."""

import pytest
import torch
from zoo import ZOO, zoo_model

from optimum_clp.architecture.lookup import cut_config
from optimum_clp.errors import CutError
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery import cut as surgery
from optimum_clp.surgery.cut import cut_model
from optimum_clp.surgery.guard import check_cut

KEPT = [0, 1, 2, 5, 6, 7]


def member(name):
    return next((tiny for tiny in ZOO if tiny.name == name), None) or pytest.skip("not in this transformers")


def cut_with(model, monkeypatch, change, *, look_at_config=True):
    """A cut whose config `change` has spoilt; without the guard's look at the config, the others are on their own."""

    def spoilt(config, kept):
        new = cut_config(config, kept)
        change(new)
        return new

    monkeypatch.setattr(surgery, "cut_config", spoilt)
    if not look_at_config:
        monkeypatch.setattr("optimum_clp.surgery.guard._description_differences", lambda *configs: [])
    return cut_model(model, [LayerSegment(3, 5)])


def test_a_stale_layer_index():
    model = zoo_model(member("mistral"))
    smaller = cut_model(model, [LayerSegment(3, 5)])
    smaller.model.layers[3].self_attn.layer_idx = 5
    with pytest.raises(CutError, match="layer 3: self_attn.layer_idx is 5: the dense model has 3 there"):
        check_cut(smaller, model, KEPT)


@pytest.mark.parametrize("look", [True, False])
def test_a_wrong_rule_for_experts(monkeypatch, look):
    def wrong(config):
        config.mlp_only_layers = [0, 1, 3, 5]

    model = zoo_model(member("qwen3_moe"))
    assert sorted(cut_config(model.config, KEPT).mlp_only_layers) != [0, 1, 3, 5]
    with pytest.raises(
        CutError, match="cut model is .model.layers.1.mlp.gate_proj.: the dense model has no such module"
    ):
        cut_with(model, monkeypatch, wrong, look_at_config=look)


@pytest.mark.parametrize("look", [True, False])
def test_shifted_no_rope_layers(monkeypatch, look):
    def shifted(config):
        config.no_rope_layers = config.no_rope_layers[1:] + config.no_rope_layers[:1]

    expected = "config.no_rope_layers is" if look else "self_attn.use_rope is"
    with pytest.raises(CutError, match=expected):
        cut_with(zoo_model(member("smollm3")), monkeypatch, shifted, look_at_config=look)


def test_a_mask_that_is_chosen_by_index_while_the_model_runs(monkeypatch):
    """No attribute of a layer shows it in transformers 5; what the layer is called with does."""
    tiny = member("olmo3")
    model = zoo_model(tiny)
    smaller = cut_model(model, [LayerSegment(3, 5)])
    kinds = smaller.config.layer_types
    smaller.config.layer_types = [kinds[1], kinds[0], *kinds[2:]]
    monkeypatch.setattr("optimum_clp.surgery.guard._description_differences", lambda *configs: [])
    for layer, kind in zip(smaller.model.layers, smaller.config.layer_types, strict=True):
        layer.self_attn.attention_type = kind  # transformers 4 reads it here
    with pytest.raises(CutError, match=r"layer 0: (argument|self_attn)"):
        check_cut(smaller, model, KEPT)


def test_the_guard_computes_neither_layers_nor_logits():
    """A probe longer than the window, in a model with a large vocabulary, would take longer than the cut."""
    model = zoo_model(member("mistral"))
    seen, attention = [], {layer.self_attn for layer in model.model.layers}

    # of all modules: one of a single module is itself looked at
    def note(module, args, output):
        if module is model.lm_head:
            seen.append("head")
        elif module in attention:
            seen.append(output[0].shape[1])

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        cut_model(model, [LayerSegment(3, 5)])
    finally:
        handle.remove()
    assert seen == [1] * 8  # one token, which shows what the layers return


def test_a_failed_guard_leaves_the_model_as_it_was(monkeypatch):
    model = zoo_model(member("qwen3_moe"))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    config = model.config.to_dict()
    with pytest.raises(CutError):
        cut_with(model, monkeypatch, lambda config: setattr(config, "mlp_only_layers", [0]))
    assert model.config.to_dict() == config
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or "forward" in m.__dict__ for m in model.modules())


def test_a_model_in_training_mode_is_cut_and_left_in_it():
    """Dropout and OPT's layer drop would use the caller's random numbers, and skip layers that the guard looks at."""
    model = zoo_model(member("opt"), layerdrop=1.0, dropout=0.5).train()
    model.model.decoder.layers[1].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    smaller = cut_model(model, [LayerSegment(3, 5)])
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not any(module.training for module in smaller.modules())
