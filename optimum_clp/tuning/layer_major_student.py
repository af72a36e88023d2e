"""The student of a model that memory does not hold: a step's rows go through one layer after the other, forward and back.

Autograd keeps what leaves each layer, and computes the layer again when its gradient is wanted, some rows at a time; head and losses
likewise. So a step reads each layer above the first endpoint twice, whatever the number of its rows, and holds one layer's
activations of a few rows.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..architecture.lookup import text_config
from ..forward.layer_major import Residence, called_with, layer_arguments
from ..mapped_weights import FileStamps, MappedWeights
from .activations import layer_activations, logit_bytes
from .losses import LOGITS, STATES, TEACHER_LOGITS, Loss, LossBatch, weighted_losses
from .student import EndpointStudent, TeacherLogits


class LayerMajorStudent(EndpointStudent):
    """Trained modules of a model, and the loss as a function of them, layer by layer.

    The loss and its gradients are those of [`EndpointStudent`], up to the order in which numbers are added.

    Args:
        model, trained, first, weights, compared: As in [`EndpointStudent`].
        residence ([`Residence`]): How much may exist while rows are computed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trained: Iterable[nn.Module],
        first: int,
        weights: Mapping[str, float],
        compared: Iterable[int] = (),
        *,
        residence: Residence,
    ):
        super().__init__(model, trained, first, weights, compared)
        self.work_memory = residence.work_memory
        self._together: int | None = None
        self._most: float = math.inf
        self._mapped = MappedWeights()
        self._stamps = FileStamps(self._mapped.files_of(model))

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
        """As [`EndpointStudent.forward`]; the dense model's logits are asked for some rows at a time, best as a function of slices.

        Raises:
            ModelError: If a file of the weights was written to.
        """
        self._stamps.check()
        stack = self._around[1]
        losses = self.losses if weights is None else tuple(weighted_losses(weights).values())
        needs = frozenset().union(*(loss.needs for _, loss in losses))
        compared = self.compared if STATES in needs else ()
        last = len(stack) if LOGITS in needs else max(compared, default=self.first) + 1
        parts = self._parts(tokens, losses)
        states: dict[int, Tensor] = {}
        for index in range(self.first, last):
            hidden = self._through(index, tokens, hidden, parts)
            if index in compared:
                states[index] = hidden
        rows = [
            _Rows(
                tokens[part],
                None if mask is None else mask[part],
                {index: target[part] for index, target in targets.items()},
                _teacher_of(teacher_logits, part) if TEACHER_LOGITS in needs else None,
                losses,
                window,
            )
            for part in parts
        ]
        pieces = [{index: state[part] for index, state in states.items()} for part in parts]
        arguments = zip(rows, parts, pieces, strict=True)
        return torch.cat([self._kept(self._loss, row, hidden[part], piece) for row, part, piece in arguments])

    def halve(self) -> None:
        self._most = max(1, (self._together or 1) // 2)

    def _through(self, index: int, tokens: Tensor, hidden: Tensor, parts: list[slice]) -> Tensor:
        """All rows through one layer; its pages are given back behind them, on the way up and on the way down."""
        layer = self._around[1].layers[index]
        if hidden.requires_grad:
            # the gradient of what has entered is whole when the layer is done with
            hidden.register_hook(lambda gradient: self._let_go(layer))
        left = [self._kept(self._layer, index, tokens[part], hidden[part]) for part in parts]
        self._let_go(layer)
        return torch.cat(left)

    def _layer(self, index: int, tokens: Tensor, hidden: Tensor) -> Tensor:
        model, stack = self._around
        with torch.no_grad():
            args, kwargs = layer_arguments(model, stack, index, tokens)
        return called_with(stack, index, args, kwargs, hidden)

    def _loss(self, rows: "_Rows", hidden: Tensor, states: Mapping[int, Tensor]) -> Tensor:
        """The weighted loss of each of some rows, float32 `[rows]`."""
        model, stack = self._around
        needs = frozenset().union(*(loss.needs for _, loss in rows.losses))
        logits = None
        if LOGITS in needs:
            with stack.head(model) as head:
                logits = head(hidden if rows.window is None else hidden[:, rows.window])
        teacher = None if rows.teacher_logits is None else rows.teacher_logits()
        batch = LossBatch(rows.tokens, logits, teacher, states, rows.targets, rows.mask, self.norms)
        return self._total(batch.within(rows.window), rows.losses)

    @staticmethod
    def _kept(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """A function's result; what autograd needs of it is computed again, and not kept."""
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)

    def _let_go(self, layer: nn.Module) -> None:
        self._mapped.let_go(layer.parameters())

    def _parts(self, tokens: Tensor, losses: tuple[tuple[float, Loss], ...]) -> list[slice]:
        """Rows that are computed together: as many as memory holds beside what leaves the layers, at least one."""
        (rows, length), (model, stack) = tokens.shape, self._around
        config, itemsize = text_config(model.config), model.dtype.itemsize
        borders = (len(stack) - self.first) * tokens.numel() * config.hidden_size * itemsize
        layer = length * max(layer_activations(layer, itemsize, trained=True) for layer in stack.layers)
        head = logit_bytes(length, config.vocab_size, itemsize, [loss for _, loss in losses])
        together = (self.work_memory - borders) // max(layer, head)
        size = self._together = int(max(1, min(rows, together, self._most)))
        return [slice(start, min(rows, start + size)) for start in range(0, rows, size)]


@dataclass(frozen=True)
class _Rows:
    """Some rows, with what their loss needs beside the model's own states."""

    tokens: Tensor
    mask: Tensor | None
    targets: Mapping[int, Tensor]
    teacher_logits: Callable[[], Tensor] | None
    losses: tuple[tuple[float, Loss], ...]
    window: slice | None


def _teacher_of(logits: TeacherLogits, part: slice) -> Callable[[], Tensor]:
    assert logits is not None
    return (lambda: logits[part]) if isinstance(logits, Tensor) else (lambda: logits(part))
