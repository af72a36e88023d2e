"""A model that is given as an object: out of its wrappers where that is exact, or refused with what to call."""

import os
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from ..errors import ModelError, shown
from .errors import model_error, quanto_error
from .files import check_class

_PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# where the layers of quantized models come from; a layer of another package that holds integers is seen by its tensors
_QUANTIZING = (
    "transformers.integrations",
    "bitsandbytes",
    "torchao",
    "hqq",
    "gptqmodel",
    "auto_gptq",
    "awq",
    "compressed_tensors",
    "eetq",
    "aqlm",
    "vptq",
)


def model_or_name(given: Any) -> PreTrainedModel | str:
    """What somebody gives as a model: the model without its wrappers, or the path or Hub id of one.

    `torch.compile`, `DataParallel` and their like are taken off, which changes no number; the wrapper stays usable.

    Args:
        given: Anything.

    Raises:
        ModelError: If it is neither, or a wrapper without which the model is another one (an adapter).
    """
    if isinstance(given, (str, os.PathLike)) and isinstance(os.fspath(given), str):
        return os.fspath(given)
    if isinstance(given, nn.Module):
        given = extract_model_from_parallel(given, keep_torch_compile=False)
        _refuse_adapter(given)
        if isinstance(given, PreTrainedModel):
            _refuse_compiled_parts(given)
            return given
        inner = getattr(given, "pretrained_model", None)
        if isinstance(inner, PreTrainedModel):
            rule = f"it is a {type(given).__name__} around a {type(inner).__name__}"
            raise model_error(type(given).__name__, rule, "Give what it wraps: its attribute pretrained_model")
    kind = type(given).__name__
    if isinstance(given, type):
        remedy = f"Make a model of it: {kind if kind != 'type' else given.__name__}.from_pretrained(...)"
        raise model_error(shown(given), "it is a class, not a model", remedy)
    remedy = "Give a PreTrainedModel, a local folder, or a Hub id"
    raise model_error(shown(given), f"a {kind} is not a model", remedy)


def _refuse_adapter(given: nn.Module) -> None:
    owners = [type(m).__name__ for m in given.modules() if type(m).__module__.partition(".")[0] == "peft"]
    if not owners:
        return
    wrapped = type(given).__module__.partition(".")[0] == "peft"
    raise model_error(
        type(given).__name__,
        f"adapters of peft are attached to it ({owners[0]}), and a cut would leave them out",
        "Merge them first: give what its merge_and_unload() returns"
        if wrapped
        else "Merge them first: PeftModel.from_pretrained(base, adapter).merge_and_unload() gives a plain model",
    )


def _refuse_compiled_parts(model: PreTrainedModel) -> None:
    compiled = [name for name, module in model.named_modules() if hasattr(module, "_orig_mod")]
    if compiled:
        raise model_error(
            type(model).__name__,
            f"{len(compiled)} of its modules were replaced by compiled ones, the first is {compiled[0]}",
            "Compile in place, layer.compile(), or give the model before torch.compile and compile the cut one",
        )


def check_in_memory(model: PreTrainedModel) -> None:
    """Check that a model in memory is a dense causal language model.

    Raises:
        ModelError: If it is quantized, or of another class.
    """
    name, config = type(model).__name__, model.config
    if any(type(module).__module__.startswith("optimum.quanto") for module in model.modules()):
        raise quanto_error(name)
    if _is_dealt_out(model):
        raise ModelError.of(
            "model",
            name,
            "its weights are dealt out to several processes (tensor parallelism, tp_plan, or FSDP), and none of them has a whole layer to cut",
            "Load it without tp_plan. In a group of processes each one holds the model, or the layers that run if max_memory bounds it",
        )
    found = _quantized_part(model)
    if found is not None:
        raise ModelError.of(
            "model",
            name,
            f"its weights are quantized ({found})",
            "Give the dense model that it was made from, or load it with dequantize=True in its quantization_config",
        )
    if getattr(model, "_auto_class", None) is None:
        check_class(name, config.model_type, [name], bool(config.is_encoder_decoder))


def _is_dealt_out(model: PreTrainedModel) -> bool:
    """Whether a process has parts of weights: as tensors that know of a group of devices, or as plain ones under transformers' plan."""
    parts = (parameter for parameter in model.parameters() if hasattr(parameter, "device_mesh"))
    return (getattr(model, "_tp_size", None) or 1) > 1 or next(parts, None) is not None


def _quantized_part(model: PreTrainedModel) -> str | None:
    """The first weight or layer that is not plain floating point; a checkpoint that was dequantized when it was read has none."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith(_QUANTIZING):
            return f"{name} is a {type(module).__name__}"
    for name, parameter in model.named_parameters():
        if parameter.dtype not in _PLAIN_DTYPES or is_traceable_wrapper_subclass(parameter):
            return f"{name} holds {str(parameter.dtype).removeprefix('torch.')}"
    return None
