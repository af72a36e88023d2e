"""Perplexity, divergence from the dense model, and speed: the same code for PyTorch models and ONNX files."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..architecture.lookup import text_config
from ..forward.dense_outputs import DenseOutputs, StateStore
from ..forward.hooks import evaluation_mode
from ..forward.layer_major import Residence
from ..forward.losses import kl_divergence, next_token_cross_entropy
from ..out_of_memory import Halving
from ..progress import progress_bar

_LOGIT_BYTES = 4 * 6  # of one logit: two models', what the losses make of them, and temporaries


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
    model: Any,
    tokens: Tensor,
    *,
    reference: DenseOutputs | None = None,
    batch_size: int = 8,
    residence: Residence | None = None,
    name: str = "the model",
    quiet: bool = False,
) -> Evaluation:
    """Perplexity of a model, and its divergence from the dense one.

    Args:
        model: Anything that is called with `input_ids` and `attention_mask` (int64 `[batch, length]`) and returns an object
            with `.logits`; a PyTorch model or an [`OnnxCausalLM`].
        tokens (`Tensor`): int64 `[rows, length]`, full rows, length at least 2.
        reference ([`DenseOutputs`], *optional*): The dense model's outputs for exactly these rows.
        batch_size (`int`): Rows in one forward pass; does not change the result beyond rounding.
        residence ([`Residence`], *optional*): For a PyTorch model that memory does not hold: rows go through it layer by layer.
        name (`str`): Whose figures they are, and on what, for the progress bar.
        quiet (`bool`): No progress bar.

    Returns:
        [`Evaluation`]
    """
    device = getattr(model, "device", torch.device("cpu"))
    logits_of = _logits_of(model, tokens, batch_size, residence, f"Passes for {name}", quiet)
    if residence is not None:
        batch_size = min(batch_size, _rows_of_logits(model, tokens.shape[1], residence))

    def sums(rows: range) -> list[float]:
        where = slice(rows.start, rows.stop)
        batch = tokens[where].to(device)
        logits = logits_of(where, batch)
        losses = next_token_cross_entropy(logits, batch)
        found = [losses.double().sum().item(), float(losses.numel())]
        if reference is None:
            return found
        dense = reference.logits(where).to(logits.device)
        found += [kl_divergence(dense, logits).double().sum().item()]
        found += [next_token_cross_entropy(dense, batch).double().sum().item()]
        return [*found, float((dense.argmax(-1) == logits.argmax(-1)).sum()), float(batch.numel())]

    parts: list[list[float]] = []
    halving = Halving("evaluation", "search.batch_size (--batch-size)")
    with torch.no_grad(), evaluation_mode(model), progress_bar(len(tokens), f"Evaluation of {name}", quiet) as bar:
        for first in range(0, len(tokens), batch_size):
            rows = range(first, min(len(tokens), first + batch_size))
            parts += halving.over(rows, sums)
            bar.update(len(rows))
    loss, count, *compared = map(sum, zip(*parts, strict=True))
    perplexity = _exp(loss / count)
    if reference is None:
        return Evaluation(perplexity, loss / count, int(count))
    kl, dense_loss, agree, positions = compared
    retention = _exp((dense_loss - loss) / count)
    return Evaluation(perplexity, loss / count, int(count), kl / positions, agree / positions, retention)


def _logits_of(
    model: Any, tokens: Tensor, batch_size: int, residence: Residence | None, description: str, quiet: bool
) -> Callable[[slice, Tensor], Tensor]:
    """What gives a model's logits of some rows."""
    if residence is None or not isinstance(model, PreTrainedModel):
        return lambda rows, batch: (
            model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False).logits
        )
    store = StateStore(residence.folder, residence.state_memory)
    shown: dict[str, Any] = {"description": description, "quiet": quiet}
    own = DenseOutputs(model, tokens, batch_size=batch_size, store=store, residence=residence, **shown)
    return lambda rows, batch: own.logits(rows)


def _rows_of_logits(model: Any, length: int, residence: Residence) -> int:
    """Rows whose logits may exist at once, in float32 for the losses of two models; at least 1."""
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return 1
    return max(1, int(min(2**31, residence.work_memory / (length * text_config(config).vocab_size * _LOGIT_BYTES))))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
