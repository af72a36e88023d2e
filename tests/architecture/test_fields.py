"""Each rule: what the rewritten field says of the layers that are left is what the old one said of them, or it refuses."""

import itertools
import math

import pytest
from transformers import PretrainedConfig

from optimum_clp.architecture.fields import (
    AttentionTypes,
    Cycle,
    Dropped,
    FirstLayers,
    LastLayers,
    LayerIndices,
    NotRepresentable,
    Period,
    PerLayer,
    RedundantPeriod,
    Same,
    ScaledByDepth,
    SparseRange,
    SparseStep,
    stored,
)

COUNT = 6
CUTS = [list(kept) for size in range(1, COUNT) for kept in itertools.combinations(range(COUNT), size)]
NEO = {"attention_types": [[["global", "local"], 3]], "attention_layers": ["global", "local"] * 3}
EXPRESSES_EVERYTHING = [
    (PerLayer("kinds"), {"kinds": list("abcabd")}),
    (PerLayer("kinds"), {"kinds": tuple("abcabd")}),
    (LayerIndices("attention"), {"attention": [1, 4, 5]}),
    (LayerIndices("extra", base=1), {"extra": [1, 3, 6]}),
    (FirstLayers("dense"), {"dense": 4}),
    (LastLayers("shared"), {"shared": 2}),
    (Cycle("blocks"), {"blocks": ["r", "r", "a"]}),
    (SparseStep(), {"decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    (SparseStep(), {"decoder_sparse_step": 1, "mlp_only_layers": []}),
    (SparseRange(), {"moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 4}),
    (AttentionTypes(), NEO),
    (Same("blocks"), {"blocks": COUNT}),
]
EXPRESSES_SOME = [
    (Period("period", "offset"), {"period": 3, "offset": 1}),
    (Period("period", "offset"), {"period": 2, "offset": 0}),
    (SparseRange(), {"moe_layer_interval": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 5}),
]


def name(case):
    return f"{type(case[0]).__name__}-{'-'.join(map(str, case[1].values()))}"


def cut(field, values, kept):
    old, new = PretrainedConfig(**values), PretrainedConfig(**values)
    described = field.describe(old, COUNT)
    field.rewrite(old, new, kept, COUNT)
    assert vars(old) == vars(PretrainedConfig(**values))
    return [described[i] for i in kept], field.describe(new, len(kept)), new


@pytest.mark.parametrize("case", EXPRESSES_EVERYTHING, ids=name)
def test_every_cut_is_described_as_before(case):
    for kept in CUTS:
        wanted, found, _ = cut(*case, kept)
        assert found == wanted, kept


@pytest.mark.parametrize("case", EXPRESSES_SOME, ids=name)
def test_a_cut_is_described_as_before_or_nothing_could_describe_it(case):
    """The truth is a search through all values."""
    field, values = case
    outcomes = set()
    for kept in CUTS:
        try:
            wanted, found, _ = cut(field, values, kept)
            assert found == wanted, kept
            outcomes.add("exact")
        except NotRepresentable as reason:
            outcomes.add("refused")
            described = field.describe(PretrainedConfig(**values), COUNT)
            wanted = [described[i] for i in kept]
            for settings in itertools.product(range(1, COUNT + 2), *[range(COUNT + 1)] * (len(values) - 1)):
                other = PretrainedConfig(**dict(zip(values, settings, strict=True)))
                assert field.describe(other, len(kept)) != wanted, (kept, settings)
            assert all(f"config.{n}" in str(reason) for n in field.names[:1])
    assert outcomes == {"exact", "refused"}


def test_a_whole_period_less_changes_no_number():
    _, _, new = cut(Period("period", "offset"), {"period": 3, "offset": 1}, [0, 1, 2])
    assert (new.period, new.offset) == (3, 1)


def test_a_field_that_is_not_there_is_left_alone():
    for field, _ in EXPRESSES_EVERYTHING + EXPRESSES_SOME:
        old, new = PretrainedConfig(), PretrainedConfig()
        field.rewrite(old, new, [0, 1], COUNT)
        assert vars(new) == vars(old) and field.describe(old, COUNT) is None


def test_a_list_of_another_length_is_refused():
    with pytest.raises(
        NotRepresentable, match="config.kinds has 2 entries, and it must have one for each of the 6 layers"
    ):
        PerLayer("kinds").rewrite(PretrainedConfig(kinds=["a", "b"]), PretrainedConfig(), [0], COUNT)


def test_a_factor_of_the_depth_stays_the_same_number_bit_by_bit_or_is_refused():
    refused = 0
    for left, count in itertools.combinations(range(1, 41), 2):
        old, new = PretrainedConfig(scale=1.4), PretrainedConfig(scale=1.4)
        try:
            ScaledByDepth("scale").rewrite(old, new, list(range(left)), count)
        except NotRepresentable as reason:
            assert f"no value of config.scale gives {left} layers the factor" in str(reason)
            refused += 1
        else:
            assert new.scale / math.sqrt(left) == 1.4 / math.sqrt(count)
    assert 0 < refused < 40 * 39 / 4


@pytest.mark.parametrize(
    ("kinds", "kept", "period"),
    [
        ("ssfssf", [0, 1, 2], 3),  # periodic still
        ("ssfssf", [0, 2, 3, 5], 2),  # with another period
        ("ssfssf", [0, 1], 3),  # no special layer is left
        ("ssfssf", [1, 2, 3, 5], 2),
        ("ssfssf", [0, 1, 2, 5], 3),  # not periodic: as it was
    ],
)
def test_a_redundant_period_follows_where_it_can(kinds, kept, period):
    field = RedundantPeriod("pattern", "kinds", "f")
    old, new = (PretrainedConfig(pattern=3, kinds=list(kinds)) for _ in range(2))
    field.rewrite(old, new, kept, COUNT)
    assert new.pattern == period
    assert field.describe(new, len(kept)) is None


def test_layers_for_further_tokens_are_gone():
    old, new = PretrainedConfig(further=2), PretrainedConfig(further=2)
    Dropped("further").rewrite(old, new, [0, 1], COUNT)
    assert new.further == 0


def test_a_property_is_not_a_stored_field():
    class Config(PretrainedConfig):
        @property
        def kinds(self):
            return ["a"] * COUNT

    assert stored(Config(), "kinds") is None
    PerLayer("kinds").rewrite(Config(), Config(), [0], COUNT)


def test_hunyuan_has_experts_and_choices_of_them_layer_by_layer(tmp_path):
    """As Hunyuan-A13B's config.json: lists, whose entries may differ."""
    import torch
    from transformers import AutoModelForCausalLM
    from zoo import ALL, zoo_config

    from optimum_clp.checkpoint.saving import save_checkpoint, verify_checkpoint
    from optimum_clp.segments import LayerSegment
    from optimum_clp.surgery.cut import cut_model

    (tiny,) = [t for t in ALL if t.model_type == "hunyuan_v1_moe"]
    config = zoo_config(tiny)
    config.moe_topk = [1, 2, 3, 1, 2, 3, 1, 2]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.config.num_shared_expert = [1, 1, 2, 1, 1, 1, 1, 2]
    smaller = cut_model(model, [LayerSegment(3, 5)])
    assert smaller.config.moe_topk == [1, 2, 3, 3, 1, 2]
    assert smaller.config.num_shared_expert == [1, 1, 2, 1, 1, 2]
    chosen = [{m.top_k for m in layer.modules() if hasattr(m, "top_k")} for layer in smaller.model.layers]
    assert chosen == [{1}, {2}, {3}, {3}, {1}, {2}]
    save_checkpoint(smaller, None, tmp_path)
    verify_checkpoint(tmp_path, smaller)
