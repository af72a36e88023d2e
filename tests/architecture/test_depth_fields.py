"""Every field of every config that counts or lists layers has a rule, or a reason for which it needs none.

The configs are those of the installed transformers, as their classes make them without arguments.
"""

import copy
import inspect
import re

import pytest
from tiny_models import tiny_config
from transformers import CONFIG_MAPPING
from zoo import ALL, zoo_config

from optimum_clp.architecture.lookup import cut_config, depth_fields, describe_layers, num_layers, text_config
from optimum_clp.architecture.table import BUILT_IN
from optimum_clp.errors import ModelError

WORDS = re.compile(r"layer|depth|block|mtp|nextn|pattern|period|interval|freq|hybrid|first_|last_|every|step")
OF_ONE_LAYER = "it says how every layer computes"
BESIDE = "transformers stores a list beside it and reads that"
MTP = "it describes the layers of multi-token prediction, whose number becomes 0"
EXCEPTIONS = {
    r"layer_?norm|layernorm|norm_eps": OF_ONE_LAYER,
    r"^return_last_states$": "what a layer returns",
    r"^summary_": "a head for classification",
    r"^layerdrop$": "only training drops layers, each with the same probability",
    r"^time_step_|^step_kernel$": OF_ONE_LAYER,
    r"^block_(auto|ffn|multiple)|^block_size$|^index_(block|local|topk)": OF_ONE_LAYER,
    r"^enable_moe_block$": OF_ONE_LAYER,
    r"(hidden|vocab)_size_per_layer_input$": "sizes; a model that uses them is refused",
    r"^mtp_|^num_mtp": MTP,
    r"^rope_local_base_freq$": "a frequency of a kind of layer",
    r"^scale_attn_by_inverse_layer_idx$": "a condition of gpt2's row",
    r"^depth_decoder_config$": "another model's config, which a cut of Moshi's text decoder does not touch",
    r"^interleave_moe_layer_step$|^prefix_dense_sliding_window_pattern$|^attn_layer_(offset|period)$": BESIDE,
}


def fields_of(config):
    """Names and defaults, also of what the constructor takes and does not store."""
    values = dict(vars(config))
    for name, parameter in inspect.signature(type(config).__init__).parameters.items():
        name = config.attribute_map.get(name, name)
        if name not in values and parameter.kind is not parameter.VAR_KEYWORD and name != "self":
            values[name] = parameter.default
    return {name: value for name, value in values.items() if not name.startswith("_")}


def installed():
    """Types of this transformers that are not refused in it."""
    found = []
    for name in BUILT_IN:
        if name in CONFIG_MAPPING:
            try:
                depth_fields(CONFIG_MAPPING[name]())
            except ModelError:
                continue
            found.append(name)
    return found


@pytest.mark.parametrize("model_type", installed())
def test_every_field_that_speaks_of_layers_is_known(model_type):
    outer = CONFIG_MAPPING[model_type]()
    config, count = text_config(outer), num_layers(outer)
    known = {name for field in depth_fields(outer) for name in field.names} | {BUILT_IN[model_type].count}
    known |= {config.attribute_map.get(name, name) for name in known}
    for name, value in fields_of(config).items():
        lists = isinstance(value, (list, tuple)) and len(value) == count > 2
        if name in known or not (lists or WORDS.search(name)):
            continue
        assert any(re.search(pattern, name) for pattern in EXCEPTIONS), f"{model_type}: {name} = {value!r}"


def with_fields(config, **values):
    for name, value in values.items():
        setattr(config, name, value)
    return config


KEPT = [0, 1, 4, 5]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_nextn_predict_layers", 2, 0),
        ("num_mtp_layers", 1, 0),
        ("mtp_num_hidden_layers", 1, 0),
        ("mtp_num_layers", 3, 0),
        ("hybrid_layer_pattern", [0, 1, 1, 1, 1, 0], [0, 1, 1, 0]),
        ("moe_layer_freq", [0, 1, 1, 1, 0, 1], [0, 1, 0, 1]),
        ("moe_layer_freq", 1, 1),
        ("index_topk_pattern", "FSSFFS", "FSFS"),
        ("attn_window_sizes", (1, 2, 3, 4, 5, 6), (1, 2, 5, 6)),
        ("layer_scales", [1.0, 2.0], [1.0, 2.0]),
        ("eos_token_id", [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),
        ("mtp_config", {"num_nextn_predict_layers": 1, "other": 1}, {"num_nextn_predict_layers": 0, "other": 1}),
        (
            "sparse_config",
            {"deep": {"attention_freq": [0, 1, 0, 1, 0, 1], "size": 6}, "bits": [0, 0, 0, 0, 0, 0]},
            {"deep": {"attention_freq": [0, 1, 0, 1], "size": 6}, "bits": [0, 0, 0, 0, 0, 0]},
        ),
    ],
)
def test_fields_that_come_with_a_checkpoint(name, value, expected):
    """Whatever the type: the classes keep what they do not know, and other readers go by it."""
    config = with_fields(tiny_config(), **{name: copy.deepcopy(value)})
    new = cut_config(config, KEPT)
    assert getattr(new, name) in (expected, list(expected) if isinstance(expected, tuple) else expected)
    assert getattr(config, name) == value


def test_the_guard_sees_a_list_that_was_not_cut():
    config = with_fields(tiny_config(), hybrid_layer_pattern=[0, 1, 1, 1, 1, 0])
    new = cut_config(config, KEPT)
    new.hybrid_layer_pattern = [0, 1, 1, 1]
    assert describe_layers(new)["hybrid_layer_pattern"] != [
        describe_layers(config)["hybrid_layer_pattern"][i] for i in KEPT
    ]


def test_kimis_lists_of_layers():
    tiny = next((t for t in ALL if t.model_type == "kimi_linear"), None)
    if tiny is None or tiny.model_type not in CONFIG_MAPPING:
        pytest.skip("not in this transformers")
    config = zoo_config(tiny)
    config.linear_attn_config = {"full_attn_layers": [2, 5, 7, 8], "kda_layers": [1, 3, 4, 6], "head_dim": 8}
    new = cut_config(config, [0, 1, 2, 5, 6, 7])
    assert new.linear_attn_config == {"full_attn_layers": [2, 5, 6], "kda_layers": [1, 3, 4], "head_dim": 8}


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "glm_moe_dsa", "mimo_v2_flash", "longcat_flash"])
def test_types_whose_fields_were_kept(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip("not in this transformers")
    (tiny,) = [t for t in ALL if t.name == model_type]
    config = with_fields(zoo_config(tiny), mtp_num_hidden_layers=1, num_nextn_predict_layers=1, moe_layer_freq=[1] * 8)
    count = num_layers(config)
    kept = [*range(count - 2)] if model_type != "glm_moe_dsa" else [0, 3, 4, 5, 6, 7]
    new = cut_config(config, kept)
    assert (new.mtp_num_hidden_layers, new.num_nextn_predict_layers, len(new.moe_layer_freq)) == (0, 0, count - 2)


def test_longcats_attentions_are_counted_where_they_are():
    """transformers 4 keeps two attentions for each layer in the cache, and counts them."""
    if "longcat_flash" not in CONFIG_MAPPING:
        pytest.skip("not in this transformers")
    config = CONFIG_MAPPING["longcat_flash"](num_layers=28)
    per_layer = config.num_hidden_layers // 28
    new = cut_config(config, [*range(4), *range(6, 28)])
    assert (new.num_layers, new.num_hidden_layers) == (26, 26 * per_layer)
