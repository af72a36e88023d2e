"""Small containers: a text decoder of the zoo beside the smallest other parts that the class takes."""

from typing import Any

import torch
from tiny_models import VOCABULARY
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from zoo import ALL, COMMON, TinyType, zoo_config

from optimum_clp.architecture.containers import container_class, reader, text_type
from optimum_clp.architecture.table import BUILT_IN, CONTAINED, REFUSED

# what the names of sizes become, whatever the part
_SMALL = {
    "hidden_size": 16,
    "embed_dim": 16,
    "width": 16,
    "intermediate_size": 16,
    "projection_dim": COMMON["hidden_size"],
    "out_hidden_size": COMMON["hidden_size"],
    "hidden_dim": 16,
    "mlp_dim": 16,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "num_attention_heads": 2,
    "attention_heads": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "head_dim": 8,
    "d_model": 16,
}
# a text decoder that is found in containers only
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}
_ROPE = {"rope_scaling": _ROPE} if transformers_version < "5" else {"rope_parameters": {"rope_theta": 1e4, **_ROPE}}
_CONTAINED = {"mlp_only_layers": [], "decoder_sparse_step": 1, **_ROPE}


def shrunk(config: PretrainedConfig) -> PretrainedConfig:
    """A part of a container with small sizes where its class has a field for them."""
    for name, value in _SMALL.items():
        name = config.attribute_map.get(name, name)
        if isinstance(vars(config).get(name), int):
            setattr(config, name, value)
    return config


def container(model_type: str, **text: Any) -> PreTrainedModel:
    """A random container of a type, whose text decoder is the zoo's, in eval mode."""
    config = CONFIG_MAPPING[model_type]()
    inner = text_type(config)
    (tiny, *_) = [t for t in ALL if t.model_type == inner] or [TinyType(inner, _CONTAINED)]
    small = zoo_config(tiny, **text)
    for name in type(config).sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            setattr(config, name, small if part.model_type == inner else shrunk(part))
    for name in ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id"):
        if isinstance(vars(config).get(name), int):
            setattr(config, name, VOCABULARY - 1)
    for name in ("hidden_size", "vocab_size", "projection_dim"):
        if isinstance(vars(config).get(name), int):
            setattr(config, name, COMMON.get(name, COMMON["hidden_size"]))
    if hasattr(config, "mm_tokens_per_image"):
        config.mm_tokens_per_image = 4
    if model_type == "paligemma":  # as its config's constructor sets it
        small.use_bidirectional_attention = True
    torch.manual_seed(0)
    return reader(model_type, container_class(model_type)).from_config(config).eval()


def types() -> list[str]:
    """Every type of this transformers that holds a text decoder which can be cut."""
    found = []
    for name in CONFIG_MAPPING:
        if container_class(name) is None or name in REFUSED:
            continue
        try:
            inner = text_type(CONFIG_MAPPING[name]())
        except Exception:  # a config that cannot be made without arguments
            continue
        if inner in BUILT_IN or inner in CONTAINED:
            found.append(name)
    return sorted(found)
