"""Divergences and cross-entropy per token, in float32 whatever the dtype of the logits.

All walk over the tokens in chunks, so that the float32 copy of a large-vocabulary logit tensor is never whole. A chunk is
small enough for a processor's cache: with 49152 tokens in the vocabulary, chunks of 85 tokens take 0.4 times the time of
chunks of 1024 (head, loss and gradient together, one thread, bfloat16).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_PROBABILITIES = 2**22


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose float32 probabilities exist at one time: at least 1, and no more than `CHUNK_PROBABILITIES` of these."""
    return max(1, CHUNK_PROBABILITIES // vocabulary)


def kl_divergence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """`KL(teacher || student)` of the next-token distributions, in nats.

    Args:
        teacher_logits (`Tensor`): `[..., vocab]`, any floating dtype; no gradient flows into it.
        student_logits (`Tensor`): Same shape.

    Returns:
        `Tensor`: float32, shape `[...]`, at least 0 up to rounding.
    """
    return _in_chunks(_kl, teacher_logits, student_logits)


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    with torch.no_grad():
        given, own = (logits.float().log_softmax(-1) for logits in (teacher, student))
        probabilities = given.exp()
        found = (probabilities * given.sub_(own)).sum(-1)
    if not (student.requires_grad and torch.is_grad_enabled()):
        return found
    # The gradient is the difference of the probabilities, and is all that is kept, in the dtype of the logits: autograd would
    # keep two float32 copies of them. What carries it to the student is 0.
    gradient = own.exp_().sub_(probabilities).to(student.dtype)
    carried = (student * gradient).sum(-1, dtype=torch.float32)
    return found + (carried - carried.detach())


def jensen_shannon_divergence(teacher_logits: Tensor, student_logits: Tensor, top: int) -> Tensor:
    """The mean of `KL(teacher || m)` and `KL(student || m)`, `m` halfway between both, in nats: at most `log 2`.

    Of the teacher's most likely tokens and all others as one more: what is said of the tail of a large vocabulary is
    mostly noise, and of no use to a student.

    Args:
        teacher_logits (`Tensor`): `[..., vocab]`, any floating dtype; no gradient flows into it.
        student_logits (`Tensor`): Same shape.
        top (`int`): Tokens that are told apart, at least 1; all, if the vocabulary has no more.

    Returns:
        `Tensor`: float32, shape `[...]`, at least 0 up to rounding.
    """
    count = min(top, student_logits.shape[-1])
    return _in_chunks(
        lambda teacher, student: _jensen_shannon(teacher, student, count), teacher_logits, student_logits
    )


def _jensen_shannon(teacher: Tensor, student: Tensor, top: int) -> Tensor:
    likely, indices = teacher.float().log_softmax(-1).topk(top, -1)
    given, own = (_with_rest(part) for part in (likely, student.float().log_softmax(-1).gather(-1, indices)))
    middle = torch.logaddexp(given, own) - math.log(2)
    return 0.5 * ((given.exp() * (given - middle)).sum(-1) + (own.exp() * (own - middle)).sum(-1))


def _in_chunks(
    divergence: Callable[[Tensor, Tensor], Tensor], teacher_logits: Tensor, student_logits: Tensor
) -> Tensor:
    """A divergence of each token, from logits `[tokens, vocab]` of some tokens at a time."""
    vocabulary = student_logits.shape[-1]
    pairs = (
        x.reshape(-1, vocabulary).split(chunk_tokens(vocabulary)) for x in (teacher_logits.detach(), student_logits)
    )
    return torch.cat([divergence(*pair) for pair in zip(*pairs, strict=True)]).reshape(student_logits.shape[:-1])


def _with_rest(likely: Tensor) -> Tensor:
    """Log-probabilities of some tokens, and of all others together."""
    # float32 knows a rest no better than to its last bit, and a logarithm of 0 has no gradient
    rest = (1 - likely.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(torch.float32).eps)
    return torch.cat([likely, rest.log()], -1)


def next_token_cross_entropy(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Cross-entropy of each token given the ones before it, in nats.

    Args:
        logits (`Tensor`): `[batch, length, vocab]`, any floating dtype.
        input_ids (`Tensor`): `[batch, length]`, integer; every row is full (no padding).

    Returns:
        `Tensor`: float32 `[batch, length - 1]`: entry `t` is `-log p(input_ids[:, t + 1])`.
    """
    vocabulary = logits.shape[-1]
    predicted = logits[:, :-1].reshape(-1, vocabulary)
    labels = input_ids[:, 1:].reshape(-1).to(logits.device)
    size = chunk_tokens(vocabulary)
    parts = [
        F.cross_entropy(p.float(), label, reduction="none")
        for p, label in zip(predicted.split(size), labels.split(size), strict=True)
    ]
    return torch.cat(parts).reshape(logits.shape[0], -1)
