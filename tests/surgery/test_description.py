from transformers import AutoConfig, AutoModelForCausalLM

from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model
from optimum_clp.surgery.description import describe_cut


def test_a_cut_says_whether_kinds_of_layers_still_alternate_by_the_types_rule():
    config = AutoConfig.for_model(
        "gemma3_text", num_hidden_layers=12, hidden_size=8, intermediate_size=8, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, vocab_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    dense = AutoModelForCausalLM.from_config(config)
    for segment, rule in (((6, 9), "broken"), ((9, 12), "followed"), ((2, 8), "followed")):
        segments = [LayerSegment(*segment)]
        found = describe_cut(dense, cut_model(dense, segments), segments)
        assert (found.type_rule, found.layer_period) == (rule, 6)
