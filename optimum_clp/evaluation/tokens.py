"""Perplexity, divergence from the dense model, and speed: the same code for PyTorch models and ONNX files."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..forward.dense_outputs import DenseOutputs
from ..forward.hooks import evaluation_mode
from ..forward.losses import kl_divergence, next_token_cross_entropy
from ..progress import progress_bar


@dataclass(frozen=True)
class Evaluation:
    """Token-mean figures over full rows of tokens.

    Args:
        perplexity (`float`): `exp(loss)`.
        loss (`float`): Mean cross-entropy of every token after the first of its row, in nats.
        num_tokens (`int`): Tokens that were predicted.
        kl (`float` or `None`): Mean `KL(dense || model)` at every position, in nats; `None` without a reference.
        top1_agreement (`float` or `None`): Share of positions where both find the same token most likely.
        retention (`float` or `None`): Perplexity of the dense model divided by this one's: 1 is undamaged.
    """

    perplexity: float
    loss: float
    num_tokens: int
    kl: float | None = None
    top1_agreement: float | None = None
    retention: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON-ready values."""
        return asdict(self)


def evaluate_tokens(
    model: Any, tokens: Tensor, *, reference: DenseOutputs | None = None, batch_size: int = 8, quiet: bool = False
) -> Evaluation:
    """Perplexity of a model, and its divergence from the dense one.

    Args:
        model: Anything that is called with `input_ids` and `attention_mask` (int64 `[batch, length]`) and returns an object
            with `.logits`; a PyTorch model or an [`OnnxCausalLM`].
        tokens (`Tensor`): int64 `[rows, length]`, full rows, length at least 2.
        reference ([`DenseOutputs`], *optional*): The dense model's outputs for exactly these rows.
        batch_size (`int`): Rows in one forward pass; does not change the result beyond rounding.
        quiet (`bool`): No progress bar.

    Returns:
        [`Evaluation`]
    """
    loss = kl = dense_loss = 0.0
    agree = count = positions = 0
    device = getattr(model, "device", torch.device("cpu"))
    with torch.no_grad(), evaluation_mode(model), progress_bar(len(tokens), "Evaluation", quiet) as bar:
        for first in range(0, len(tokens), batch_size):
            rows = slice(first, first + batch_size)
            batch = tokens[rows].to(device)
            logits = model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False).logits
            losses = next_token_cross_entropy(logits, batch)
            loss += losses.double().sum().item()
            count += losses.numel()
            if reference is not None:
                dense = reference.logits(rows).to(logits.device)
                kl += kl_divergence(dense, logits).double().sum().item()
                dense_loss += next_token_cross_entropy(dense, batch).double().sum().item()
                agree += int((dense.argmax(-1) == logits.argmax(-1)).sum())
                positions += batch.numel()
            bar.update(len(batch))
    perplexity = _exp(loss / count)
    if reference is None:
        return Evaluation(perplexity, loss / count, count)
    return Evaluation(
        perplexity, loss / count, count, kl / positions, agree / positions, _exp((dense_loss - loss) / count)
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
