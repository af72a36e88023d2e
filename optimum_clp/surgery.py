"""The cut: a smaller model of the same class, built from its new config, over the dense model's own tensors."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architecture import cut_config, decoder_layers, find_architecture, num_layers
from .errors import CutError, ModelError, Problem
from .segments import LayerSegment, check_segments, kept_layers


def cut_model(dense: PreTrainedModel, segments: Iterable[LayerSegment]) -> PreTrainedModel:
    """Remove runs of decoder layers.

    The new model is instantiated from its own config on the meta device, so that everything a class computes in its
    constructor is what a reload will compute, and then takes over the dense model's tensors: parameters and buffers
    share storage with it, nothing is copied. The dense model is not changed.

    Args:
        dense (`PreTrainedModel`): The model; every weight in memory (not on the meta device).
        segments (`Iterable[LayerSegment]`): What to remove, in the dense model's numbering.

    Returns:
        `PreTrainedModel`: In eval mode, with the same dtype, devices and generation config.

    Raises:
        ConfigurationError: If the segments do not fit the model.
        ModelError: If the architecture is not supported, or weights are offloaded.
        CutError: If the model that the new config describes is not the dense model without those layers.
    """
    architecture = find_architecture(dense.config)
    before = num_layers(dense.config)
    kept = kept_layers(check_segments(segments, before), before)
    config = cut_config(dense.config, kept)
    with torch.device("meta"):
        cut = type(dense)(config)
    old_name = _renaming(architecture.layers, kept)
    _take_over_tensors(cut, dense, old_name)
    cut.tie_weights()
    cut.eval()
    if dense.generation_config is not None:
        cut.generation_config = copy.deepcopy(dense.generation_config)
    cut.name_or_path = dense.name_or_path
    _dispatch_like(cut, dense, architecture.layers, kept)
    check_cut(cut, dense, kept)
    return cut


def check_cut(cut: PreTrainedModel, dense: PreTrainedModel, kept: list[int]) -> None:
    """The guard: every layer of `cut` is of the class, settings and tensors of the dense layer it stands for.

    Args:
        cut (`PreTrainedModel`): What was built from the new config.
        dense (`PreTrainedModel`): The model it came from.
        kept (`list[int]`): Layer `j` of `cut` is layer `kept[j]` of `dense`.

    Raises:
        CutError: Names the first difference.
    """
    new_layers, old_layers = decoder_layers(cut), decoder_layers(dense)
    differences: list[tuple[str, Any, Any]] = []
    if len(new_layers) != len(kept):
        differences.append(("number of layers", len(new_layers), len(kept)))
    for j, (new, i) in enumerate(zip(new_layers, kept, strict=False)):
        differences += [(f"layer {j}: {what}", a, b) for what, a, b in _layer_differences(new, old_layers[i], j)]
    old_name = _renaming(find_architecture(dense.config).layers, kept)
    expected = dense.state_dict()
    found = cut.state_dict()
    for name, tensor in found.items():
        source = expected.get(old_name(name))
        if source is None or source.shape != tensor.shape or source.data_ptr() != tensor.data_ptr():
            differences.append((name, tuple(tensor.shape), None if source is None else tuple(source.shape)))
    missing = {n for n in expected if _survives(n, find_architecture(dense.config).layers, kept)}
    missing -= {old_name(n) for n in found}
    differences += [(name, None, tuple(expected[name].shape)) for name in sorted(missing)]
    if differences:
        what, is_, should = differences[0]
        raise CutError(
            Problem(
                f"cut model, {what}",
                is_,
                f"the dense model has {should!r} there ({len(differences)} differences in all)",
                "The config cannot express this cut; nothing was written and the dense model is unchanged",
            )
        )


def own_layers(model: PreTrainedModel, indices: Iterable[int]) -> None:
    """Give some layers storage of their own, so that they can be trained without changing the model they came from."""
    layers = decoder_layers(model)
    for index in indices:
        for parameter in layers[index].parameters():
            parameter.data = parameter.data.clone()


def count_parameters(model: nn.Module) -> int:
    """Number of distinct parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


def count_bytes(model: nn.Module) -> int:
    """Bytes of the distinct parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _renaming(layers_path: str, kept: list[int]):
    prefix = layers_path + "."

    def old_name(name: str) -> str:
        if not name.startswith(prefix):
            return name
        index, dot, rest = name[len(prefix) :].partition(".")
        return f"{prefix}{kept[int(index)]}{dot}{rest}"

    return old_name


def _survives(name: str, layers_path: str, kept: list[int]) -> bool:
    prefix = layers_path + "."
    return not name.startswith(prefix) or int(name[len(prefix) :].partition(".")[0]) in kept


def _take_over_tensors(cut: PreTrainedModel, dense: PreTrainedModel, old_name) -> None:
    """Replace every meta tensor of `cut` by one over the storage of its counterpart in `dense`."""
    taken: dict[int, nn.Parameter] = {}  # tied parameters stay one object
    for module_name, module in cut.named_modules():
        try:
            source = dense.get_submodule(old_name(module_name))
        except AttributeError:
            raise CutError(
                Problem(
                    "cut model",
                    module_name,
                    "the dense model has no such module",
                    "The config cannot express this cut; nothing was written and the dense model is unchanged",
                )
            ) from None
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                original = _real(getattr(source, name), f"{old_name(module_name)}.{name}")
                if id(original) not in taken:
                    taken[id(original)] = nn.Parameter(original.data, requires_grad=original.requires_grad)
                module._parameters[name] = taken[id(original)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = _real(getattr(source, name), f"{old_name(module_name)}.{name}")
        for name, value in list(vars(module).items()):
            # rotary embeddings keep a tensor that is neither parameter nor buffer
            if isinstance(value, Tensor) and value.is_meta:
                setattr(module, name, _real(getattr(source, name), f"{old_name(module_name)}.{name}"))


def _real(tensor: Tensor, name: str) -> Tensor:
    if tensor.is_meta:
        raise ModelError(
            Problem(
                name,
                "a tensor on the meta device",
                "a cut needs every weight in memory, and this one is offloaded",
                "Load the model without offloading (a smaller dtype, or a device_map without 'disk')",
            )
        )
    return tensor


def _dispatch_like(cut: PreTrainedModel, dense: PreTrainedModel, layers_path: str, kept: list[int]) -> None:
    """Repeat accelerate's hooks where the dense model is spread over several devices."""
    device_map = getattr(dense, "hf_device_map", None)
    if not device_map:
        return
    prefix = layers_path + "."
    renumbered: dict[str, Any] = {}
    for name, device in device_map.items():
        if not name.startswith(prefix):
            renumbered[name] = device
            continue
        index, dot, rest = name[len(prefix) :].partition(".")
        if int(index) in kept:
            renumbered[f"{prefix}{kept.index(int(index))}{dot}{rest}"] = device
    if len({str(d) for d in renumbered.values()}) > 1:
        from accelerate import dispatch_model

        dispatch_model(cut, renumbered)
    else:
        cut.hf_device_map = renumbered  # type: ignore[assignment]


def _layer_differences(new: nn.Module, old: nn.Module, index: int) -> Iterator[tuple[str, Any, Any]]:
    old_modules = dict(old.named_modules())
    new_modules = dict(new.named_modules())
    if new_modules.keys() != old_modules.keys():
        yield "submodules", sorted(new_modules.keys() ^ old_modules.keys()), []
        return
    for name, module in new_modules.items():
        twin = old_modules[name]
        if type(module) is not type(twin):
            yield f"class of {name}", type(module).__name__, type(twin).__name__
        for attribute, value in vars(twin).items():
            if attribute.startswith("_") or attribute == "training":
                continue
            if attribute in ("layer_idx", "layer_id"):
                if getattr(module, attribute, None) != index:
                    yield f"{name}.{attribute}", getattr(module, attribute, None), index
            elif isinstance(value, (bool, int, float, str, type(None))) and getattr(module, attribute, None) != value:
                yield f"{name}.{attribute}", getattr(module, attribute, None), value
