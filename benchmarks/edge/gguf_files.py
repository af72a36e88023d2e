"""Checkpoints as GGUF files, rounded by llama.cpp's own code, and read back: what its formats make of the weights.

Needs the packages `gguf` and `llama-cpp-python`. Nothing here runs a model in llama.cpp.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

# llama.cpp's numbers of them (enum llama_ftype)
FORMATS = {
    "Q2_K": 10,
    "Q3_K_M": 12,
    "IQ2_M": 29,
    "IQ3_M": 27,
    "IQ4_XS": 30,
    "Q4_0": 2,
    "Q4_K_M": 15,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "Q8_0": 7,
}
# model types of transformers, and llama.cpp's names of them
ARCHITECTURES = {"llama": "LLAMA", "gemma3_text": "GEMMA3"}


def write_gguf(model: PreTrainedModel, file: Path) -> None:
    """The weights of a model of [`ARCHITECTURES`] in float32, with a vocabulary of empty words: enough to be rounded and
    timed, not to be talked to.

    Which layers have a sliding window is written layer by layer: what llama.cpp would make of a type's own rule is wrong
    for a cut model.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(file), gguf.MODEL_ARCH_NAMES[_architecture(model)])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_size = config.head_dim or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_size)
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{number}>" for number in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["a b"])
    names = gguf_names(model)
    for name, parameter in model.named_parameters():
        numbers = parameter.detach().float().numpy()
        heads = _heads(config, name)
        if heads:
            numbers = numbers.reshape(heads, 2, -1, numbers.shape[1]).swapaxes(1, 2).reshape(numbers.shape)
        writer.add_tensor(names[name], np.ascontiguousarray(numbers + _added(config, name)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rounded_gguf(source: Path, target: Path, name: str, importance: Mapping[str, np.ndarray] | None = None) -> None:
    """A GGUF file in one of [`FORMATS`], by llama.cpp's own code, on one thread.

    Args:
        source (`Path`): In float32.
        target (`Path`): To write.
        name (`str`): Of the format.
        importance (`Mapping[str, np.ndarray]`, *optional*): For tensors by their names in the file, float32 of shape
            `(inputs,)`: mean square of what each column is multiplied by, an importance matrix.

    Raises:
        ValueError: If llama.cpp refuses.
    """
    import ctypes

    import llama_cpp as api

    @api.llama_log_callback
    def quiet(level, text, data):
        pass

    api.llama_log_set(quiet, ctypes.c_void_p(0))
    settings = api.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = FORMATS[name], 1
    # what C reads has to live until it has returned
    kept = {tensor: np.ascontiguousarray(values, dtype=np.float32) for tensor, values in (importance or {}).items()}
    if kept:
        entries = (api.llama_model_imatrix_data * (len(kept) + 1))()
        for entry, (tensor, values) in zip(entries, kept.items(), strict=False):
            entry.name, entry.size = tensor.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        settings.imatrix = entries
    status = api.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings))
    if status:
        raise ValueError(f"{source}: llama.cpp could not write it as {name} (status {status})")


def load_gguf(model: PreTrainedModel, file: Path) -> tuple[int, dict[str, int]]:
    """Give a model the numbers of a file that was made of it.

    Returns:
        `tuple[int, dict[str, int]]`: Bytes of the tensors, without the vocabulary; and how many weights are in which type.
    """
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(file)).tensors}
    types: dict[str, int] = {}
    names = gguf_names(model)
    for name, parameter in model.named_parameters():
        stored = tensors[names[name]]
        numbers = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(tuple(parameter.shape))
        heads = _heads(model.config, name)
        if heads:
            numbers = numbers.reshape(heads, -1, 2, numbers.shape[1]).swapaxes(1, 2).reshape(numbers.shape)
        parameter.data = torch.from_numpy(np.array(numbers - _added(model.config, name), dtype=np.float32))
        kind = stored.tensor_type.name
        types[kind] = types.get(kind, 0) + parameter.numel()
    return sum(tensor.n_bytes for tensor in tensors.values()), types


def _heads(config, name: str) -> int:
    """Heads of a projection whose rows llama.cpp has in another order (pairs of one rotation side by side); else 0."""
    if config.model_type != "llama":
        return 0
    if name.endswith("q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("k_proj.weight") else 0


def _added(config, name: str) -> float:
    """What llama.cpp has in a norm's weight and transformers adds when it runs."""
    return float(config.model_type.startswith("gemma") and name.endswith("norm.weight"))


def _architecture(model: PreTrainedModel):
    import gguf

    return gguf.MODEL_ARCH[ARCHITECTURES[model.config.model_type]]


def gguf_names(model: PreTrainedModel) -> dict[str, str]:
    """Names in a GGUF file, by the names of parameters."""
    import gguf

    table = gguf.get_tensor_name_map(_architecture(model), model.config.num_hidden_layers)
    return {name: table.get_name(name, try_suffixes=(".weight",)) for name, _ in model.named_parameters()}
