"""Decoding step by step: what a model's cache is called, whether it is enough, and a step that does not slow down."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .hooks import evaluation_mode

# of the argument of `forward` and the field of its output: since transformers 5.24, and before it. A model's own code may
# keep the old name, so the version does not tell
_NAMES = ("cache", "past_key_values")
# what attention may be given that does not change what one new token of a full row sees
_HARMLESS = frozenset(
    {"is_causal", "sliding_window", "position_ids", "cache_position", "use_cache", "output_attentions"}
)


def cache_argument(model: Any) -> str | None:
    """The name under which a model takes its cache.

    Args:
        model: With a method `forward`, or itself a function.

    Returns:
        `str` or `None`: A parameter of `forward`; `None` if it has no such parameter.
    """
    parameters = inspect.signature(getattr(model, "forward", model)).parameters
    return next((name for name in _NAMES if name in parameters), None)


def cache_keyword(model: Any) -> str:
    """The keyword under which to give a model its cache: [`cache_argument`], or, for a `forward` that names none (a
    wrapper with `**kwargs`), transformers' own."""
    name = cache_argument(model) or cache_argument(GenerationMixin.prepare_inputs_for_generation)
    assert name is not None
    return name


def cache_of(output: Any) -> Any:
    """The cache in what a model's call has returned, or `None`."""
    # the first name that there is, also with None: newer outputs warn when they are asked for the older name
    return next((getattr(output, name) for name in _NAMES if hasattr(output, name)), None)


def takes_back_its_cache(model: Any) -> bool:
    """Whether a plain call gives a cache, and a call that is given it continues the text.

    Not so for models with states under another name (Mamba before transformers 5.24), and for some whose cache only
    `generate()` can make (Jamba in transformers 4). Those are decoded by running the whole text for every token. Four
    tokens are run, two of them one by one: what a step leaves behind is seen by the next.

    No step is given a mask. Nothing is padded here, and Mamba of transformers 5.24 takes one of the whole text's length
    for as many copies of the new token: the logits are right, and its state is not from then on.

    Args:
        model: Called with `input_ids`; returns an object with `.logits`. In evaluation mode.

    Returns:
        `bool`: Whether the continued text has the logits of the whole one, up to rounding.
    """
    device = getattr(model, "device", torch.device("cpu"))
    ids = torch.tensor([[0, 2, 1, 2]], device=device)
    try:
        with torch.no_grad(), evaluation_mode(model):
            cache = cache_of(model(input_ids=ids[:, :2], use_cache=True))
            if cache is None:
                return False
            for place in (2, 3):
                given = {cache_keyword(model): cache}
                output = model(input_ids=ids[:, place : place + 1], use_cache=True, **given)
                last, cache = output.logits, cache_of(output)
            whole = model(input_ids=ids, use_cache=False).logits
    # a cache of another kind fails in as many ways as there are models
    except Exception:
        return False
    if not torch.isfinite(whole).all():
        return True  # the caller's business, and his error names it
    difference = (last[:, -1] - whole[:, -1]).abs().max()
    # 16 bits round to 1e-2; a step that has forgotten the text before is off by its own size
    return bool(difference <= 0.05 * whole[:, -1].abs().max())


def last_logits_only(model: Any) -> dict[str, int]:
    """The argument that lets a model's call make the logits of the last position alone; empty if it has none."""
    parameters = inspect.signature(getattr(model, "forward", model)).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}


@contextmanager
def fast_decoding(model: Any) -> Iterator[None]:
    """Let attention of one new token on the CPU in 16 bits be two matrix products, until the block ends.

    PyTorch's fused attention is slow there: 11 ms against 0.6 ms for a layer of 128 rows, 120 tokens, 9 heads of 64 over
    3 of keys in bfloat16 (PyTorch 2.13, one thread), and it becomes most of a step. The products round as transformers'
    own `eager` attention does: scores to 16 bits, softmax in float32. All else goes where it went: float32, several new
    tokens, masks, other devices, models whose attention is not transformers' `sdpa`.
    """
    name = "sdpa"
    original = ALL_ATTENTION_FUNCTIONS[name]

    def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        plain = set(kwargs) <= _HARMLESS or all(kwargs[k] is None for k in set(kwargs) - _HARMLESS)
        if attention_mask is not None or not _decodes(query, key) or not plain:
            return original(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return _grouped_attention(query, key, value, scaling), None

    # not register(), which cannot be undone
    with mock.patch.dict(ALL_ATTENTION_FUNCTIONS._local_mapping, {name: attention}):
        yield


def _decodes(query: Tensor, key: Tensor) -> bool:
    one = query.shape[2] == 1 and query.shape[1] % key.shape[1] == 0
    return one and query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)


def _grouped_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Attention of one query `[rows, heads, 1, size]`; heads that share keys are one matrix. `[rows, 1, heads, size]`."""
    rows, heads, _, size = query.shape
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    scores = grouped @ key.transpose(2, 3) * (size**-0.5 if scaling is None else scaling)
    mixed = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    return mixed.reshape(rows, 1, heads, value.shape[-1])
