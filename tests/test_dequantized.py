"""Quantized files that transformers has dequantized when it read them: cut, saved plain, and nothing left of it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_tokens, tiny_model
from transformers import AutoModelForCausalLM
from transformers import __version__ as transformers_version

from optimum_clp import CLPPruner, LayerSegment
from optimum_clp.checkpoint.saving import save_checkpoint, verify_checkpoint

needs_5 = pytest.mark.skipif(transformers_version < "5", reason="transformers 4 does not dequantize fp8")


@pytest.fixture
def fp8_folder(tmp_path):
    """A checkpoint as DeepSeek's and Qwen's FP8 ones: blocks of 16 x 16 with a scale."""
    folder = tmp_path / "fp8"
    tiny_model(intermediate_size=64).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if name.endswith("_proj.weight"):
            weight = tensors[name]
            blocks = weight.unfold(0, 16, 16).unfold(1, 16, 16)
            scale = blocks.abs().amax((-1, -2)) / 448
            whole = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
            tensors[name] = (weight / whole).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [16, 16],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@needs_5
def test_fp8(fp8_folder, tmp_path):
    from transformers import FineGrainedFP8Config

    settings = FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16))
    model = AutoModelForCausalLM.from_pretrained(fp8_folder, quantization_config=settings, dtype=torch.float32)
    check(model, tmp_path)


def test_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    folder = tmp_path / "gguf"
    folder.mkdir()
    write_gguf(gguf, tiny_model(head_dim=None), folder / "tiny.gguf")
    check(AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf", dtype=torch.float32), tmp_path)


def write_gguf(gguf, model, path):
    """A llama.cpp file of a LLaMA, in float32."""
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    tokens = [f"w{i}".encode() for i in range(config.vocab_size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([1] * len(tokens))
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    names["lm_head.weight"] = "output.weight"
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for layer in range(config.num_hidden_layers):
        for old, new in parts.items():
            names[f"model.layers.{layer}.{old}.weight"] = f"blk.{layer}.{new}.weight"
    for old, tensor in model.state_dict().items():
        writer.add_tensor(names[old], tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(model, tmp_path):
    pruner = CLPPruner.from_pretrained(model, quiet=True)
    smaller = pruner.cut([LayerSegment(2, 4)])
    folder = tmp_path / "out"
    save_checkpoint(smaller, None, folder)
    verify_checkpoint(folder, smaller)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float32}
    ids = random_tokens(1, 16)
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model.eval()
        expected.model.layers = torch.nn.ModuleList([*model.model.layers[:2], *model.model.layers[4:]])
        torch.testing.assert_close(stock(ids).logits, expected(ids, use_cache=False).logits)
