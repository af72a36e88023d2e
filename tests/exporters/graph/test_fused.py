"""ONNX Runtime's fused operators: what is recognised, and that the files say what PyTorch says."""

import collections
import functools
import inspect

import onnx_ir as ir
import pytest
import torch
from tiny_models import MODEL_TYPES, random_tokens, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, GPTJConfig, GPTJForCausalLM, GPTNeoXConfig

from optimum_clp.configuration.stages import QuantizationConfig
from optimum_clp.exporters.check import reference_steps
from optimum_clp.exporters.export import export_onnx
from optimum_clp.exporters.float32_copy import float32_copy
from optimum_clp.exporters.graph import fused as onnx_fused
from optimum_clp.exporters.graph.file import save_graph
from optimum_clp.exporters.graph.float_graph import export_float_graph, fold_weight_transposes
from optimum_clp.exporters.graph.fused import FusedAttention, attention_by, fused_obstacle
from optimum_clp.runtime.causal_lm import OnnxCausalLM
from optimum_clp.runtime.comparison import relative_error

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "max_position_embeddings": 128}


def operators(graph):
    return collections.Counter(node.op_type for node in graph.graph)


def fused_file(model, folder):
    copied = float32_copy(model)
    assert fused_obstacle(copied) is None
    graph = export_float_graph(copied, 21, fuse=True)
    fold_weight_transposes(graph)
    (file,) = save_graph(graph, folder / "model.onnx")
    return file, graph, copied


@pytest.fixture(scope="module")
def fused_models(tmp_path_factory):
    """By its type, a model of three layers with its fused file: made once. Qwen's last layers have a window."""

    @functools.cache
    def made(model_type):
        folder, window = tmp_path_factory.mktemp(model_type), {"max_window_layers": 1} if "qwen" in model_type else {}
        model = tiny_model(model_type, num_layers=3, **window)
        model.config.save_pretrained(folder)
        (folder / "onnx").mkdir()
        return model, folder, *fused_file(model, folder / "onnx")

    return made


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_fused_graphs_say_what_pytorch_says(model_type, fused_models):
    """Left padding, different lengths, empty past, cached steps, a window: all of `reference_steps`."""
    _, _, file, graph, copied = fused_models(model_type)
    assert relative_error(file, reference_steps(copied)) < 1e-5
    found = operators(graph)
    norms = 13 if model_type == "qwen3" else 7
    assert found["GroupQueryAttention"] == 3 and found["RotaryEmbedding"] == 6
    assert found["SkipSimplifiedLayerNormalization"] == 6
    assert found["SimplifiedLayerNormalization"] == norms - 6
    assert not {"Softmax", "Pow", "ReduceMean", "Neg"} & set(found)
    # heads are taken apart nowhere: what is transposed is the head's weight and the rotary table of a few tokens
    assert found["Transpose"] <= 3


def test_norms_with_an_offset_soft_caps_and_partial_rotation_are_fused_too(tmp_path):
    gemma = Gemma2Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=56,
                         sliding_window=12, initializer_range=0.15)  # fmt: skip
    neox = GPTNeoXConfig(**SMALL, num_attention_heads=4, intermediate_size=56, rotary_pct=0.5, initializer_range=0.15)
    for name, config in (("gemma", gemma), ("neox", neox)):
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        file, graph, copied = fused_file(AutoModelForCausalLM.from_config(config).eval(), tmp_path / name)
        assert relative_error(file, reference_steps(copied)) < 1e-5
        assert operators(graph)["GroupQueryAttention"] == 3
    assert any(node.attributes.get_float("softcap", 0.0) == 50.0 for node in fused_graph_nodes(tmp_path / "gemma"))


def fused_graph_nodes(folder):
    return [n for n in ir.load(folder / "model.onnx").graph if n.op_type == "GroupQueryAttention"]


NOT_FUSED = {"bloom": BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)}
if "past_key_values" in inspect.signature(GPTJForCausalLM.forward).parameters:
    # since transformers 5.24 its attention goes through the interface that is fused
    NOT_FUSED["gptj"] = GPTJConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)


@pytest.mark.parametrize("name", NOT_FUSED)
def test_attention_of_another_kind_is_not_fused(name, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(NOT_FUSED[name]).eval()
    assert fused_obstacle(float32_copy(model)) is not None
    result = export_onnx(model, tmp_path, quantization=QuantizationConfig(weights=[], method="rtn"), quiet=True)
    assert result.files[0].max_relative_error < 1e-5
    assert "GroupQueryAttention" not in operators(ir.load(tmp_path / "onnx/model.onnx"))


def test_a_fused_graph_that_differs_is_replaced_by_the_plain_one(tmp_path, monkeypatch):
    plain = FusedAttention._operator

    def wrong(query, key, value, past_key, past_value, bias, scale, softcap):
        return plain(query, key, value, past_key, past_value, bias, 2 * scale, softcap)

    monkeypatch.setattr(FusedAttention, "_operator", staticmethod(wrong))
    quantization = QuantizationConfig(weights=[], method="rtn")
    result = export_onnx(tiny_model("llama", 2), tmp_path, quantization=quantization, quiet=True)
    assert len(result.files) == 1 and result.files[0].max_relative_error < 1e-5
    assert "GroupQueryAttention" not in operators(ir.load(tmp_path / "onnx/model.onnx"))


def test_a_batch_goes_on_by_several_tokens(fused_models):
    model, folder, *_ = fused_models("qwen3")
    session = OnnxCausalLM.from_pretrained(folder, num_threads=1)
    ids, mask = random_tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[0, :4] = 0
    first = session(ids[:, :7], mask[:, :7], use_cache=True)
    without = session(ids[:, 7:], mask, past_key_values=first.past_key_values, use_cache=False)
    assert without.past_key_values is None and first.past_key_values.get_seq_length() == 7
    rest = session(ids[:, 7:], mask, past_key_values=first.past_key_values, use_cache=True)
    assert torch.equal(rest.logits, without.logits)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits[:, 7:]
    torch.testing.assert_close(rest.logits, expected, atol=1e-4, rtol=1e-4)
    assert rest.past_key_values.get_seq_length() == 12


def test_nothing_is_left_in_transformers(tmp_path):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    copied = float32_copy(tiny_model("llama", 2))
    with pytest.raises(RuntimeError, match="planted"), attention_by(copied, FusedAttention(symbolic=False)):
        raise RuntimeError("planted")
    assert onnx_fused._NAME not in ALL_ATTENTION_FUNCTIONS
    assert onnx_fused._NAME not in ALL_MASK_ATTENTION_FUNCTIONS
    assert copied.config._attn_implementation == "sdpa"


def test_only_root_mean_square_norms_are_taken_for_one():
    class Other(nn.Module):
        def __init__(self, exponent):
            super().__init__()
            self.weight, self.eps, self.exponent = nn.Parameter(torch.rand(8)), 1e-6, exponent

        def forward(self, x):
            return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.eps) ** self.exponent

    assert onnx_fused._norm_operator(Other(-0.5)) is not None
    assert onnx_fused._norm_operator(Other(-0.4)) is None
    assert onnx_fused._norm_operator(nn.LayerNorm(8)) is None
    assert onnx_fused._norm_operator(nn.Linear(8, 1)) is None
