"""A model's cache: what it is called, and whether it is enough to decode step by step."""

import inspect
from typing import Any

import torch
from transformers import GenerationMixin

# of the argument of `forward` and the field of its output: since transformers 5.24, and before it. A model's own code may
# keep the old name, so the version does not tell
_NAMES = ("cache", "past_key_values")


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
    `generate()` can make (Jamba in transformers 4). Those are decoded by running the whole text for every token. Three
    tokens are run three times.

    Args:
        model: Called with `input_ids`; returns an object with `.logits`. In evaluation mode.

    Returns:
        `bool`: Whether the continued text has the logits of the whole one, up to rounding.
    """
    device = getattr(model, "device", torch.device("cpu"))
    ids = torch.tensor([[0, 2, 1]], device=device)
    mask = torch.ones_like(ids)
    try:
        with torch.no_grad():
            cache = cache_of(model(input_ids=ids[:, :2], attention_mask=mask[:, :2], use_cache=True))
            if cache is None:
                return False
            given = {cache_keyword(model): cache}
            last = model(input_ids=ids[:, 2:], attention_mask=mask, use_cache=True, **given).logits
            whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    # a cache of another kind fails in as many ways as there are models
    except Exception:
        return False
    if not torch.isfinite(whole).all():
        return True  # the caller's business, and his error names it
    difference = (last[:, -1] - whole[:, -1]).abs().max()
    # 16 bits round to 1e-2; a step that has forgotten the text before is off by its own size
    return bool(difference <= 0.05 * whole[:, -1].abs().max())
