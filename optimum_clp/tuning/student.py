"""The cut model as the training loop sees it: what is trained, and the loss of some rows.

Only the trained modules are submodules, so that a loop which wraps, shards, sends or saves "the model" touches nothing
frozen.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..forward.dense_outputs import DenseOutputs
from ..forward.hooks import layer_hidden, run_without_head, stopped_before
from ..forward.layer_stack import LayerStack
from ..forward.losses import kl_divergence, next_token_cross_entropy


@dataclass(frozen=True)
class TuningRows:
    """Rows of tokens with all that the dense model says about them.

    Args:
        outputs ([`DenseOutputs`]): The dense model's.
        inputs (`Tensor`): `[rows, length, hidden]`: what enters the first trained layer.
        targets (`dict[int, Tensor]`): For some layers of the cut model, what should leave them: the states that enter the
            next kept layer in the dense model.
        kinds (`Sequence[str]`): What kind of text each row is; empty if that does not matter.
    """

    outputs: DenseOutputs
    inputs: Tensor
    targets: Mapping[int, Tensor] = field(default_factory=dict)
    kinds: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.outputs.tokens)

    def batch(self, rows: Tensor, logits: bool) -> dict[str, Any]:
        """The arguments of [`EndpointStudent.forward`] for some rows; with or without the dense model's logits."""
        device = self.outputs.model.device
        return {
            "tokens": self.outputs.tokens[rows].to(device),
            "hidden": self.inputs[rows].to(device),
            "teacher_logits": self.outputs.logits(rows) if logits else None,
            "targets": {i: states[rows].to(device) for i, states in self.targets.items()},
        }


class EndpointStudent(nn.Module):
    """Trained modules of a model, and the loss as a function of them.

    Args:
        model (`PreTrainedModel`): The cut model, which holds `trained`.
        trained (`Iterable[nn.Module]`): The modules that are trained.
        first (`int`): The first layer that runs.
        weights (`dict[str, float]`): Of the losses `kd`, `ce`, `hidden`.
        scales (`dict[int, float]`): For `hidden`: the layers whose output is compared, with the mean squared deviation of
            their targets from the targets' mean.
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
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.scales = dict(scales or {}) if "hidden" in self.weights else {}

    @property
    def needs_teacher_logits(self) -> bool:
        """Whether the loss looks at the dense model's logits."""
        return "kd" in self.weights

    def forward(
        self, tokens: Tensor, hidden: Tensor, teacher_logits: Tensor | None, targets: Mapping[int, Tensor]
    ) -> Tensor:
        """The weighted loss of each row.

        `kd` is the mean over all tokens of `KL(dense || cut)`, `ce` the mean cross-entropy of the next token, both in
        nats; `hidden` is the share of the target states' variance that the cut model's states miss (1 - R^2), averaged
        over the compared layers.

        Args:
            tokens (`Tensor`): int64 `[batch, length]`.
            hidden (`Tensor`): `[batch, length, hidden]`: what enters the first layer that runs.
            teacher_logits (`Tensor` or `None`): `[batch, length, vocab]`; needed for `kd`.
            targets (`Mapping[int, Tensor]`): `[batch, length, hidden]` for each compared layer; needed for `hidden`.

        Returns:
            `Tensor`: float32 `[batch]`.
        """
        stack = self._around[1]
        with stack.resumed(self.first, hidden), _outputs(stack.layers, self.scales) as outputs:
            logits = self._logits(tokens)
        losses = torch.zeros(len(tokens), device=tokens.device)
        if logits is not None and teacher_logits is not None and "kd" in self.weights:
            losses = losses + self.weights["kd"] * kl_divergence(teacher_logits, logits).mean(-1)
        if logits is not None and "ce" in self.weights:
            losses = losses + self.weights["ce"] * next_token_cross_entropy(logits, tokens).mean(-1)
        for index, scale in self.scales.items():
            states = outputs[index].float()
            error = (states - targets[index].to(states)).square().mean((1, 2)) / (scale * len(self.scales))
            losses = losses + self.weights["hidden"] * error.to(losses.device)
        return losses

    def _logits(self, tokens: Tensor) -> Tensor | None:
        """Run the model; to the last compared layer only, and without logits, if no loss looks at these."""
        model, stack = self._around
        if self.weights.keys() - {"hidden"}:
            return model(input_ids=tokens, use_cache=False).logits
        behind = max(self.scales) + 1
        with stopped_before(stack.layers[behind]) if behind < len(stack) else nullcontext():
            run_without_head(model, tokens)
        return None


@contextmanager
def _outputs(layers: nn.ModuleList, indices: Mapping[int, float]) -> Iterator[dict[int, Tensor]]:
    """Collect what leaves some layers, with its gradient."""
    found: dict[int, Tensor] = {}

    def hook_for(index: int):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            found[index] = layer_hidden(output)

        return hook

    handles = [layers[index].register_forward_hook(hook_for(index)) for index in indices]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
