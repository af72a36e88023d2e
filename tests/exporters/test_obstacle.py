"""What is said before an export starts. Every message is matched here; no model is traced."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny_models import tiny_model
from tiny_onnx import state_of
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from zoo import ZOO, zoo_model

from optimum_clp.errors import ExportError
from optimum_clp.exporters.export import export_onnx
from optimum_clp.exporters.obstacle import onnx_obstacle


def member(name):
    (tiny,) = [tiny for tiny in ZOO if tiny.name == name]
    return zoo_model(tiny)


class LooksAtData(nn.Module):
    def forward(self, hidden_states):
        return hidden_states if (hidden_states > 0).nonzero().numel() else -hidden_states


@pytest.mark.parametrize("training", [False, True])
def test_a_dense_model_has_none_and_is_left_as_it_is(training):
    model = tiny_model("llama", 2, attention_dropout=0.5).train(training)
    before, random = state_of(model), torch.get_rng_state()
    assert onnx_obstacle(model) is None
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_bfloat16_is_no_obstacle():
    assert onnx_obstacle(tiny_model("qwen3", 2).to(torch.bfloat16)) is None


@pytest.mark.parametrize("name", ["mamba", "openai-gpt"])
def test_models_without_keys_and_values(name, tmp_path):
    model = member(name)
    # transformers 5.24 calls Mamba's states a cache too
    named = "cache" in inspect.signature(model.forward).parameters
    reason = "its cache holds more than the keys and values" if named else "it gives no key-value cache"
    with pytest.raises(ExportError, match=f"{reason}.*inputs and outputs of their own.*Use the PyTo"):
        export_onnx(model, tmp_path, quiet=True)
    assert list(tmp_path.iterdir()) == []


class CacheWithMore(DynamicCache):
    pass


class LayerWithMore(DynamicLayer):
    pass


@pytest.mark.parametrize("kind", ["cache", "layer"])
def test_models_with_other_states_beside_keys_and_values(kind, monkeypatch):
    model, cache = tiny_model("llama", 1), CacheWithMore() if kind == "cache" else DynamicCache()
    cache.update(torch.zeros(1, 2, 2, 16), torch.zeros(1, 2, 2, 16), 0)
    if kind == "layer":
        cache.layers[0].__class__ = LayerWithMore
    monkeypatch.setattr(model, "forward", lambda past_key_values=None, **_: SimpleNamespace(past_key_values=cache))
    names = "CacheWithMore, DynamicLayer" if kind == "cache" else "DynamicCache, LayerWithMore"
    assert f"holds more than the keys and values of each token ({names})" in str(onnx_obstacle(model))


def test_hybrid_models(tmp_path):
    with pytest.raises(ExportError, match="it gives no key-value cache|its cache holds more than the keys and values"):
        export_onnx(member("jamba"), tmp_path, quiet=True)


def test_cache_with_other_entries_than_the_tokens(monkeypatch):
    model, cache = tiny_model("llama", 1), DynamicCache()
    cache.update(torch.zeros(1, 2, 34, 16), torch.zeros(1, 2, 34, 16), 0)
    monkeypatch.setattr(model, "forward", lambda past_key_values=None, **_: SimpleNamespace(past_key_values=cache))
    assert "does not grow by one entry for each token ([34] for 2 tokens)" in str(onnx_obstacle(model))


def test_layers_that_look_at_the_data():
    model = tiny_model("llama", 2)
    model.model.layers[1].mlp = LooksAtData()
    major = transformers.__version__.partition(".")[0]
    text = str(onnx_obstacle(model))
    assert (
        "its layers compute what depends on the data, such as the experts that were chosen (model.layers.1.mlp)"
        in text
    )
    assert ("Export it with transformers 5" in text) == (major == "4")
    # outside of the layers transformers looks at the mask, but not while it is traced
    model = tiny_model("llama", 2)
    model.model.norm = nn.Sequential(LooksAtData())[0]
    assert onnx_obstacle(model) is None


def test_a_model_that_cannot_run(monkeypatch):
    def fail(past_key_values=None, **_):
        raise ValueError("no such\n device")

    model = tiny_model("llama", 1)
    hooks = state_of(model)["hooks"]
    monkeypatch.setattr(model, "forward", fail)
    assert "it cannot run two tokens with a cache (no such device)" in str(onnx_obstacle(model))
    assert state_of(model)["hooks"] == hooks


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_length(kind):
    model = tiny_model("llama", 1)
    model.config.rope_parameters = {"full_attention": {"rope_type": kind, "factor": 2.0}}
    assert f"rope_type is '{kind}': its rotary frequencies change with the length" in str(onnx_obstacle(model))
