"""What was done to a model in memory that no saved model has: hooks and forward methods of single modules, and weights that
two layers share.

Attributes and modules are the guard's. These three show in neither, so that a model would be cut, and what is saved computes
other than what was given; or a search would end in an error of saving.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architecture.lookup import decoder_layers
from ..errors import CutError, ModelError
from .assembly import short_row_logits, uncut_twin, without_weights

# Kernels that are put into single modules (Liger's) round otherwise; a hook that does something changes more. Of the largest logit,
# in steps of the weights' dtype.
_ROUNDING = 256


def check_hand_made(dense: PreTrainedModel) -> None:
    """Check that layers share no weight that their class does not share by itself, which no checkpoint can say; and that hooks
    and replaced forward methods of single modules change no logit beyond rounding.

    Args:
        dense (`PreTrainedModel`): As it is given; not changed. On the meta device nothing is looked at.

    Raises:
        ModelError: Names two layers and the weight.
        CutError: Names the first module that has such a hook or method.
    """
    if dense.device.type != "meta":
        _check_shared_weights(dense)
        _check_forwards(dense)


def _check_forwards(dense: PreTrainedModel) -> None:
    found = next(_own_forwards(dense), None)
    if found is None:
        return
    logits, expected = short_row_logits(dense).float(), short_row_logits(uncut_twin(dense)).float()
    bound = _ROUNDING * torch.finfo(dense.dtype).eps * expected.abs().max()
    if bool((logits - expected).abs().max() <= bound):
        return
    name, what = found
    raise CutError.of(
        f"dense model, {name or type(dense).__name__}",
        what,
        "it changes what the model computes, and is in no checkpoint: saved, cut or not, the model would compute something else",
        "Take it off first, or write what it does into the weights",
    )


def _own_forwards(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        # accelerate's: where weights lie is no change of what they are
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            yield name, "a forward method of its own"
        elif module._forward_hooks or module._forward_pre_hooks:
            yield name, "a forward hook"


def _check_shared_weights(dense: PreTrainedModel) -> None:
    pairs = list(_shared(dense))
    if not pairs:
        return
    built = without_weights(lambda: type(dense)(copy.deepcopy(dense.config)))
    fresh = dict(built.named_parameters(remove_duplicate=False))
    for first, second in pairs:
        if fresh.get(first) is None or fresh.get(first) is not fresh.get(second):
            raise ModelError.of(
                "model",
                type(dense).__name__,
                f"{second} is the same tensor as {first}, which the model's class does not know: a saved model would have two",
                "Give the layer weights of its own: module.weight = torch.nn.Parameter(module.weight.detach().clone())",
            )


def _shared(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Names of parameters of different layers that are one tensor."""
    owners: dict[tuple[int, torch.Size], tuple[int, str]] = {}
    prefixes = {id(module): name for name, module in model.named_modules()}
    for index, layer in enumerate(decoder_layers(model)):
        for name, parameter in layer.named_parameters(prefix=prefixes[id(layer)], remove_duplicate=False):
            if parameter.numel() and parameter.device.type != "meta":
                owner, known = owners.setdefault((parameter.data_ptr(), parameter.shape), (index, name))
                if owner != index:
                    yield known, name
