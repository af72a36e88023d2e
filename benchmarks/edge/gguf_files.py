"""LLaMA checkpoints as GGUF files, rounded by llama.cpp's own code, and read back: what its formats make of the weights.

Needs the packages `gguf` and `cyllama` (a wheel that carries llama.cpp). Nothing here runs a model in llama.cpp.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

# llama.cpp's numbers of them (enum llama_ftype)
FORMATS = {
    "Q2_K": 10,
    "Q3_K_M": 12,
    "IQ3_M": 27,
    "IQ4_XS": 30,
    "Q4_0": 2,
    "Q4_K_M": 15,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "Q8_0": 7,
}
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(model: PreTrainedModel, file: Path) -> None:
    """The weights of a LLaMA in float32, with a vocabulary of empty words: enough to be rounded, not to be talked to."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{number}>" for number in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["a b"])
    for name, parameter in model.named_parameters():
        numbers = parameter.detach().float().numpy()
        heads = _heads(config, name)
        if heads:
            numbers = numbers.reshape(heads, 2, -1, numbers.shape[1]).swapaxes(1, 2).reshape(numbers.shape)
        writer.add_tensor(_gguf_name(name), np.ascontiguousarray(numbers))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rounded_gguf(source: Path, target: Path, name: str) -> None:
    """A GGUF file in one of [`FORMATS`], without an importance matrix, on one thread."""
    from cyllama.llama import llama_cpp

    settings = llama_cpp.LlamaModelQuantizeParams()
    settings.ftype = FORMATS[name]
    settings.nthread = 1
    llama_cpp.model_quantize(str(source), str(target), settings)


def load_gguf(model: PreTrainedModel, file: Path) -> tuple[int, dict[str, int]]:
    """Give a model the numbers of a file that was made of it.

    Returns:
        `tuple[int, dict[str, int]]`: Bytes of the tensors, without the vocabulary; and how many weights are in which type.
    """
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(file)).tensors}
    types: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        stored = tensors[_gguf_name(name)]
        numbers = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(tuple(parameter.shape))
        heads = _heads(model.config, name)
        if heads:
            numbers = numbers.reshape(heads, -1, 2, numbers.shape[1]).swapaxes(1, 2).reshape(numbers.shape)
        parameter.data = torch.from_numpy(np.array(numbers, dtype=np.float32))
        kind = stored.tensor_type.name
        types[kind] = types.get(kind, 0) + parameter.numel()
    return sum(tensor.n_bytes for tensor in tensors.values()), types


def _heads(config, name: str) -> int:
    """Heads of a projection whose rows llama.cpp has in another order (pairs of one rotation side by side); else 0."""
    if name.endswith("q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("k_proj.weight") else 0


def _gguf_name(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{_PARTS[part.removesuffix('.weight')]}.weight"
