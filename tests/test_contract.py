"""The contract that every architecture keeps: each invariant of gating, search, surgery, guard and tuning, for every member
of the zoo, with tied and untied head, cut at several places. ONNX and quanto are the slow tier's, in files of their own.
"""

import copy
import functools
import json
import re

import pytest
import torch
from gates import gated
from tiny_models import VOCABULARY, random_tokens
from zoo import ZOO, zoo_config, zoo_model

from optimum_clp.architecture.fields import Dropped, RedundantPeriod
from optimum_clp.architecture.lookup import (
    allowed_segments,
    cut_config,
    cut_obstacle,
    decoder_layers,
    decoder_path,
    depth_fields,
    describe_layers,
    num_layers,
    text_config,
)
from optimum_clp.checkpoint.saving import save_checkpoint, verify_checkpoint
from optimum_clp.configuration.stages import SearchConfig, TuningConfig
from optimum_clp.errors import CutError
from optimum_clp.forward.hooks import recorded_inputs
from optimum_clp.forward.layer_stack import LayerStack
from optimum_clp.search.segment_search import search_segments
from optimum_clp.segments import LayerSegment, endpoint_layers, kept_layers
from optimum_clp.surgery import cut as surgery
from optimum_clp.surgery import guard
from optimum_clp.surgery.cut import cut_model, own_storage
from optimum_clp.surgery.guard import check_cut
from optimum_clp.tuning.endpoints import tune_layers

LENGTH = 20  # longer than every sliding window of the zoo


@functools.lru_cache(maxsize=2)
def dense_model(name, tied):
    (tiny,) = [t for t in ZOO if t.name == name]
    return zoo_model(tiny, **({} if tied is None else {"tie_word_embeddings": tied}))


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=random_tokens(2, LENGTH) if ids is None else ids, use_cache=False).logits


def segments_of(cut):
    return [LayerSegment(*pair) for pair in cut]


def kept_of(model, cut):
    return kept_layers(segments_of(cut), num_layers(model.config))


def hard_gate_of(model, cut):
    gate = torch.ones(num_layers(model.config), dtype=torch.float64)
    for start, stop in cut:
        gate[start:stop] = 0
    return gate


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__) for m in model.modules())


def snapshot(model):
    tensors = {n: (t.data_ptr(), t.clone()) for n, t in model.state_dict().items()}
    return tensors, copy.deepcopy(model.config.to_dict()), hooks(model)


def unchanged(model, before):
    tensors, config, hooked = before
    now = model.state_dict()
    return (
        now.keys() == tensors.keys()
        and all(t.data_ptr() == tensors[n][0] and torch.equal(t, tensors[n][1]) for n, t in now.items())
        and model.config.to_dict() == config
        and hooks(model) == hooked
    )


def greedy(model, use_cache):
    ids = random_tokens(2, LENGTH)
    model.generation_config.eos_token_id = None
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        use_cache=use_cache,
    )


def generates_alike(model):
    """Whether cached generation gives what uncached generation gives, or the error that it ends in."""
    try:
        return bool(torch.equal(greedy(model, True), greedy(model, False)))
    except Exception as error:
        return type(error).__name__


def case(tiny, tied):
    name = {None: tiny.name, True: f"{tiny.name}-tied", False: f"{tiny.name}-untied"}[tied]
    return pytest.param(tiny, tied, id=name)


def cases():
    return [case(tiny, tied) for tiny in ZOO for tied in ((False, True) if tiny.tying else (None,))]


def once():
    return [pytest.param(tiny, id=tiny.name) for tiny in ZOO]


class TestContract:
    @pytest.mark.parametrize(("tiny", "tied"), cases())
    def test_cut_models_are_the_hard_gated_model_and_reload_with_stock_classes(self, tiny, tied, tmp_path):
        model = dense_model(tiny.name, tied)
        expected_tie = model.get_output_embeddings() is not None and (
            model.get_output_embeddings().weight is model.get_input_embeddings().weight
        )
        if tied is not None:
            assert expected_tie == tied
        before = snapshot(model)
        layers = decoder_layers(model)
        # a tied head changes nothing about where the cut is: one single and the several segments are enough
        for number, cut in enumerate(tiny.cuts if not tied else tiny.cuts[-2:]):
            smaller = cut_model(model, segments_of(cut))
            with gated(layers, hard_gate_of(model, cut)):
                expected = logits(model)
            assert torch.equal(logits(smaller), expected)
            assert not torch.equal(expected, logits(model))
            folder = tmp_path / str(number)
            save_checkpoint(smaller, None, folder)
            # stock classes, no key left over, equal tensors, and equal logits on the same storage
            verify_checkpoint(folder, smaller)
            config = json.loads((folder / "config.json").read_text())
            assert config["model_type"] == model.config.model_type
        assert unchanged(model, before)

    @pytest.mark.parametrize("tiny", once())
    def test_gates_are_exact_at_both_ends_and_come_off(self, tiny, architecture_result):
        model = dense_model(tiny.name, False if tiny.tying else None)
        layers, dense = decoder_layers(model), logits(model)
        with gated(layers, torch.ones(len(layers), dtype=torch.float64)):
            assert torch.equal(logits(model), dense)
        cut = tiny.cuts[0]
        (start, stop), stack = cut[0], LayerStack(model)
        with gated(layers, hard_gate_of(model, cut)):
            expected = logits(model)
        with torch.no_grad(), recorded_inputs(layers, [start]) as found:
            logits(model)
        with stack.resumed(stop, found[start]):
            assert torch.equal(logits(model), expected)
        gate = hard_gate_of(model, cut).tolist()
        with torch.no_grad(), recorded_inputs(layers, [stack.entry(gate)[1]]) as entered:
            logits(model)
        with stack.gated(gate, entered[stack.entry(gate)[1]]):  # as the search runs it
            assert torch.equal(logits(model), expected)
        with pytest.raises(RuntimeError, match="planted"):
            with gated(layers, torch.full((len(layers),), 0.5)), stack.resumed(1, found[start]):
                raise RuntimeError("planted")
        assert hooks(model) == 0
        assert torch.equal(logits(model), dense)
        architecture_result(tiny.name, "gate", "exact")

    @pytest.mark.parametrize("tiny", once())
    def test_cached_generation_is_as_right_as_the_dense_models(self, tiny):
        model = dense_model(tiny.name, False if tiny.tying else None)
        dense = generates_alike(model)
        smaller = cut_model(model, segments_of(tiny.cuts[-1]))
        if dense is True:
            assert generates_alike(smaller) is True
        else:  # a fault of this transformers version, which the cut model shares
            assert generates_alike(smaller) is not True

    @pytest.mark.parametrize("tiny", once())
    def test_search_finds_planted_identity_layers_among_the_cuts_that_are_exact(self, tiny):
        model = copy.deepcopy(dense_model(tiny.name, False if tiny.tying else None))
        single = [cut[0] for cut in tiny.cuts if len(cut) == 1]
        planted = LayerSegment(*single[1 if len(single) > 1 else 0])
        with torch.no_grad():
            for index in range(planted.start, planted.stop):
                for parameter in decoder_layers(model)[index].parameters():
                    if parameter.dim() > 1:
                        parameter.zero_()
        settings = SearchConfig(strategy="exhaustive", num_sequences=2, batch_size=2)
        result = search_segments(model, random_tokens(2, LENGTH), len(planted), settings, quiet=True)
        allowed = allowed_segments(model.config, len(planted))
        assert [s.segment for s in result.scored] == allowed
        if tiny.plantable:
            assert result.segments == (planted,)
            assert result.score == pytest.approx(0, abs=1e-5)
        gate = SearchConfig(strategy="gate", num_sequences=2, batch_size=2, budget=100.0)
        found = search_segments(model, random_tokens(2, LENGTH), len(planted), gate, quiet=True)
        oracle = {s.segment: s.kl for s in result.scored}
        assert any(scored.num_rows == 2 for scored in found.scored)
        for scored in (s for s in found.scored if s.num_rows == 2):
            assert scored.kl == pytest.approx(oracle[scored.segment], rel=1e-4, abs=1e-5)

    @pytest.mark.parametrize("tiny", once())
    def test_endpoint_tuning_changes_the_endpoints_only(self, tiny, architecture_result):
        model = dense_model(tiny.name, False if tiny.tying else None)
        before = snapshot(model)
        cut = tiny.cuts[-1]
        smaller = cut_model(model, segments_of(cut))
        layers = endpoint_layers(segments_of(cut), num_layers(model.config))
        path = decoder_path(smaller)
        start = {n: p.detach().clone() for n, p in smaller.named_parameters()}
        config = TuningConfig(
            init="least_squares", hidden_epochs=1, learning_rate=1e-3, epochs=2, batch_size=2, patience=9
        )
        kept = kept_layers(segments_of(cut), num_layers(model.config))
        rows = random_tokens(4, LENGTH), random_tokens(2, LENGTH, seed=1)
        result = tune_layers(smaller, model, layers, *rows, config, kept=kept, quiet=True)
        prefixes = tuple(f"{path}.{index}." for index in layers)
        changed = {n for n, p in smaller.named_parameters() if not torch.equal(p, start[n])}
        assert all(name.startswith(prefixes) for name in changed)
        # a step of hidden states has half of the rows: 4 steps, and then 2 in each of 2 epochs
        assert result.steps == 8 and all(torch.isfinite(torch.tensor(h.validation_loss)) for h in result.history)
        assert bool(changed) == result.improved
        assert unchanged(model, before)
        architecture_result(tiny.name, "tune", "works")

    @pytest.mark.parametrize("tiny", once())
    def test_what_can_be_cut_is_what_is_said(self, tiny, architecture_result):
        model = dense_model(tiny.name, False if tiny.tying else None)
        before, count = snapshot(model), num_layers(model.config)
        reasons = set()
        for start in range(count - 1):
            kept = kept_layers([LayerSegment(start, start + 2)], count)
            reason = cut_obstacle(model.config, kept)
            if reason is None:
                assert num_layers(cut_model(model, [LayerSegment(start, start + 2)]).config) == count - 2
            else:
                reasons.add(tiny_reason(reason))
                with pytest.raises(CutError, match="no config describes what would be left"):
                    cut_model(model, [LayerSegment(start, start + 2)])
        assert unchanged(model, before)
        text = "exact" if not reasons else f"some: {'; '.join(sorted(reasons))}"
        architecture_result(tiny.name, "cut", text)

    @pytest.mark.parametrize("tiny", once())
    def test_a_mutated_config_does_not_pass_the_guard(self, tiny, monkeypatch):
        """Every field that depends on depth is changed once.

        The guard's look at the config sees them all, but for those that nothing in transformers reads. Its looks at the
        model know nothing of our rules; what survives them is explained in EXPLAINED.
        """
        model = dense_model(tiny.name, False if tiny.tying else None)
        kept = kept_of(model, tiny.cuts[-1])
        for field in depth_fields(model.config):
            mutant = mutate(field, cut_config(model.config, kept), len(kept))
            if mutant is None:
                continue
            unread = isinstance(field, (RedundantPeriod, Dropped))
            assert unread or list(guard._description_differences(mutant, model.config, kept)), field
            monkeypatch.setattr(surgery, "cut_config", lambda config, kept, mutant=mutant: mutant)
            monkeypatch.setattr(surgery, "check_cut", lambda *models: None)
            try:
                smaller = cut_model(model, segments_of(tiny.cuts[-1]))
                seen = [
                    *guard._module_differences(smaller, model, kept),
                    *guard._tensor_differences(smaller, model, kept),
                ]
                seen = seen or list(guard._setting_differences(smaller, model, kept))
                seen = seen or list(guard._argument_differences(smaller, model, kept))
            except (CutError, ValueError, IndexError, KeyError, TypeError) as error:
                seen = [error]
            assert seen or field.names[0] in EXPLAINED, field

    @pytest.mark.parametrize("tiny", once())
    def test_planted_faults_do_not_pass_the_guard(self, tiny):
        model = dense_model(tiny.name, False if tiny.tying else None)
        cut = tiny.cuts[-1]
        kept = kept_of(model, cut)
        smaller = cut_model(model, segments_of(cut))
        check_cut(smaller, model, kept)
        layers = decoder_layers(smaller)
        indexed = [m for m in layers[-1].modules() if isinstance(getattr(m, "layer_idx", None), int)]
        if indexed:
            indexed[0].layer_idx += 1
            with pytest.raises(CutError, match="layer_idx is"):
                check_cut(smaller, model, kept)
            indexed[0].layer_idx -= 1
        own_storage(layers[0])
        with pytest.raises(CutError, match=r"cut model, .*\.0\..* is "):
            check_cut(smaller, model, kept)


BESIDE = "transformers reads the list that it stores beside it; only other readers look at this"
EXPLAINED = {
    "attention_types": "a model is built from its expansion; a reload reads this, and the check after saving compares logits",
    "first_k_dense_replace": BESIDE,
    "global_attn_every_n_layers": BESIDE,
    "interleave_moe_layer_step": BESIDE,
    "layer_group_size": BESIDE,
    "max_window_layers": BESIDE,
    "no_rope_layer_interval": BESIDE,
    "num_hidden_layers": "LongCat's cache has two entries for each layer, and grows as they come",
    "num_mtp_layers": "a name of num_nextn_predict_layers",
    "num_nextn_predict_layers": "transformers has no layers for further tokens, and reads this nowhere",
    "sliding_window_pattern": BESIDE,
    "_sliding_window_pattern": BESIDE,
}


def tiny_reason(reason):
    """A reason without the numbers of this one model."""
    reason = reason.partition(", and layer ")[0].partition(", and those left")[0]
    return re.sub(r"layer \d+", "a layer", reason)


def mutate(field, config, count):
    """`config` with one field of a rule changed, or `None` where the config does not have it or no change is possible."""
    inner = text_config(config)
    for name in field.names:
        value = vars(inner).get(inner.attribute_map.get(name, name))
        if isinstance(value, bool) or value is None:
            continue
        if isinstance(value, int):
            other = value + 1 if value < count or isinstance(field, (RedundantPeriod, Dropped)) else value - 1
        elif (
            isinstance(value, (list, tuple))
            and value
            and all(isinstance(v, int) for v in value)
            and len(value) != count
        ):
            other = [*value[:-1], next(i for i in (*range(count), count) if i not in value)]
        elif isinstance(value, (list, tuple)) and len({str(v) for v in value}) > 1:
            k = next(k for k in range(1, len(value)) if value[k] != value[k - 1])
            other = [*value[: k - 1], value[k], value[k - 1], *value[k + 1 :]]
        else:
            continue
        mutant = copy.deepcopy(config)
        object.__setattr__(text_config(mutant), inner.attribute_map.get(name, name), other)
        if describe_layers(mutant) != describe_layers(config) or isinstance(field, (RedundantPeriod, Dropped)):
            return mutant
    return None


def test_the_vocabulary_of_the_zoo_is_that_of_the_tokens():
    assert all(text_config(zoo_config(tiny)).vocab_size == VOCABULARY for tiny in ZOO)


def test_at_least_forty_types_are_cut():
    assert len({tiny.model_type for tiny in ZOO}) >= 40
