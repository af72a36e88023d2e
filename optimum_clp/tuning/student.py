"""The cut model as the training loop sees it: what is trained, and the loss of some rows.

Only the trained modules are submodules, so that a loop which wraps, shards, sends or saves "the model" touches nothing
frozen.
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..forward.hooks import recorded_outputs, run_without_head, stopped_before
from ..forward.layer_stack import LayerStack
from .losses import LOGITS, STATES, TEACHER_LOGITS, LossBatch, needs_of, weighted_losses


class EndpointStudent(nn.Module):
    """Trained modules of a model, and the loss as a function of them.

    Args:
        model (`PreTrainedModel`): The cut model, which holds `trained`.
        trained (`Iterable[nn.Module]`): The modules that are trained.
        first (`int`): The first layer that runs.
        weights (`dict[str, float]`): Of the losses, by name.
        scales (`dict[int, float]`): For losses that look at hidden states: the layers whose output they are given, with
            the mean squared deviation of their targets from the targets' mean.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trained: Iterable[nn.Module],
        first: int,
        weights: Mapping[str, float],
        scales: Mapping[int, float] | None = None,
    ):
        super().__init__()
        self.trained = nn.ModuleList(trained)
        # read by accelerate: what is one unit when weights are sharded
        self._no_split_modules = getattr(model, "_no_split_modules", None)
        # in a tuple, or the frozen rest would be a submodule
        self._around = (model, LayerStack(model))
        self.first = first
        self.losses = tuple(weighted_losses(weights).values())
        self.needs = needs_of(weights)
        self.scales = dict(scales or {}) if STATES in self.needs else {}

    @property
    def needs_teacher_logits(self) -> bool:
        """Whether a loss looks at the dense model's logits."""
        return TEACHER_LOGITS in self.needs

    def forward(
        self,
        tokens: Tensor,
        hidden: Tensor,
        teacher_logits: Tensor | None,
        targets: Mapping[int, Tensor],
        mask: Tensor | None = None,
    ) -> Tensor:
        """The weighted loss of each row.

        Args:
            tokens (`Tensor`): int64 `[batch, length]`.
            hidden (`Tensor`): `[batch, length, hidden]`: what enters the first layer that runs.
            teacher_logits (`Tensor` or `None`): `[batch, length, vocab]`; see [`~EndpointStudent.needs_teacher_logits`].
            targets (`Mapping[int, Tensor]`): `[batch, length, hidden]` for each layer of `scales`.
            mask (`Tensor` or `None`): bool `[batch, length]`: tokens that are to be learnt; `None` for all.

        Returns:
            `Tensor`: float32 `[batch]`.
        """
        stack = self._around[1]
        with stack.resumed(self.first, hidden), recorded_outputs(stack.layers, self.scales) as states:
            logits = self._logits(tokens)
        batch = LossBatch(tokens, logits, teacher_logits, states, targets, self.scales, mask)
        total = torch.zeros(len(tokens), device=tokens.device)
        for weight, loss in self.losses:
            for part in loss(batch.only(loss.needs)).reshape(-1, len(tokens)):
                total = total + weight * part
        return total

    def _logits(self, tokens: Tensor) -> Tensor | None:
        """Run the model; to the last layer that is looked at only, and without logits, if no loss needs these."""
        model, stack = self._around
        if LOGITS in self.needs:
            return model(input_ids=tokens, use_cache=False).logits
        behind = max(self.scales, default=-1) + 1
        with stopped_before(stack.layers[behind]) if behind < len(stack) else nullcontext():
            run_without_head(model, tokens)
        return None
