"""Logits of a part of the positions: where the vocabulary is large, a model's head is most of a pass."""

import inspect
import math
import random

import torch
from torch import Tensor
from transformers import PreTrainedModel


def drawn_window(length: int, share: float, draw: str) -> slice | None:
    """One of the windows that rows are parted into, side by side and as equal as can be.

    Args:
        length (`int`): Positions of a row.
        share (`float`): Of these in a window, at most; in (0, 1].
        draw (`str`): What the choice depends on; each window is as likely.

    Returns:
        `slice` or `None`: `None` for all positions.
    """
    count = min(length, math.ceil(1 / share))
    if count == 1:
        return None
    chosen = torch.arange(length).tensor_split(count)[random.Random(draw).randrange(count)]
    return slice(int(chosen[0]), int(chosen[-1]) + 1)


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
