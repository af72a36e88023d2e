"""The norm through which a state is read first: that of the next layer, or the one before the head.

A state is as long as its largest channels, and these are not what counts alone: of Gemma 3's, the variance of one is ten thousand
times that of the others, and the weights of the norm that reads it make it small.
"""

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .hooks import BeforeForward, evaluation_mode, hooked, run_without_head, stopped_before
from .layer_stack import LayerStack


def reading_norms(model: PreTrainedModel, stack: LayerStack, states: Mapping[int, Tensor]) -> dict[int, nn.Module]:
    """The norms that states enter first, found by running what reads them.

    Args:
        model (`PreTrainedModel`): The layers that the states enter are run on them; not changed.
        stack ([`LayerStack`]): Of the model; knows what its layers return.
        states (`dict[int, Tensor]`): By the layer that they enter, at least 1, `len(layers)` for what is behind the last one: some of
            them, `[rows, length, hidden]`, in the model's dtype.

    Returns:
        `dict[int, nn.Module]`: Copies in float32 that take no gradient. A state that no norm reads as it is, because the layer's
        norms stand behind its sublayers (OLMo 2) or the stream is more than one tensor, has none.
    """
    # a norm has no parts; not every one has weights
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower() and next(m.children(), None) is None]
    found: dict[int, nn.Module] = {}

    def entering(index: int, state: Tensor) -> BeforeForward:
        def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if index not in found and given is not None and _same(given, state):
                # here and now: weights that lie elsewhere are where they run only while they run
                found[index] = copy.deepcopy(module).float().requires_grad_(False)

        return look

    with torch.no_grad(), evaluation_mode(model):
        for index, state in states.items():
            state = state.to(model.device)
            tokens = torch.zeros(state.shape[:2], dtype=torch.long)
            look = entering(index, state)
            ended = stopped_before(stack.layers[index + 1]) if index + 1 < len(stack) else nullcontext()
            with stack.resumed(index, state), hooked([(norm, look) for norm in norms]), ended:
                run_without_head(model, tokens)
    return found


def _same(given: Tensor, state: Tensor) -> bool:
    return given.shape == state.shape and torch.equal(given.float(), state.to(given.device).float())
