import pytest
from tiny_models import MODEL_TYPES, tiny_config, tiny_model
from transformers import AutoConfig

from optimum_clp.architecture import cut_config, decoder_layers, find_architecture, num_layers
from optimum_clp.errors import ModelError


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_layers_are_found(model_type):
    model = tiny_model(model_type)
    assert len(decoder_layers(model)) == num_layers(model.config) == 6
    assert decoder_layers(model) is model.model.layers


def test_an_unknown_type_is_refused_with_the_supported_ones():
    with pytest.raises(
        ModelError, match="model_type is 'gpt2': the supported architectures are llama, mistral, qwen2, "
    ):
        find_architecture(AutoConfig.for_model("gpt2"))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_depth_dependent_fields_are_rewritten(model_type):
    config = tiny_config(model_type, max_window_layers=3)
    assert config.layer_types == ["full_attention"] * 3 + ["sliding_attention"] * 3
    new = cut_config(config, [0, 1, 4, 5])
    assert new.num_hidden_layers == 4
    assert new.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert new.max_window_layers == 2
    assert config.num_hidden_layers == 6 and len(config.layer_types) == 6


def test_a_list_of_the_wrong_length_is_refused():
    config = tiny_config("qwen3")
    config.__dict__["layer_types"] = ["full_attention"] * 5
    with pytest.raises(ModelError, match="config.layer_types is .*one entry for each of the 6 layers"):
        cut_config(config, [0, 1])


def test_a_config_with_settings_of_single_layers_is_refused():
    config = tiny_config("llama")
    if not hasattr(config, "per_layer_config"):
        pytest.skip("transformers 4 has no per-layer configs")
    config.per_layer_config = {2: {"hidden_act": "gelu"}}
    with pytest.raises(ModelError, match="per_layer_config is .*cannot be renumbered exactly"):
        find_architecture(config)
