"""What one model says of the tokens of another one's answers: sums for each answer, and means over all with their errors."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..forward.dense_outputs import DenseOutputs
from ..forward.hooks import evaluation_mode
from ..forward.losses import kl_divergence, next_token_cross_entropy
from ..progress import progress_bar

BATCH = 4
Sums = list[tuple[float, int]]
"""For each answer the sum over its tokens, and their number."""


class JudgedAnswers:
    """The dense model's outputs along answers, computed once.

    The texts are filled up on the right to one length. What comes behind a token changes nothing that a causal model says
    of it, so there is no mask.

    Args:
        dense (`PreTrainedModel`): The judge; not changed.
        prompts (`Sequence[Sequence[int]]`): Tokens, at least one each.
        answers (`Sequence[Sequence[int]]`): Tokens, at least one each.
        quiet (`bool`): No progress bar.
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        *,
        quiet: bool,
    ):
        self.quiet = quiet
        texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        longest = max(map(len, texts))
        # any token will do behind the end
        self.tokens = torch.tensor([text + text[-1:] * (longest - len(text)) for text in texts])
        # the positions that predict the answer's tokens
        self.spans = [slice(len(p) - 1, len(p) - 1 + len(a)) for p, a in zip(prompts, answers, strict=True)]
        self.outputs = DenseOutputs(
            dense, self.tokens, batch_size=BATCH, quiet=quiet, description="Dense model on answers"
        )

    def losses(self) -> Sums:
        """The dense model's cross-entropy of each answer, in nats."""
        found = []
        with torch.no_grad():
            for rows in self._batches():
                losses = next_token_cross_entropy(self.outputs.logits(rows), self.tokens[rows])
                found += [_sum(row[span]) for row, span in zip(losses, self.spans[rows], strict=True)]
        return found

    def divergences(self, model: Any, name: str) -> Sums:
        """`KL(dense || model)` along each answer, in nats."""
        device = getattr(model, "device", torch.device("cpu"))
        found = []
        shown = progress_bar(len(self.tokens), f"Dense answers, {name}", self.quiet)
        with torch.no_grad(), evaluation_mode(model), shown as bar:
            for rows in self._batches():
                ids = self.tokens[rows].to(device)
                said = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
                for dense, own, span in zip(self.outputs.logits(rows), said, self.spans[rows], strict=True):
                    found.append(_sum(kl_divergence(dense[span].to(own.device), own[span])))
                bar.update(len(ids))
        return found

    def _batches(self) -> Iterator[slice]:
        for first in range(0, len(self.tokens), BATCH):
            yield slice(first, first + BATCH)


def token_mean(sums: Sums) -> tuple[float, float | None]:
    """Mean over all tokens, and its standard error over the answers (of a ratio of two sums); `None` for one answer."""
    total, count, number = sum(s for s, _ in sums), sum(n for _, n in sums), len(sums)
    mean = total / count
    if number < 2 or not math.isfinite(mean):
        return mean, None
    spread = sum((s - mean * n) ** 2 for s, n in sums)
    return mean, math.sqrt(spread * number / (number - 1)) / count


def mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; `None` for one value."""
    number, middle = len(values), sum(values) / len(values)
    if number < 2:
        return middle, None
    return middle, math.sqrt(sum((v - middle) ** 2 for v in values) / (number - 1) / number)


def _sum(values: Tensor) -> tuple[float, int]:
    return values.double().sum().item(), values.numel()
