"""Exports that several test files share: tracing a model takes seconds, so each is made once."""

import functools
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from tiny_models import tiny_model
from zoo import NUM_LAYERS, zoo_model

from optimum_clp.configuration.stages import QuantizationConfig
from optimum_clp.exporters import weight_files
from optimum_clp.exporters.export import export_onnx
from optimum_clp.exporters.float32_copy import float32_copy
from optimum_clp.exporters.graph.float_graph import export_float_graph
from optimum_clp.exporters.rounding.weights import round_weights


def onnx_test_model(model_type, tied, num_layers, **overrides):
    """A random model whose norm weights differ from 1 and from each other."""
    model = tiny_model(model_type, num_layers, tie_word_embeddings=tied, pad_token_id=0, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter), alpha=0.5)
    return model


@functools.cache
def exported_llama():
    """A llama with a tied head and `export_onnx`'s folder: `model`, `folder`, `result`, `before`."""
    model = onnx_test_model("llama", tied=True, num_layers=2, initializer_range=0.3)
    before = state_of(model)
    temporary = tempfile.TemporaryDirectory()
    result = export_onnx(model, temporary.name, quiet=True)
    model.config.save_pretrained(temporary.name)
    return SimpleNamespace(model=model, folder=Path(temporary.name), result=result, before=before, temporary=temporary)


@functools.cache
def exported_halves():
    """The same llama's files of 16 bits: `model`, `folder`, `result`, and `rounded`, for how many bits weights were rounded."""
    model = onnx_test_model("llama", tied=True, num_layers=2, initializer_range=0.3)
    temporary = tempfile.TemporaryDirectory()
    rounded = []

    def counted(model, bits, *args, **options):
        rounded.append(bits)
        return round_weights(model, bits, *args, **options)

    quantization = QuantizationConfig(weights=["int4_float16", "float16", "int4"], method="rtn")
    with mock.patch.object(weight_files, "round_weights", counted):
        result = export_onnx(model, temporary.name, quantization=quantization, quiet=True)
    model.config.save_pretrained(temporary.name)
    return SimpleNamespace(
        model=model, folder=Path(temporary.name), result=result, rounded=rounded, temporary=temporary
    )


@functools.cache
def traced_qwen3():
    """A qwen3 with a head of its own, head size unlike hidden / heads and one sliding layer: `model`, `graph`."""
    model = onnx_test_model("qwen3", tied=False, num_layers=2, max_window_layers=1)
    return SimpleNamespace(model=model, graph=export_float_graph(float32_copy(model), opset=21))


def state_of(model):
    """Everything about a model that an export could change."""
    return {
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "training": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "parameters": [(n, p.dtype, p.device, p.requires_grad, p.data_ptr()) for n, p in model.named_parameters()],
        "values": [parameter.detach().clone().tolist() for parameter in model.parameters()],
    }


def small_zoo_model(tiny, num_layers=2):
    """A member of the zoo with its first layers only, which differ from one another: a trace takes time by the layer."""
    settings = {
        key: value[:num_layers]
        for key, value in tiny.settings.items()
        if isinstance(value, list) and len(value) == NUM_LAYERS
    }
    counts = {"first_k_dense_replace": 1, "num_dense_layers": 1, "max_window_layers": 1, "decoder_sparse_step": 1}
    counts |= {"moe_layer_start_index": 1, "moe_layer_end_index": 1, "moe_layer_interval": 1}
    settings |= {key: value for key, value in counts.items() if key in tiny.settings}
    if "mlp_only_layers" in tiny.settings:
        settings["mlp_only_layers"] = [0]
    if "attention_types" in tiny.settings:
        settings["attention_types"] = [[["global", "local"], 1]]
    if "moe_layers" in tiny.settings:
        settings["moe_layers"] = [1]
    count = next((key for key in ("num_layers", "n_layers") if key in tiny.settings), "num_hidden_layers")
    return zoo_model(tiny, **settings, **{count: num_layers, "num_hidden_layers": num_layers})


def short_reason(problem):
    """An obstacle's rule without what is said of one model only, as it stands in the table of architectures."""
    return re.sub(r" \([^()]*\)", "", problem.rule)
