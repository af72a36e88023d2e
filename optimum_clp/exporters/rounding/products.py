"""Products in bfloat16 while weights are rounded: where the processor has them, they take half of float32's time."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def product_dtype(model: PreTrainedModel, tokens: Tensor) -> torch.dtype:
    """bfloat16 where the processor multiplies in it and a model runs so, else float32.

    Args:
        model ([`~transformers.PreTrainedModel`]): In float32 on the CPU.
        tokens (`Tensor`): int64 `[rows, length]`; two of them are tried.
    """
    if _has_bfloat16() and _runs_in(model, torch.bfloat16, tokens[:1, :2]):
        return torch.bfloat16
    return torch.float32


def products_in(dtype: torch.dtype) -> torch.autocast:
    """A block in which linear modules and attention multiply in a dtype; what they are given, and sums, stay as they are."""
    return torch.autocast("cpu", dtype, enabled=dtype is not torch.float32)


@torch.no_grad()
def _runs_in(model: PreTrainedModel, dtype: torch.dtype, tokens: Tensor) -> bool:
    """Whether the model does: one that writes into tensors of another dtype than its products' does not."""
    try:
        with products_in(dtype):
            return bool(model(input_ids=tokens, use_cache=False).logits.isfinite().all())
    except RuntimeError:
        return False


def _has_bfloat16() -> bool:
    """Whether the processor has products in bfloat16; where it makes them of others they are slower than float32's."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
