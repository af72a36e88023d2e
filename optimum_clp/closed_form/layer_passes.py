"""Passes of a cut model through one layer at a time, from what enters it to what leaves it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..forward.dense_outputs import StateStore
from ..forward.hooks import recorded_inputs, recorded_outputs, run_without_head, stopped_before
from ..forward.layer_stack import LayerStack


class LayerPasses:
    """Passes over the rows of one split, through one layer; the ones below are not computed.

    Args:
        model (`PreTrainedModel`): The cut model.
        tokens (`Tensor`): int64 `[rows, length]`.
        first (`int`): The layer at which passes begin.
        inputs (`Tensor`): What enters it, `[rows, length, hidden]`; not changed.
        targets (`dict[int, Tensor]`): What should leave each layer that passes go through, of the same shape.
        batch_size (`int`): Rows in one pass.
        store ([`StateStore`]): Where what enters later layers lies.

    Attributes:
        stack ([`LayerStack`]): Of the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        first: int,
        inputs: Tensor,
        targets: Mapping[int, Tensor],
        batch_size: int,
        store: StateStore,
    ):
        self.model, self.tokens, self.first = model, tokens, first
        self.inputs, self.targets = inputs, targets
        self.batch_size, self.store = batch_size, store
        self.stack = LayerStack(model)
        self._owns_inputs = False

    def begin_at(self, index: int) -> None:
        """Let passes begin at a layer, with what enters it now that the layers below are as they are."""
        if index == self.first:
            return
        if not self._owns_inputs:
            # what was given is still needed when the endpoints are tuned
            own = self.store.allocate(self.inputs.shape, self.inputs.dtype)
            self.inputs, self._owns_inputs = own.copy_(self.inputs), True
        layer = self.stack.layers[index]
        for rows in self._rows():
            with recorded_inputs(self.stack.layers, [index]) as found, stopped_before(layer):
                self._forward(rows)
            self.inputs[rows] = found[index].cpu()
        self.first = index

    def run(self, index: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What enters and what leaves a layer, `[batch, length, hidden]`."""
        layers, behind = self.stack.layers, index + 1
        with (
            recorded_inputs(layers, [index]) as entered,
            recorded_outputs(layers, [index]) as left,
            stopped_before(layers[behind]) if behind < len(layers) else nullcontext(),
        ):
            self._forward(rows)
        return entered[index], left[index]

    def batches(self, index: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What enters and what leaves a layer, and what should leave it, batch by batch."""
        for rows in self._rows():
            entered, left = self.run(index, rows)
            yield entered, left, self.targets[index][rows].to(left.device)

    def _rows(self) -> Sequence[Tensor]:
        return torch.arange(len(self.tokens)).split(self.batch_size)

    def _forward(self, rows: Tensor) -> None:
        with self.stack.resumed(self.first, self.inputs[rows].to(self.model.device)):
            run_without_head(self.model, self.tokens[rows])
