"""The published hyper-parameters of the large models, and their parameter counts, written out as arithmetic.

`BigShape` counts by a formula of its own, which knows nothing of transformers. `PUBLISHED` holds the totals that the models'
owners state, or that their checkpoints' tensors add up to.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig


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
    values: dict[str, Any]

    @classmethod
    def of(cls, values: dict[str, Any]) -> "BigShape":
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        return cls(values["model_type"], *(values[size] for size in sizes), values["vocab_size"], values)

    def config(self) -> PretrainedConfig:
        """The configuration, in bfloat16, with a head of its own, as published."""
        return AutoConfig.for_model(**self.values)

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


_SHAPES = json.loads((Path(__file__).parents[1] / "docs" / "published_shapes.json").read_text(encoding="utf-8"))
BIG_SHAPES = {name: BigShape.of(shape["config"]) for name, shape in _SHAPES.items()}
PUBLISHED = {name: shape["num_parameters"] for name, shape in _SHAPES.items()}
