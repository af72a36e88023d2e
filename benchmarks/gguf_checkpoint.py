"""A checkpoint that transformers reads as any other, made from a GGUF file: real models without a Hub."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def saved_from_gguf(file: Path, folder: Path) -> None:
    """Write FOLDER in bfloat16 from the GGUF `file` (needs the package `gguf`); the weights stay on the grid of its format."""
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # the config says that it is quantized, and such a model cannot be saved
    config = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "model_type")}
    config.pop("transformers_version")
    model = type(read)(type(read.config)(**config))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
