import pytest
from tiny_models import MODEL_TYPES, tiny_config, tiny_model
from transformers import AutoConfig, PretrainedConfig
from transformers import __version__ as transformers_version
from zoo import ZOO, zoo_config

from optimum_clp.architecture.lookup import (
    context_limit,
    cut_config,
    declared_context_length,
    decoder_layers,
    find_architecture,
    num_layers,
    within_context,
)
from optimum_clp.architecture.table import REFUSED
from optimum_clp.errors import CutError, ModelError


def member(name):
    return next((tiny for tiny in ZOO if tiny.name == name), None) or pytest.skip("not in this transformers")


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


@pytest.mark.parametrize("tiny", ZOO, ids=lambda tiny: tiny.name)
def test_the_context_length_is_found_whatever_its_name(tiny):
    # every other type of the zoo is made for 128 tokens, by one name or another
    without = {"bloom", "falcon_mamba", "mamba", "mamba2", "mpt", "recurrent_gemma", "xlstm"}
    limit = None if tiny.model_type in without else 128
    config = zoo_config(tiny)
    assert context_limit(config) == limit
    assert (within_context(64, config), within_context(4096, config)) == (64, limit or 4096)
    # MPT was trained on so many tokens; its ALiBi goes on behind them
    assert declared_context_length(config) == (2048 if tiny.model_type == "mpt" else limit)


def test_the_length_that_bloom_was_trained_on_is_declared_but_is_no_limit():
    config = zoo_config(member("bloom"), seq_length=256)
    assert declared_context_length(config) == 256
    assert context_limit(config) is None and within_context(4096, config) == 4096


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


REASONS = [
    (
        "jamba",
        [0, 1, 2, 5, 6, 7],
        "config.attn_layer_period and config.attn_layer_offset describe layers at equal distances",
    ),
    (
        "ernie4_5_moe",
        [0, 1, 2, 3, 5, 6, 7],
        "config.moe_layer_interval puts experts in every n-th layer, and those left",
    ),
    ("minicpm3", [0, 1, 2, 3, 4], "no value of config.scale_depth gives 5 layers the factor"),
    (
        "gpt2-inverse_index",
        [0, 2],
        r"its own index \(attention scores are divided by it\), and layer 2 would get another one",
    ),
    ("diffllama", [1, 2], r"its own index \(the initial lambda of its differential attention\), and layer 1"),
    ("gpt_neox_japanese", [0, 1], "layer 7 must stay, because the last layer alone has a bias in its attention"),
    (
        "modernbert-decoder",
        [1, 2],
        "layer 0 must stay, because the first layer alone has no norm before its attention",
    ),
    (
        "zamba",
        [0, 1],
        "layer 2 is 'hybrid' and must stay, because hybrid layers share the weights of one transformer block",
    ),
    (
        "gemma4_text",
        [0, 1, 2],
        "the last layer must be 'full_attention' in config.layer_types, and layer 2 would be the last",
    ),
    (
        "gemma4_unified_text-shared_kv",
        [0, 1, 2, 4, 5, 6, 7],
        "layer 3 must stay, because later layers use its keys and values",
    ),
    ("glm_moe_dsa", [0, 2, 3], "layer 2 takes over what layer 1 has computed, which must stay"),
]


@pytest.mark.parametrize(("name", "kept", "reason"), REASONS, ids=[r[0] for r in REASONS])
def test_a_cut_that_is_not_exact_is_refused_with_the_reason(name, kept, reason):
    with pytest.raises(CutError, match=f"removed layers is .*{reason}.*; no config describes what would be left"):
        cut_config(zoo_config(member(name)), kept)


def kinds_of(config):
    return getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []


def without_attention(config):
    return [i for i, kind in enumerate(kinds_of(config)) if kind.startswith(("linear", "mamba", "conv"))]


HYBRIDS = [t for t in ZOO if 0 < len(without_attention(zoo_config(t))) < len(kinds_of(zoo_config(t)))]


@pytest.mark.parametrize("tiny", HYBRIDS, ids=lambda tiny: tiny.name)
def test_no_hybrid_loses_all_its_attention(tiny):
    """Its cached generation would end in an error: the cache measures the past by a layer with attention."""
    config = zoo_config(tiny)
    with pytest.raises(CutError, match="no layer with attention would be left|is 'hybrid' and must stay"):
        cut_config(config, without_attention(config))


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_a_refused_type_says_why_and_what_helps(model_type):
    rule, remedy = REFUSED[model_type]
    config = PretrainedConfig()
    config.model_type = model_type
    with pytest.raises(ModelError) as refused:
        find_architecture(config)
    assert str(refused.value).startswith(f"model_type is {model_type!r}: {rule}. {remedy}")


def test_per_layer_embeddings_are_refused():
    config = zoo_config(member("gemma4_text"), hidden_size_per_layer_input=8)
    with pytest.raises(ModelError, match="config.hidden_size_per_layer_input is 8: every layer has its own slice"):
        find_architecture(config)


@pytest.mark.skipif(not transformers_version.startswith("4."), reason="faults of transformers 4")
@pytest.mark.parametrize("model_type", ["recurrent_gemma", "xlstm"])
def test_faults_of_transformers_4_are_refused(model_type):
    with pytest.raises(ModelError, match=f"model_type is '{model_type}': in transformers 4.* Install transformers 5"):
        find_architecture(AutoConfig.for_model(model_type))


def test_layers_that_do_not_fit_the_config_are_an_error():
    model = tiny_model("llama")
    model.model.layers = model.model.layers[:4]  # what a naive cut leaves
    with pytest.raises(
        ModelError, match="model is 'LlamaForCausalLM': its decoder layers were not found: lists of 6 modules"
    ):
        decoder_layers(model)
