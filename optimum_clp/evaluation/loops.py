"""Answers that have fallen into a loop.

The probe is ShortOPD's (arXiv 2607.13124): in the last 512 tokens a period of at most 10 tokens, which repeats at least 3
times and agrees to 90 % over at least 64 tokens. An answer below 64 tokens has no loop.
"""

from collections.abc import Sequence

import torch

LAST_TOKENS = 512
LONGEST_PERIOD = 10
# 64 tokens are more than 3 of the longest period
LOOP_TOKENS = 64
AGREEMENT = 0.9


def has_loop(tokens: Sequence[int]) -> bool:
    """Whether there is a loop in an answer.

    Args:
        tokens (`Sequence[int]`): The answer, without the token that ends it.
    """
    return loop_begin(tokens) is not None


def loop_begin(tokens: Sequence[int]) -> int | None:
    """Where the first 64 tokens of a loop begin, of any period; `None` if there is no loop.

    Args:
        tokens (`Sequence[int]`): The answer, without the token that ends it.
    """
    tail = torch.tensor(tokens[-LAST_TOKENS:])
    if len(tail) < LOOP_TOKENS:
        return None
    begins = []
    for period in range(1, LONGEST_PERIOD + 1):
        same = (tail[period:] == tail[:-period]).float()
        # of 64 tokens in a row, all but the first `period` have one to agree with
        loops = same.unfold(0, LOOP_TOKENS - period, 1).mean(-1) >= AGREEMENT
        begins += loops.nonzero()[:1, 0].tolist()
    return len(tokens) - len(tail) + min(begins) if begins else None
