"""Models that accelerate has dispatched with weights on disk, or in main memory until a layer needs them.

Such weights are on the meta device, and hooks fetch each one when its module runs. Everything here that looks at weights would find
none. On the CPU no fetching is needed: a file is mapped, and its pages are read when they are touched. So the model is read
in place: a twin of the same structure, without the hooks, over the files and tensors that the hooks would have fetched from. Where it
ran on an accelerator its layers do so again, on copies of what lies elsewhere ([`streamed_layers`]).
"""

import copy
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils.offload import OffloadedWeightsLoader, PrefixedDataset
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architecture.lookup import text_config
from ..errors import ModelError
from ..forward.hooks import computed_buffers
from ..forward.memory_bound import free_device_memory
from ..forward.streamed_layers import LayerCopies, run_on, settle

# what `accelerate.dispatch_model` sets on a model's own object
_ADDED = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron", "hf_device_map")


def read_in_place(model: PreTrainedModel) -> PreTrainedModel:
    """A dispatched model without offloading; any other model as it is.

    Args:
        model (`PreTrainedModel`): Not changed.

    Returns:
        `PreTrainedModel`: A twin that shares all tensors that are in memory, and has the others mapped from where they were
        offloaded to; `model` itself if nothing is offloaded. If offloaded weights run on an accelerator, what is around its
        decoder layers lies there, and all layers run there.

    Raises:
        ModelError: If a weight is not where it was offloaded to, or offloaded weights run on several accelerators.
    """
    offloading = {name: list(_offloading(module)) for name, module in model.named_modules()}
    if not any(offloading.values()):
        return model
    device = _accelerator(model, offloading)
    twin = bare_copy(model)
    read = _Weights(type(model).__name__)
    for name, module in twin.named_modules():
        for hook in offloading.get(name, ()):
            _bring_in(module, name, hook, read)
    _tie(twin)
    if device is not None:
        run_on(twin, LayerCopies(device, work_memory=free_device_memory(device)))
    return twin


def _tie(twin: PreTrainedModel) -> None:
    """Let the head's weight be the embedding's again: accelerate offloads it once, or as two files of equal content."""
    if any(parameter.is_meta for parameter in twin.parameters()):
        twin.tie_weights()
    ends: Any = twin.get_input_embeddings(), twin.get_output_embeddings()
    if not text_config(twin.config).tie_word_embeddings or any(end is None for end in ends):
        return
    embedding, head = (end.weight for end in ends)
    if head is not embedding and head.shape == embedding.shape and torch.equal(head, embedding):
        ends[1].weight = embedding


def _offloading(module: nn.Module) -> Iterator[AlignDevicesHook]:
    hook = getattr(module, "_hf_hook", None)
    for each in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(each, AlignDevicesHook) and each.offload:
            yield each


def _accelerator(model: PreTrainedModel, offloading: Mapping[str, list[AlignDevicesHook]]) -> torch.device | None:
    """The accelerator that offloaded weights run on; `None` where they run on the CPU."""
    found: dict[torch.device, str] = {}
    for name, hooks in offloading.items():
        for hook in hooks:
            device = hook.execution_device
            device = torch.device("cpu" if device is None else device)
            if device.type not in ("cpu", "meta"):
                found.setdefault(device, name)
    if len(found) > 1:
        (first, one), (second, other), *_ = found.items()
        raise ModelError.of(
            "model",
            type(model).__name__,
            f"the weights of {one} are offloaded and run on {first}, those of {other} on {second}",
            "Load it with a device_map that offloads from one accelerator, or with device_map='cpu' and max_memory, see docs/larger_than_memory.md",
        )
    return next(iter(found), None)


def bare_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules once more, over the same tensors, without what accelerate has put on them."""
    shared: dict[int, Any] = {}
    for module in model.modules():
        own = computed_buffers(module).values()  # these may be written in place while a model runs
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and not any(tensor is buffer for buffer in own):
                shared[id(tensor)] = tensor
        if (hook := vars(module).get("_hf_hook")) is not None:
            shared[id(hook)] = hook  # holds all weights that are offloaded to main memory
    twin = copy.deepcopy(model, shared)
    for module in twin.modules():
        # a parameter object of its own for each module, so that filling one in changes nothing in `model`
        attributes = vars(module)
        attributes.pop("_hf_hook", None)
        before = attributes.pop("_old_forward", None)
        if before is not None:
            attributes.pop("forward", None)
            if getattr(before, "__func__", None) is not type(module).forward:
                attributes["forward"] = before
        for name in _ADDED:
            attributes.pop(name, None)
    settle(twin, move=False)
    return twin


def _bring_in(module: nn.Module, name: str, hook: AlignDevicesHook, read: "_Weights") -> None:
    """Put a module's offloaded tensors back."""
    inside = list(module.named_modules()) if hook.place_submodules else [("", module)]
    for prefix, owner in inside:
        for tensors in (owner._parameters, owner._buffers):
            for key, tensor in list(tensors.items()):
                if tensor is None or not tensor.is_meta:
                    continue
                full = f"{prefix}.{key}" if prefix else key
                found = read(hook.weights_map, full, f"{name}.{full}".lstrip("."), tensor)
                tensors[key] = found  # type: ignore[assignment]  # a parameter where there was one


class _Weights:
    """Reads offloaded weights from where they lie, each one once.

    Args:
        model (`str`): What messages call the model.
    """

    def __init__(self, model: str):
        self.model = model
        self._open = functools.cache(lambda file: safe_open(file, framework="pt", device="cpu"))
        self._found: dict[tuple[int, str], Tensor] = {}

    def __call__(self, weights: Any, key: str, name: str, like: Tensor) -> Tensor:
        """A tensor of a map of offloaded weights, in place of one on the meta device."""
        while isinstance(weights, PrefixedDataset):
            weights, key = weights.dataset, f"{weights.prefix}{key}"
        where = (id(weights), key)
        if where not in self._found:
            try:
                value = self._value(weights, key)
            except Exception as error:  # a file that is gone, truncated, or no longer what it was
                said = " ".join(str(error).split())[:200]
                raise self._error(name, f"it cannot be read from where it was offloaded to ({said})") from error
            if value.shape != like.shape or value.dtype != like.dtype:
                raise self._error(
                    name,
                    f"it was offloaded as {tuple(value.shape)} in {value.dtype}, and the model has another shape or dtype",
                )
            if isinstance(like, nn.Parameter):
                value = nn.Parameter(value, requires_grad=like.requires_grad)
            self._found[where] = value
        return self._found[where]

    def _value(self, weights: Mapping[str, Tensor], key: str) -> Tensor:
        if not isinstance(weights, OffloadedWeightsLoader) or key in weights.state_dict:
            return weights[key]
        told = weights.index[key]
        if told.get("safetensors_file") is not None:
            value = self._open(told["safetensors_file"]).get_tensor(told.get("weight_name", key))
            return value.to(getattr(torch, told["dtype"])) if "dtype" in told else value
        shape, dtype = tuple(told["shape"]), getattr(torch, told["dtype"])
        file = Path(weights.save_folder) / f"{key}.dat"
        count = torch.Size(shape).numel()
        if file.stat().st_size < count * dtype.itemsize:
            raise OSError(f"{file} is too short")
        return torch.from_file(str(file), shared=False, size=count, dtype=dtype).view(shape)

    def _error(self, name: str, rule: str) -> ModelError:
        return ModelError.of("model", self.model, f"of its offloaded weight {name}: {rule}", "Load the model again")
