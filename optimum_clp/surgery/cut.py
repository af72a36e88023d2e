"""The cut: a smaller model of the same class, built from its new config, over the dense model's own tensors."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architecture.lookup import cut_config, decoder_path, num_layers
from ..errors import CutError, ModelError
from ..segments import LayerSegment, check_segments, kept_layers
from .guard import check_cut, old_name


def cut_model(dense: PreTrainedModel, segments: Iterable[LayerSegment]) -> PreTrainedModel:
    """Remove runs of decoder layers.

    The new model is instantiated from its own config without memory for weights, so that everything a class computes in
    its constructor is what a reload will compute, and then takes over the dense model's tensors: parameters and buffers
    share storage with it, nothing is copied. The dense model is not changed.

    Args:
        dense (`PreTrainedModel`): The model; every weight in memory, or every weight on the meta device (then the cut
            model's are too, and it tells only what a real one would be).
        segments (`Iterable[LayerSegment]`): What to remove, in the dense model's numbering.

    Returns:
        `PreTrainedModel`: In eval mode, with the same dtype, devices and generation config.

    Raises:
        ConfigurationError: If the segments do not fit the model.
        ModelError: If the architecture is not supported, or some weights are offloaded.
        CutError: If no config describes what would be left, or the model that the new config describes is not the dense
            model without those layers.
    """
    before = num_layers(dense.config)
    kept = kept_layers(check_segments(segments, before), before)
    config = cut_config(dense.config, kept)
    _refuse_offloaded(dense)
    cut = without_weights(lambda: type(dense)(config))
    path = decoder_path(dense)
    _take_over_tensors(cut, dense, path, kept)
    cut.eval()
    if dense.generation_config is not None:
        cut.generation_config = copy.deepcopy(dense.generation_config)
    cut.name_or_path = dense.name_or_path
    _dispatch_like(cut, dense, path, kept)
    check_cut(cut, dense, kept)
    return cut


def own_storage(module: nn.Module) -> None:
    """Give a module's parameters storage of their own, so that it can be trained without changing the model it came from.

    Parameters that it holds twice stay one.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


def without_weights(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A model whose constructor has run, without memory for its parameters; small buffers may have some.

    Args:
        build (`Callable`): Makes the model.
    """
    # not torch.device("meta"): some constructors read values of small tensors that they make on the way
    try:
        with init_empty_weights(include_buffers=True):
            return build()
    except NotImplementedError:
        # Apertus reads one of its buffers while it is built (transformers 4.57): let it have its buffers
        with init_empty_weights(include_buffers=False):
            return build()


def _refuse_offloaded(dense: PreTrainedModel) -> None:
    offloaded = [name for name, parameter in dense.named_parameters() if parameter.is_meta]
    if offloaded and len(offloaded) < len(list(dense.parameters())):
        raise ModelError.of(
            offloaded[0],
            "a tensor on the meta device",
            "a cut needs every weight in memory, and this one is offloaded",
            "Load the model without offloading (a smaller dtype, or a device_map without 'disk')",
        )


def _take_over_tensors(cut: PreTrainedModel, dense: PreTrainedModel, path: str, kept: Sequence[int]) -> None:
    """Replace every tensor of `cut` by one over the storage of its counterpart in `dense`."""
    taken: dict[int, nn.Parameter] = {}  # tied parameters stay one object
    for module_name, module in cut.named_modules(remove_duplicate=False):
        source_name = old_name(path, kept, module_name)
        try:
            source = dense.get_submodule(source_name)
        except AttributeError:
            raise _no_counterpart(source_name, "module") from None
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                original = _counterpart(source, name, source_name)
                if id(original) not in taken:
                    taken[id(original)] = nn.Parameter(original.data, requires_grad=original.requires_grad)
                module._parameters[name] = taken[id(original)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = _counterpart(source, name, source_name)
        for name, value in list(vars(module).items()):
            # rotary embeddings keep a tensor that is neither parameter nor buffer
            if isinstance(value, Tensor):
                setattr(module, name, _counterpart(source, name, source_name))


def _counterpart(source: nn.Module, name: str, source_name: str) -> Any:
    tensor = getattr(source, name, None)
    if not isinstance(tensor, Tensor):
        raise _no_counterpart(f"{source_name}.{name}", "tensor")
    return tensor


def _no_counterpart(name: str, kind: str) -> CutError:
    return CutError.of(
        "cut model",
        name,
        f"the dense model has no such {kind}",
        "The config cannot express this cut; nothing was written and the dense model is unchanged",
    )


def _dispatch_like(cut: PreTrainedModel, dense: PreTrainedModel, path: str, kept: list[int]) -> None:
    """Repeat accelerate's hooks where the dense model is spread over several devices."""
    device_map = getattr(dense, "hf_device_map", None)
    if not device_map:
        return
    prefix = path + "."
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
        cut.hf_device_map = renumbered  # type: ignore[assignment]  # accelerate adds it
