"""The cut: a smaller model of the same class, built from its new config, over the dense model's own tensors."""

import copy
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from ..architecture.lookup import cut_config, num_layers
from ..errors import ModelError
from ..forward.streamed_layers import settle
from ..segments import LayerSegment, check_segments, kept_layers
from .assembly import assembled
from .guard import check_cut


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
    cut = assembled(dense, config, kept)
    if dense.generation_config is not None:
        cut.generation_config = copy.deepcopy(dense.generation_config)
    cut.name_or_path = dense.name_or_path
    check_cut(cut, dense, kept)
    return cut


def own_storage(module: nn.Module) -> None:
    """Give a module's parameters storage of their own, so that it can be trained without changing the model it came from.

    Parameters that it holds twice stay one. Layers that run elsewhere than where they lie come to lie where they run.
    """
    settle(module)
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


def separate(cut: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Give a cut model storage of its own wherever it shares the dense model's: a copy of these weights, tied ones once.

    Args:
        cut (`PreTrainedModel`): What [`cut_model`] returned; afterwards training it changes nothing in `dense`.
        dense (`PreTrainedModel`): Not changed.
    """
    shared = {tensor.data_ptr() for tensor in (*dense.parameters(), *dense.buffers())}
    for tensor in (*cut.parameters(), *cut.buffers()):
        if tensor.data_ptr() in shared:
            tensor.data = tensor.data.clone()


def _refuse_offloaded(dense: PreTrainedModel) -> None:
    offloaded = [name for name, parameter in dense.named_parameters() if parameter.is_meta]
    if offloaded and len(offloaded) < len(list(dense.parameters())):
        raise ModelError.of(
            offloaded[0],
            "a tensor on the meta device",
            "a cut needs every weight in memory, and this one is offloaded",
            "Give the model to CLPPruner, which reads offloaded weights in place, or load it without offloading",
        )
