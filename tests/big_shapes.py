"""The published hyper-parameters of the large models, and their parameter counts, written out as arithmetic.

`shape` gives the configuration; `parameters` counts by a formula of its own, which knows nothing of transformers.
`PUBLISHED` holds the totals that the models' owners state, or that their checkpoints' tensors add up to.
"""

from dataclasses import dataclass

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config


@dataclass(frozen=True)
class BigShape:
    """One decoder: `model_type`, width, MLP width, layers, query heads, key-value heads, vocabulary."""

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    positions: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def config(self, **overrides) -> PretrainedConfig:
        """The configuration, in bfloat16, with a head of its own, as published."""
        values = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "max_position_embeddings": self.positions,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[self.model_type]],
            **overrides,
        }
        return {"llama": LlamaConfig, "qwen2": Qwen2Config}[self.model_type](**values)

    def layer_parameters(self) -> int:
        """Parameters of one decoder layer, by arithmetic."""
        head = self.hidden // self.heads
        attention = 2 * self.hidden * self.heads * head  # query and output
        attention += 2 * self.hidden * self.key_value_heads * head  # key and value
        if self.model_type == "qwen2":  # biases of query, key and value
            attention += (self.heads + 2 * self.key_value_heads) * head
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden  # gate, up, down; two norms

    def parameters(self, layers: int | None = None) -> int:
        """Parameters of the model with `layers` layers (its own number if not given): embedding, head and final norm too."""
        layers = self.layers if layers is None else layers
        return 2 * self.vocabulary * self.hidden + self.hidden + layers * self.layer_parameters()


BIG_SHAPES = {
    "LLaMA-2 7B": BigShape("llama", 4096, 11008, 32, 32, 32, 32000, 4096),
    "LLaMA-2 13B": BigShape("llama", 5120, 13824, 40, 40, 40, 32000, 4096),
    "LLaMA-2 70B": BigShape("llama", 8192, 28672, 80, 64, 8, 32000, 4096),
    "LLaMA-3 8B": BigShape("llama", 4096, 14336, 32, 32, 8, 128256, 8192, 500000.0),
    "LLaMA-3 70B": BigShape("llama", 8192, 28672, 80, 64, 8, 128256, 8192, 500000.0),
    "Qwen1.5-7B": BigShape("qwen2", 4096, 11008, 32, 32, 32, 151936, 32768, 1000000.0, 1e-6),
    "Qwen1.5-72B": BigShape("qwen2", 8192, 24576, 80, 64, 64, 152064, 32768, 1000000.0, 1e-6),
    "Qwen2.5-7B": BigShape("qwen2", 3584, 18944, 28, 28, 4, 152064, 131072, 1000000.0, 1e-6),
    "Qwen2.5-72B": BigShape("qwen2", 8192, 29568, 80, 64, 8, 152064, 131072, 1000000.0, 1e-6),
}
PUBLISHED = {
    "LLaMA-2 7B": 6_738_415_616,
    "LLaMA-2 13B": 13_015_864_320,
    "LLaMA-2 70B": 68_976_648_192,
    "LLaMA-3 8B": 8_030_261_248,
    "LLaMA-3 70B": 70_553_706_496,
    "Qwen1.5-7B": 7_721_324_544,
    "Qwen1.5-72B": 72_287_920_128,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-72B": 72_706_203_648,
}
