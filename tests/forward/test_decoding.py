import inspect
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tiny_models import random_tokens, tiny_model
from transformers import LlamaForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from zoo import ZOO, zoo_model

from optimum_clp.calibration.self_written import sample_text
from optimum_clp.evaluation.speed import measure_speed
from optimum_clp.exporters.check import reference_steps
from optimum_clp.exporters.graph.float_graph import export_float_graph
from optimum_clp.exporters.graph.fused import fused_obstacle
from optimum_clp.exporters.obstacle import onnx_obstacle
from optimum_clp.forward import decoding
from optimum_clp.forward.decoding import (
    cache_argument,
    cache_keyword,
    cache_of,
    fast_decoding,
    last_logits_only,
    takes_back_its_cache,
)


def member(name):
    return next((tiny for tiny in ZOO if tiny.name == name), None) or pytest.skip("not in this transformers")


@pytest.mark.parametrize(
    ("name", "expected"), [("llama", True), ("gpt2", True), ("gemma3_text", True), ("openai-gpt", False)]
)
def test_it_is_seen_by_trying(name, expected):
    assert takes_back_its_cache(zoo_model(member(name))) is expected


def test_states_count_where_they_are_called_a_cache():
    """transformers 5.24 calls Mamba's so; before, they have a name of their own."""
    model = zoo_model(member("mamba"))
    assert takes_back_its_cache(model) is ("cache_params" not in inspect.signature(model.forward).parameters)


def test_a_cache_that_forgets_is_not_taken_for_one():
    model = zoo_model(member("llama"))
    whole = model.forward

    def forgetful(*args, past_key_values=None, attention_mask=None, **kwargs):
        calls.append(past_key_values)
        return whole(*args, **kwargs)

    calls = []
    model.forward = forgetful
    assert takes_back_its_cache(model) is False
    assert calls[0] is None and isinstance(calls[1], DynamicCache)


def test_a_step_that_spoils_the_cache_behind_it_is_seen(llama):
    """As Mamba's of transformers 5.24 with a mask of the whole text: the first step's logits are right."""

    class Spoiling(LlamaForCausalLM):
        def forward(self, input_ids, cache=None, use_cache=None):
            twice = cache is not None and input_ids.shape[1] == 1
            given = torch.cat([input_ids, input_ids], dim=1) if twice else input_ids
            output = answer(super().forward, "cache", cache, input_ids=given, use_cache=use_cache)
            return SimpleNamespace(logits=output.logits[:, : input_ids.shape[1]], cache=output.cache)

    model = Spoiling(llama.config).eval()
    model.load_state_dict(llama.state_dict())
    assert takes_back_its_cache(model) is False


def answer(run, name, cache, **inputs):
    """What transformers' own `run` says, with the cache under `name` alone."""
    own = "cache" if "cache" in inspect.signature(run).parameters else "past_key_values"
    output = run(**inputs, **{own: cache})
    return SimpleNamespace(logits=output.logits, **{name: getattr(output, own)})


class NewerLlama(LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=None):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return answer(super().forward, "cache", cache, **inputs, use_cache=use_cache)


class OlderLlama(LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return answer(super().forward, "past_key_values", past_key_values, **inputs, use_cache=use_cache)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", 2)


@pytest.fixture(params=[NewerLlama, OlderLlama])
def named(request, llama):
    """`llama` of a class that knows one name of the cache, in whatever version of transformers."""
    model = request.param(llama.config).eval()
    model.load_state_dict(llama.state_dict())
    return model


def test_either_name_of_the_cache_is_found(named):
    name = "cache" if isinstance(named, NewerLlama) else "past_key_values"
    cache = DynamicCache()
    assert cache_argument(named) == cache_keyword(named) == name
    output = named(random_tokens(1, 3), **{name: cache}, use_cache=True)
    assert cache_of(output) is cache and cache.get_seq_length() == 3
    assert takes_back_its_cache(named) is True


def test_a_wrapper_hands_on_what_transformers_takes(llama, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda *a, _whole=LlamaForCausalLM.forward, **k: _whole(*a, **k))
    assert cache_argument(llama) is None
    assert takes_back_its_cache(llama) is True


def test_a_model_without_a_cache_has_no_name_for_it():
    assert cache_argument(zoo_model(member("openai-gpt"))) is None
    assert cache_argument(lambda input_ids, use_cache: None) is None
    assert cache_of(SimpleNamespace(logits=None)) is None


def test_text_and_speed_under_either_name(named, llama, tmp_path):
    options = {"num_sequences": 2, "sequence_length": 8, "seed": 1, "quiet": True}
    expected = sample_text(llama, **options, cache_dir=tmp_path / "expected")
    found = sample_text(named, **options, cache_dir=tmp_path / "found")
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.losses, expected.losses)
    speed = measure_speed({"it": lambda: named}, random_tokens(1, 4), new_tokens=3, rounds=1, quiet=True)
    assert speed["it"].decode_tokens_per_second > 0


def test_export_under_either_name(named, llama):
    assert onnx_obstacle(named) is None and fused_obstacle(named) is None
    for found, expected in zip(reference_steps(named), reference_steps(llama), strict=True):
        assert np.array_equal(found.logits, expected.logits)


def test_a_graph_does_not_show_the_name_of_the_cache():
    """The name that this version of transformers does not use; the other one is traced all over the tests."""
    model = tiny_model("llama", 1)
    renamed = {"past_key_values": NewerLlama, "cache": OlderLlama}[cache_argument(model)](model.config).eval()
    renamed.load_state_dict(model.state_dict())
    found, expected = (ir.to_proto(export_float_graph(model, 21)) for model in (renamed, model))
    assert found.SerializeToString() == expected.SerializeToString()


def test_text_written_without_a_cache_follows_the_model(tmp_path):
    """Each token's loss is that of one pass over the finished text."""
    model = zoo_model(member("openai-gpt"))
    sample = sample_text(model, num_sequences=3, sequence_length=12, seed=1, cache_dir=tmp_path, quiet=True)
    with torch.no_grad():
        logits = model(input_ids=sample.tokens).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), sample.tokens[:, 1:], reduction="none"
    ).mean(1)
    torch.testing.assert_close(sample.losses.float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral"])
def test_a_fast_step_in_16_bits_is_a_step(model_type):
    model, ids = tiny_model(model_type).bfloat16(), random_tokens(3, 10)
    with torch.no_grad(), fast_decoding(model):
        cache = None
        given = {cache_keyword(model): cache}
        steps = []
        for position in range(10):
            output = model(input_ids=ids[:, position : position + 1], use_cache=True, **given)
            given = {cache_keyword(model): cache_of(output)}
            steps.append(output.logits[:, 0])
    with torch.no_grad():
        expected = model.float()(input_ids=ids).logits
    difference = (torch.stack(steps, 1).float() - expected).abs().max()
    assert difference < 0.05 * expected.abs().max()


def test_a_fast_step_is_taken_in_16_bits_alone_and_ends_with_the_block(monkeypatch):
    seen = []
    grouped = decoding._grouped_attention
    monkeypatch.setattr(decoding, "_grouped_attention", lambda *a: seen.append(a[0].dtype) or grouped(*a))
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    model, ids = tiny_model("llama", 2), random_tokens(2, 1)
    with torch.no_grad(), fast_decoding(model):
        plain = model(input_ids=ids).logits
        assert not seen
        model.bfloat16()(input_ids=ids)
        assert seen == [torch.bfloat16] * 2
        model(input_ids=random_tokens(2, 3))
        assert len(seen) == 2
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    with pytest.raises(ZeroDivisionError), fast_decoding(model):
        raise ZeroDivisionError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    with torch.no_grad():
        assert torch.equal(tiny_model("llama", 2)(input_ids=ids).logits, plain)


def test_only_the_last_logits_are_asked_for_where_they_can_be():
    assert last_logits_only(tiny_model("llama", 1)) == {"logits_to_keep": 1}
    assert last_logits_only(lambda input_ids: None) == {}
