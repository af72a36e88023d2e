"""What the trained layers are pulled towards: the losses of `tuning.loss`, and what one of another package looks like.

A loss says what it needs, and is given nothing else: the training loop runs only as much of the two models as the losses
with a weight need together.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..doors import LOSSES
from ..errors import ConfigurationError
from ..forward.losses import jensen_shannon_divergence, kl_divergence, next_token_cross_entropy

# the dense model's most likely tokens that Jensen-Shannon divergence tells apart
_TOP = 100
LOGITS, TEACHER_LOGITS, STATES = NEEDS = ("logits", "teacher_logits", "states")


@dataclass(frozen=True)
class LossBatch:
    """Some rows, as the cut model and the dense one see them. What the loss does not need is `None`.

    Args:
        tokens (`Tensor`): int64 `[rows, length]`, full rows.
        logits (`Tensor` or `None`): The cut model's, `[rows, length, vocab]`, with gradient; for the need `"logits"`.
        teacher_logits (`Tensor` or `None`): The dense model's, of the same shape; for `"teacher_logits"`.
        states (`dict[int, Tensor]` or `None`): What leaves the trained layers, `[rows, length, hidden]`, with gradient; of
            neighbours the last one alone, by its index in the cut model. For `"states"`, as `targets`.
        targets (`dict[int, Tensor]` or `None`): What should leave them: the dense model's states, of the same shape.
        norms (`dict[int, Callable]` or `None`): For `"states"`: the norm through which a layer's output is read first, where there
            is one: takes float32 `[rows, length, hidden]` and gives as much, and has nothing that is trained.
        mask (`Tensor` or `None`): bool `[rows, length]`: tokens that are to be learnt, `None` for all. What a position says
            counts if the token *after* it, which it predicts, is one of them: see [`row_means`].
    """

    tokens: Tensor
    logits: Tensor | None = None
    teacher_logits: Tensor | None = None
    states: Mapping[int, Tensor] | None = None
    targets: Mapping[int, Tensor] | None = None
    mask: Tensor | None = None
    norms: Mapping[int, Callable[[Tensor], Tensor]] | None = None

    def within(self, window: slice | None) -> "LossBatch":
        """The batch as if its rows had no other positions than those of the window, which logits are of already."""
        if window is None:
            return self
        mask = None if self.mask is None else self.mask[:, window]
        return replace(self, tokens=self.tokens[:, window], mask=mask)

    def only(self, needs: frozenset[str]) -> "LossBatch":
        """The batch without what is not needed."""
        return replace(
            self,
            logits=self.logits if LOGITS in needs else None,
            teacher_logits=self.teacher_logits if TEACHER_LOGITS in needs else None,
            states=self.states if STATES in needs else None,
            targets=self.targets if STATES in needs else None,
            norms=self.norms if STATES in needs else None,
        )


class Loss(Protocol):
    """A loss; its class is what stands in the registry `LOSSES`, and is made without arguments.

    `tests/tuning/test_loss_contract.py` holds one to what is said here.

    Attributes:
        needs (`frozenset[str]`): Any of `"logits"`, `"teacher_logits"`, `"states"`; also how the memory of a step is
            estimated: float32 probabilities are kept for each of the first two.
        keeps_gradient (`bool`, *optional*): What is kept instead is the gradient alone, in the dtype of the logits.
    """

    needs: frozenset[str]

    def __call__(self, batch: LossBatch) -> Tensor:
        """The loss of each row, which depends on no other row.

        Args:
            batch ([`LossBatch`]): What is needed.

        Returns:
            `Tensor`: float32 `[rows]`, or `[parts, rows]` for several that are to be added up in this order.
        """
        ...


def row_means(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of each row over the positions that count.

    Position `t` predicts token `t + 1`, and counts if that token is in the mask; so the last position, whose token is not
    in the row, counts only without a mask. A row without such a token has the mean 0.

    Args:
        values (`Tensor`): `[rows, length]`, or `[rows, length - 1]` without the last position.
        mask (`Tensor` or `None`): bool `[rows, length]`, of tokens.

    Returns:
        `Tensor`: `[rows]`.
    """
    if mask is None:
        return values.mean(-1)
    counted = mask[:, 1:].to(values)
    return (values[:, : counted.shape[1]] * counted).sum(-1) / counted.sum(-1).clamp(min=1)


class Distillation:
    """`kd`: the mean over all tokens of `KL(dense || cut)`, in nats."""

    needs = frozenset({LOGITS, TEACHER_LOGITS})
    keeps_gradient = True

    def __call__(self, batch: LossBatch) -> Tensor:
        assert batch.logits is not None and batch.teacher_logits is not None
        return row_means(kl_divergence(batch.teacher_logits, batch.logits), batch.mask)


class JensenShannon:
    """`jsd`: the mean over all tokens of the Jensen-Shannon divergence between the dense model and the cut one, in nats.

    For text that the cut model writes itself (`on_policy.py`): where it is sure of what the dense model would hardly say,
    the KL of the former from the latter has no bound, and a few tokens are the whole loss. On the dense model's 100 most
    likely tokens, the others as one (generalized knowledge distillation, arXiv 2306.13649, with the cut of ShortOPD,
    arXiv 2607.13124).
    """

    needs = frozenset({LOGITS, TEACHER_LOGITS})

    def __call__(self, batch: LossBatch) -> Tensor:
        assert batch.logits is not None and batch.teacher_logits is not None
        divergence = jensen_shannon_divergence(batch.teacher_logits, batch.logits, _TOP)
        return row_means(divergence, batch.mask)


class CrossEntropy:
    """`ce`: the mean cross-entropy of the next token, in nats."""

    needs = frozenset({LOGITS})

    def __call__(self, batch: LossBatch) -> Tensor:
        assert batch.logits is not None
        return row_means(next_token_cross_entropy(batch.logits, batch.tokens), batch.mask)


class HiddenStates:
    """`hidden`: the squared distance of each token's state from the dense model's, over the square of the latter's length: the mean of
    that of the states as they are and that behind the norm which reads them first.

    They go on as they are, but of some models' states a few channels are nearly all, which the norms make small (Gemma 3:
    `docs/recovery_lab_notes.md`, "A second real model"). Without the division the few states that are a hundred times as long as
    the others (that of a row's first token, as a rule) would be nearly all of the sum.

    Averaged over the layers that are compared, each of which is a part.
    """

    needs = frozenset({STATES})

    def __call__(self, batch: LossBatch) -> Tensor:
        assert batch.states is not None and batch.targets is not None
        parts = []
        for index, target in batch.targets.items():
            states = batch.states[index].float()
            target = target.detach().to(states)
            norm = (batch.norms or {}).get(index)
            error = relative_distance(states, target)
            if norm is not None:
                error = (error + relative_distance(norm(states), norm(target))) / 2
            mask = None if batch.mask is None else batch.mask.to(states.device)
            parts.append((row_means(error, mask) / len(batch.targets)).to(batch.tokens.device))
        return torch.stack(parts)


def relative_distance(states: Tensor, targets: Tensor) -> Tensor:
    """The squared distance of each state from its target, over the square of the latter's length: `[rows, length]`."""
    # a state of zeros is nobody's; it must not make NaN of the rest
    length = targets.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (states - targets).square().sum(-1) / length


def weighted_losses(weights: Mapping[str, float]) -> dict[str, tuple[float, Loss]]:
    """The losses that have a weight, in the registry's order, in which they are added up.

    Args:
        weights (`dict[str, float]`): By name, at least 0.

    Raises:
        ConfigurationError: If there is no such loss, or it needs something that there is not.
    """
    used = {name: weight for name, weight in weights.items() if weight}
    order = {name: place for place, name in enumerate(LOSSES)}
    found: dict[str, tuple[float, Loss]] = {}
    for name in sorted(used, key=lambda name: order.get(name, len(order))):
        loss = LOSSES.get(name)()
        if not set(loss.needs) <= set(NEEDS):
            rule = f"a loss may need {', '.join(NEEDS)}"
            raise ConfigurationError.of(f"{name}.needs", sorted(loss.needs), rule, "Ask for these only")
        found[name] = used[name], loss
    return found


def needs_of(weights: Mapping[str, float]) -> frozenset[str]:
    """What the losses that have a weight need together."""
    return frozenset().union(*(loss.needs for _, loss in weighted_losses(weights).values()))
