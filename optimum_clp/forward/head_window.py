"""Logits of a part of the positions: where the vocabulary is large, a model's head is most of a pass."""

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel


def logits_within(model: PreTrainedModel, tokens: Tensor, window: slice | None) -> Tensor:
    """A pass over whole rows, and the logits of a window of their positions.

    Args:
        model (`PreTrainedModel`): One whose `forward` does not take positions makes all logits, and the others are dropped.
        tokens (`Tensor`): int64 `[rows, length]`.
        window (`slice` or `None`): With both ends; `None` for all positions.

    Returns:
        `Tensor`: `[rows, positions, vocab]`, in the model's dtype.
    """
    if window is None:
        return model(input_ids=tokens, use_cache=False).logits
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return model(input_ids=tokens, use_cache=False).logits[:, window]
    positions = torch.arange(window.start, window.stop, device=tokens.device)
    return model(input_ids=tokens, use_cache=False, logits_to_keep=positions).logits
