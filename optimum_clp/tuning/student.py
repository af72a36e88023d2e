"""The cut model as the training loop sees it: what is trained, and the loss of some rows.

Only the trained modules are submodules, so that a loop which wraps, shards, sends or saves "the model" touches nothing
frozen.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..forward.head_window import logits_within
from ..forward.hooks import recorded_outputs, run_without_head, stopped_before
from ..forward.layer_stack import LayerStack
from ..forward.reading_norm import reading_norms
from ..forward.streamed_layers import recomputed
from .losses import LOGITS, STATES, Loss, LossBatch, weighted_losses

TeacherLogits = Tensor | Callable[[slice], Tensor] | None
"""The dense model's logits of some rows, `[rows, length, vocab]`, or a function that makes those of a part of them."""


class EndpointStudent(nn.Module):
    """Trained modules of a model, and the loss as a function of them.

    Args:
        model (`PreTrainedModel`): The cut model, which holds `trained`.
        trained (`Iterable[nn.Module]`): The modules that are trained.
        first (`int`): The first layer that runs.
        weights (`dict[str, float]`): Of the losses, by name, where a call names no others.
        compared (`Iterable[int]`): For losses that look at hidden states: the layers whose output they are given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trained: Iterable[nn.Module],
        first: int,
        weights: Mapping[str, float],
        compared: Iterable[int] = (),
    ):
        super().__init__()
        self.trained = nn.ModuleList(trained)
        # read by accelerate: what is one unit when weights are sharded
        self._no_split_modules = getattr(model, "_no_split_modules", None)
        # in a tuple, or the frozen rest would be a submodule
        self._around = (model, LayerStack(model))
        self.first = first
        self.losses = tuple(weighted_losses(weights).values())
        self.compared = tuple(compared)
        # in a mapping they are no submodules
        self.norms: dict[int, nn.Module] = {}

    def forward(
        self,
        tokens: Tensor,
        hidden: Tensor,
        teacher_logits: TeacherLogits,
        targets: Mapping[int, Tensor],
        weights: Mapping[str, float] | None = None,
        mask: Tensor | None = None,
        window: slice | None = None,
    ) -> Tensor:
        """The weighted loss of each row.

        Args:
            tokens (`Tensor`): int64 `[batch, length]`.
            hidden (`Tensor`): `[batch, length, hidden]`: what enters the first layer that runs.
            teacher_logits (`Tensor`, `Callable` or `None`): `[batch, length, vocab]`, of the window alone if there is one; for losses
                that look at the dense model's logits.
            targets (`Mapping[int, Tensor]`): `[batch, length, hidden]` for each layer of `compared`.
            weights (`dict[str, float]`, *optional*): Of the losses, instead of the student's own.
            mask (`Tensor` or `None`): bool `[batch, length]`: tokens that are to be learnt; `None` for all.
            window (`slice`, *optional*): Positions whose logits are looked at, as if the rows had no others, though what is before them is
                read; not for losses that look at hidden states.

        Returns:
            `Tensor`: float32 `[batch]`.
        """
        stack = self._around[1]
        losses = self.losses if weights is None else weighted_losses(weights).values()
        needs = frozenset().union(*(loss.needs for _, loss in losses))
        compared = self.compared if STATES in needs else ()
        with (
            recomputed(stack.layers[self.first :]),
            stack.resumed(self.first, hidden),
            recorded_outputs(stack.layers, compared) as states,
        ):
            logits = self._logits(tokens, LOGITS in needs, compared, window)
        teacher = teacher_logits(slice(None)) if callable(teacher_logits) else teacher_logits
        batch = LossBatch(tokens, logits, teacher, states, targets, mask, self.norms)
        return self._total(batch.within(window), losses)

    def compare_behind_norms(self, states: Mapping[int, Tensor]) -> None:
        """Let hidden states be compared behind the norms that read them, too, from now on.

        Args:
            states (`dict[int, Tensor]`): For each layer of `compared`: some states that should leave it, `[rows, length, hidden]`.
        """
        found = reading_norms(*self._around, {index + 1: states[index] for index in self.compared})
        self.norms = {index - 1: norm for index, norm in found.items()}

    def halve(self) -> None:
        """Compute fewer rows at a time than before, where it is the student that says how many."""

    @staticmethod
    def _total(batch: LossBatch, losses: Iterable[tuple[float, Loss]]) -> Tensor:
        """The weighted loss of each row, float32 `[rows]`."""
        rows = len(batch.tokens)
        total = torch.zeros(rows, device=batch.tokens.device)
        for weight, loss in losses:
            for part in loss(batch.only(loss.needs)).reshape(-1, rows):
                total = total + weight * part
        return total

    def _logits(self, tokens: Tensor, needed: bool, compared: Iterable[int], window: slice | None) -> Tensor | None:
        """Run the model; to the last layer that is looked at only, and without logits, if no loss needs these."""
        model, stack = self._around
        if needed:
            return logits_within(model, tokens, window)
        behind = max(compared, default=-1) + 1
        with stopped_before(stack.layers[behind]) if behind < len(stack) else nullcontext():
            run_without_head(model, tokens)
        return None
