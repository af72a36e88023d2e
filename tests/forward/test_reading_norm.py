import pytest
import torch
from tiny_models import random_tokens, tiny_model
from zoo import ZOO, zoo_model

from optimum_clp.architecture.lookup import decoder_layers
from optimum_clp.forward.hooks import recorded_inputs, run_without_head
from optimum_clp.forward.layer_stack import LayerStack
from optimum_clp.forward.reading_norm import reading_norms

# norms behind the sublayers, or more than one stream
NONE_IN_LAYERS = {"exaone4", "flex_olmo", "olmo2", "olmo3", "olmo_hybrid"}
NONE_AT_ALL = {"deepseek_v4", "hy_v4", "openai-gpt"}


def found_in(model):
    """What reads the states that enter layer 1, and those that leave the last layer; and these states."""
    layers = decoder_layers(model)
    with torch.no_grad(), recorded_inputs(layers, [1, len(layers)]) as states:
        run_without_head(model, random_tokens(1, 3))
    return reading_norms(model, LayerStack(model), dict(states)), states


@pytest.mark.parametrize(
    ("model_type", "first", "last"),
    [
        ("llama", "model.layers.1.input_layernorm", "model.norm"),
        ("gemma3_text", "model.layers.1.input_layernorm", "model.norm"),
        ("gpt2", "transformer.h.1.ln_1", "transformer.ln_f"),
        ("phi", "model.layers.1.input_layernorm", "model.final_layernorm"),
        ("mamba", "backbone.layers.1.norm", "backbone.norm_f"),
        ("olmo", "model.layers.1.input_layernorm", "model.norm"),
        ("olmo2", None, "model.norm"),
        ("openai-gpt", None, None),
    ],
)
def test_the_norm_that_reads_a_state_is_found(model_type, first, last):
    model = zoo_model(next(tiny for tiny in ZOO if tiny.model_type == model_type)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.rand(parameter.shape, generator=generator))
    norms, states = found_in(model)
    for index, name in ((1, first), (len(decoder_layers(model)), last)):
        assert (index in norms) == (name is not None)
        if name is None:
            continue
        own, read = model.get_submodule(name), norms[index](states[index].float())
        with torch.no_grad():
            torch.testing.assert_close(read, own(states[index]))
        assert not any(p is q for p in own.parameters() for q in norms[index].parameters())
        assert not read.requires_grad


def test_its_copy_is_in_float32_and_learns_nothing():
    model = tiny_model().to(torch.bfloat16)
    norms, states = found_in(model)
    given = states[1].float().requires_grad_()
    read = norms[1](given)
    assert read.dtype == torch.float32
    read.square().sum().backward()
    assert given.grad is not None and all(p.grad is None for p in norms[1].parameters())
    assert not any(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("tiny", ZOO, ids=lambda t: f"{t.model_type}{t.variant}")
def test_every_architecture_with_norms_before_its_sublayers_has_one(tiny):
    model = zoo_model(tiny).eval()
    norms, _ = found_in(model)
    wanted = {1, len(decoder_layers(model))} - (set() if tiny.model_type not in NONE_IN_LAYERS else {1})
    assert set(norms) == (set() if tiny.model_type in NONE_AT_ALL else wanted)
