"""A model of the same class over another one's tensors: what a cut model is, and an uncut one to compare with."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..architecture.lookup import cut_config, decoder_path, num_layers, within_context
from ..errors import CutError
from ..forward.hooks import at_rest, computed_buffers, evaluation_mode
from ..forward.streamed_layers import copies_of, stream_layers

_SHORT_ROW = 16


def assembled(dense: PreTrainedModel, config: PretrainedConfig, kept: Sequence[int]) -> PreTrainedModel:
    """A model of `dense`'s class and of another config, over the tensors of the layers `kept`.

    It is instantiated without memory for weights, so that everything that a class computes in its constructor is what a
    reload will compute, and then takes over the dense model's tensors. What rotary embeddings change while they run is
    its own: such buffers are copies, as they are before any text.

    Args:
        dense (`PreTrainedModel`): Not changed.
        config (`PretrainedConfig`): Of what is built.
        kept (`Sequence[int]`): Its layer `j` takes the tensors of `dense`'s layer `kept[j]`.

    Returns:
        `PreTrainedModel`: In eval mode, with `dense`'s dtype and devices.

    Raises:
        CutError: If the config asks for a module or a tensor that `dense` does not have.
    """
    path = decoder_path(dense)
    built = without_weights(lambda: type(dense)(config))
    with at_rest(dense):
        _take_over_tensors(built, dense, path, kept)
    built.eval()
    if (copies := copies_of(dense)) is not None:
        stream_layers(built, copies)
    _dispatch_like(built, dense, path, kept)
    return built


def uncut_twin(dense: PreTrainedModel) -> PreTrainedModel:
    """What the dense model would be, saved and read back: built from its config, over its tensors, with all layers."""
    everything = range(num_layers(dense.config))
    return assembled(dense, cut_config(dense.config, everything), everything)


def computes_alike(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether two models over the same tensors give equal logits, bit for bit, for one short row of tokens."""
    return torch.equal(short_row_logits(model), short_row_logits(other))


def short_row_logits(model: PreTrainedModel) -> Tensor:
    """Logits `[1, length, vocabulary]` of a row of at most 16 tokens, the same for all models of a vocabulary."""
    length = within_context(_SHORT_ROW, model.config)
    embedding: Any = model.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    with torch.no_grad(), evaluation_mode(model):
        return model(input_ids=ids, use_cache=False).logits


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


def _take_over_tensors(cut: PreTrainedModel, dense: PreTrainedModel, path: str, kept: Sequence[int]) -> None:
    """Replace every tensor of `cut` by one over the storage of its counterpart in `dense`."""
    taken: dict[int, nn.Parameter] = {}  # tied parameters stay one object
    copies: dict[int, Tensor] = {}  # and so do buffers that layers share
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
        for name, buffer in computed_buffers(module).items():
            # these may be written in place while a model runs
            if id(buffer) not in copies:
                copies[id(buffer)] = buffer.clone()
            module._buffers[name] = copies[id(buffer)]
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


def _dispatch_like(cut: PreTrainedModel, dense: PreTrainedModel, path: str, kept: Sequence[int]) -> None:
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
            renumbered[f"{prefix}{list(kept).index(int(index))}{dot}{rest}"] = device
    if len({str(d) for d in renumbered.values()}) > 1:
        from accelerate import dispatch_model

        dispatch_model(cut, renumbered)
    else:
        cut.hf_device_map = renumbered  # type: ignore[assignment]  # accelerate adds it


def old_name(path: str, kept: Sequence[int], name: str) -> str:
    """The dense model's name for a module or tensor of the cut model, whose layers are at `path`."""
    prefix = path + "."
    if not name.startswith(prefix):
        return name
    index, dot, rest = name[len(prefix) :].partition(".")
    return f"{prefix}{kept[int(index)]}{dot}{rest}"
