"""Whether a model can be decoded step by step with nothing but what its own call hands out."""

from typing import Any

import torch


def takes_back_its_cache(model: Any) -> bool:
    """Whether a plain call gives `past_key_values`, and a call that is given them continues the text.

    Not so for models with other states (Mamba), and for some whose cache only `generate()` can make (Jamba in
    transformers 4). Those are decoded by running the whole text for every token. Three tokens are run three times.

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
            cache = model(input_ids=ids[:, :2], attention_mask=mask[:, :2], use_cache=True).past_key_values
            if cache is None:
                return False
            last = model(input_ids=ids[:, 2:], attention_mask=mask, past_key_values=cache, use_cache=True).logits
            whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    # a cache of another kind fails in as many ways as there are models
    except Exception:
        return False
    if not torch.isfinite(whole).all():
        return True  # the caller's business, and his error names it
    difference = (last[:, -1] - whole[:, -1]).abs().max()
    # 16 bits round to 1e-2; a step that has forgotten the text before is off by its own size
    return bool(difference <= 0.05 * whole[:, -1].abs().max())
