import pytest
from tiny_models import tiny_config
from transformers import AutoConfig

from optimum_clp.architecture.layer_pattern import follows_type_rule, layer_period
from optimum_clp.architecture.lookup import cut_config
from optimum_clp.errors import CutError
from optimum_clp.segments import candidate_segments, kept_layers

# what makes the list of kinds in transformers, from the number of layers alone, and how often the kinds come again
ALTERNATING = {
    "cohere2": ("layer_types", 4),
    "gemma2": ("layer_types", 2),
    "gemma3_text": ("layer_types", 6),
    "gpt_oss": ("layer_types", 2),
    "qwen3_next": ("layer_types", 4),
    "smollm3": ("no_rope_layers", 4),
}


@pytest.mark.parametrize("model_type", ALTERNATING)
def test_a_cut_follows_the_rule_where_a_new_config_of_so_few_layers_has_the_same_kinds(model_type):
    field, period = ALTERNATING[model_type]
    dense = AutoConfig.for_model(model_type, num_hidden_layers=12)
    assert layer_period(dense) == period
    seen = set()
    for count in range(1, 9):
        by_rule = getattr(AutoConfig.for_model(model_type, num_hidden_layers=12 - count), field)
        for segment in candidate_segments(12, count):
            kept = kept_layers([segment], 12)
            try:
                left = getattr(cut_config(dense, kept), field)
            except CutError:
                continue
            follows = follows_type_rule(dense, kept)
            assert follows == (list(left) == list(by_rule)), segment
            assert follows or count % period
            seen.add(follows)
    assert seen == {True, False}


def test_layers_of_one_kind_follow_any_rule():
    config = tiny_config("llama")
    assert layer_period(config) is None and follows_type_rule(config, [0, 3, 5])


def test_kinds_of_the_first_layers_alone_do_not_alternate():
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=12)
    config.mlp_layer_types = ["dense"] + 11 * ["sparse"]
    assert layer_period(config) == 6
    assert follows_type_rule(config, [0, *range(7, 12)]) and follows_type_rule(config, range(6, 12))
    assert not follows_type_rule(config, [0, *range(6, 12)])
