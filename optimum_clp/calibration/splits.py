"""Rows of a split, with what is known of each: its kind, and which of its tokens count."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

GIVEN, PLAIN, CONVERSATIONS = "given", "plain", "conversations"


@dataclass(frozen=True)
class TextRows:
    """Full rows of tokens, on the CPU.

    Args:
        tokens (`Tensor`): int64 `[rows, length]`.
        kinds (`tuple[str, ...]`): For each row `"given"`, `"plain"` or `"conversations"`.
        mask (`Tensor` or `None`): bool `[rows, length]`: tokens that are to be learnt; `None` for all.
    """

    tokens: Tensor
    kinds: tuple[str, ...]
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def parted(self, sizes: Sequence[int]) -> "list[TextRows]":
        """Parts of so many rows, in order."""
        masks = [None] * len(sizes) if self.mask is None else self.mask.split(list(sizes))
        kinds = [self.kinds[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
        return [TextRows(*part) for part in zip(self.tokens.split(list(sizes)), kinds, masks, strict=True)]

    def shuffled(self, seed: int) -> "TextRows":
        """The rows in an order that depends on `seed` and their number alone."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        kinds = tuple(self.kinds[i] for i in order.tolist())
        return TextRows(self.tokens[order], kinds, None if self.mask is None else self.mask[order])


def joined(parts: Sequence[TextRows]) -> TextRows:
    """The rows of all parts; where some have a mask, all tokens of the others count."""
    masks = [torch.ones_like(part.tokens, dtype=torch.bool) if part.mask is None else part.mask for part in parts]
    masked = any(part.mask is not None for part in parts)
    kinds = tuple(chain.from_iterable(part.kinds for part in parts))
    return TextRows(torch.cat([part.tokens for part in parts]), kinds, torch.cat(masks) if masked else None)
