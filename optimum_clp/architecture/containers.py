"""Models that hold a text decoder beside other parts (a vision tower, an audio encoder), and the Auto classes that read them."""

from typing import Any

import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto import modeling_auto

# those of later versions too; each maps a model type to the name of one class
_READERS = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
_CLASSES = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")


def container_class(model_type: str) -> str | None:
    """The class that transformers has for a type with a text decoder and other parts; `None` for other types."""
    return next((names[model_type] for _, names in _readers() if model_type in names), None)


def reader(model_type: str, class_name: str | None = None) -> Any:
    """The Auto class that reads a model.

    Args:
        model_type (`str`): As in `config.json`.
        class_name (`str` or `None`): The model's class, if it is known. Some types have one with their other parts, and one
            for the text decoder alone.
    """
    text_class = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    for auto, names in _readers():
        whole = names.get(model_type)
        if whole is not None and whole != text_class and (class_name == whole or text_class is None):
            return auto
    return AutoModelForCausalLM


def _readers() -> list[tuple[Any, dict[str, str]]]:
    found = [
        (getattr(transformers, auto, None), getattr(modeling_auto, n, {}))
        for auto, n in zip(_READERS, _CLASSES, strict=True)
    ]
    return [(auto, names) for auto, names in found if auto is not None]


def text_type(config: PretrainedConfig) -> str | None:
    """The model type of the text decoder in a container; `None` where the model is a text decoder itself."""
    inner = config.get_text_config(decoder=True)
    return None if inner is config else inner.model_type


def fed_layers(config: PretrainedConfig) -> int:
    """How many of the decoder's first layers another part adds to while it runs (DeepStack's features of an image)."""
    indexes = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None)
    return len(indexes or ())
