"""Small random models, built in code, whose outputs are far from uniform (wide initialisation)."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
MODEL_TYPES = tuple(CONFIGS)
VOCABULARY = 97


def tiny_config(model_type="llama", num_layers=6, **overrides):
    """Grouped-query attention, head size unlike hidden / heads, a sliding window where the type has one."""
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    if model_type in ("llama", "mistral", "qwen3"):
        values["head_dim"] = 16
    if model_type == "mistral":
        values["sliding_window"] = 12
    if model_type in ("qwen2", "qwen3"):
        values.update(use_sliding_window=True, sliding_window=12, max_window_layers=3)
    values.update(overrides)
    return CONFIGS[model_type](**values)


def tiny_model(model_type="llama", num_layers=6, seed=0, **overrides):
    """A random model in eval mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, num_layers, **overrides)).eval()


def random_tokens(rows, length, seed=0):
    """int64 `[rows, length]`."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def make_identity(model, indices):
    """Turn layers into the identity by zeroing what they add to the residual stream."""
    with torch.no_grad():
        for index in indices:
            model.model.layers[index].self_attn.o_proj.weight.zero_()
            model.model.layers[index].mlp.down_proj.weight.zero_()
    return model


def tiny_tokenizer():
    """One token for each of the words `w3` to `w96`; `<s>` starts and `</s>` ends a document."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
