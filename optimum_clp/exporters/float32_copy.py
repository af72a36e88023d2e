"""The model that is traced: in float32, on the CPU, in evaluation mode, with an attention that a graph can hold."""

import copy

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedModel

from ..architecture.lookup import text_config
from ..errors import ExportError
from .room import ExportRoom

# bytes of a model that memory does not hold whose pages are given back together
_TOUCHED = 2**28
# Settings that transformers' eager attention honours and its SDPA does not, in one version or another.
_EAGER_SETTINGS = ("attn_logit_softcapping", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")


def float32_copy(model: PreTrainedModel, room: ExportRoom | None = None) -> PreTrainedModel:
    """The same model in float32 on the CPU, in evaluation mode; `model` is left as it is.

    It is built from a copy of the configuration. It shares the storage of every weight that is in float32 on the
    CPU already; only other weights are copied, at 4 bytes for each parameter.

    Args:
        model ([`~transformers.PreTrainedModel`]): Any dtype, device and mode.
        room ([`~exporters.room.ExportRoom`], *optional*): Where the copies lie; main memory if not given.

    Returns:
        [`~transformers.PreTrainedModel`]: Not to be trained: its weights may be those of `model`.

    Raises:
        ExportError: If weights are offloaded, or the weights are not those of the configuration.
    """
    offloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if offloaded:
        raise ExportError.of(
            "model",
            offloaded[0],
            f"{len(offloaded)} of its weights are offloaded and cannot be read",
            "Load the model without device_map",
        )
    config = copy.deepcopy(model.config)
    config._attn_implementation = attention_of(model)
    # Buffers such as the rotary frequencies are computed anew: they are not in the state dict, and a model that was
    # cast to 16 bits has lost half of their digits.
    with init_empty_weights(include_buffers=False):
        copied = type(model)(config)
    copies: dict[tuple, torch.Tensor] = {}
    room, touched = room or ExportRoom(), list[torch.Tensor]()
    state = {}
    for name, tensor in model.state_dict().items():
        # tied weights come under two names: one copy serves both
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in copies:
            copies[key] = _in_float32(tensor.detach(), room)
            touched += [tensor, copies[key]]
            if sum(known.nbytes for known in touched) > _TOUCHED:
                room.let_go(touched)
                touched.clear()
        state[name] = copies[key]
    room.let_go(touched)
    try:
        copied.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError.of(
            "model",
            type(model).__name__,
            f"its weights are not those that its configuration describes ({reason})",
            "Save it, load it with AutoModelForCausalLM and export that",
        ) from error
    copied.tie_weights()
    return copied.requires_grad_(False).eval()


def _in_float32(tensor: torch.Tensor, room: ExportRoom) -> torch.Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    if tensor.device.type == "cpu" and tensor.dtype == dtype:
        return tensor
    return room.allocate(tensor.shape, dtype).copy_(tensor)


def attention_of(model: PreTrainedModel) -> str:
    """`"sdpa"`, or `"eager"` where the architecture has no SDPA, or has it with another result."""
    text = text_config(model.config)
    special = any(getattr(text, name, None) for name in _EAGER_SETTINGS)
    return "sdpa" if model._supports_sdpa and not special else "eager"
