import pytest
from tiny_models import MODEL_TYPES, tiny_config, tiny_model
from transformers import AutoConfig

from optimum_clp.architecture import cut_config, decoder_layers, find_architecture, num_layers
from optimum_clp.errors import CutError, ModelError


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_layers_are_found(model_type):
    model = tiny_model(model_type)
    assert len(decoder_layers(model)) == num_layers(model.config) == 6
    assert decoder_layers(model) is model.model.layers


def test_an_unknown_type_is_refused_with_the_supported_ones():
    config = AutoConfig.for_model("llama")
    config.model_type = "brand-new"
    with pytest.raises(
        ModelError,
        match=r"model_type is 'brand-new': it is not one of the architectures whose cuts are tested; cutting it could "
        r"corrupt it silently\. Use one of: afmoe, .*, zamba; or add it, see docs/architectures.md",
    ):
        find_architecture(config)


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
    with pytest.raises(
        CutError, match="config.layer_types has 5 entries, and it must have one for each of the 6 layers"
    ):
        cut_config(config, [0, 1])


def test_settings_of_single_layers_move_with_their_layers():
    config = tiny_config("llama")
    if not hasattr(config, "per_layer_config"):
        pytest.skip("transformers 4 has no per-layer configs")
    config.per_layer_config = {2: {"intermediate_size": 40}, 4: {"intermediate_size": 24}}
    new = cut_config(config, [0, 1, 4, 5])
    assert [layer.intermediate_size for layer in new.per_layer_config] == [56, 56, 24, 56]
    assert [layer.intermediate_size for layer in config.per_layer_config] == [56, 56, 40, 56, 24, 56]
