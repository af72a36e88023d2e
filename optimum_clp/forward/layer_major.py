"""Layer-major passes: all rows through one layer, then all of them through the next.

A plain pass takes a few rows through all layers, so every layer's weights are needed again for the next rows. Where memory does not
hold them they are read again each time. Here the weights are read once, whatever the number of rows, and what is kept
between two layers are the rows' hidden states: in main memory, and on disk beyond a limit.

Many passes share one reading. Under a gate ([`LayerStack`]) a pass that is the dense model's up to a layer takes over its states there,
waits while its layers are closed, and joins in again behind them: the candidates of a search cost their arithmetic, and no
reading of their own.

The arithmetic is that of [`LayerStack.resumed`]: the model's own forward makes everything around the layers, for each layer anew, and
the layer is called with it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..mapped_weights import FileStamps, MappedWeights
from ..out_of_memory import Halving
from ..progress import progress_bar
from .hooks import (
    evaluation_mode,
    hand_on,
    layer_hidden,
    layer_input,
    mixed,
    recorded_arguments,
    replaced_forward,
    run_without_head,
    stopped_before,
)
from .layer_stack import LayerStack

BATCH_SETTINGS = "search.batch_size or tuning.batch_size"
"""What decides how many rows run together."""

Allocate = Callable[[Sequence[int], torch.dtype], Tensor]
"""Makes an uninitialised tensor on the CPU; see [`StateStore`]."""


@dataclass(frozen=True)
class Residence:
    """How much of a model whose weights lie in files may be in memory at one time.

    Args:
        layers (`int`): Layers whose weights are there together, at least 1.
        state_memory (`float`): Bytes of hidden states in main memory, between two layers.
        work_memory (`float`): Bytes for what exists while a batch is computed and measured.
        folder (`Path` or `None`): Where the other states lie; `None` keeps all of them in memory.
    """

    layers: int = 1
    state_memory: float = math.inf
    work_memory: float = math.inf
    folder: Path | None = None


@dataclass
class _Stream:
    """Rows on their way through the layers under one gate."""

    gate: Sequence[float]
    source: int
    states: Tensor | None = field(default=None, init=False)


class LayerMajorPasses:
    """Passes of one model over some rows, layer by layer.

    Args:
        model (`PreTrainedModel`): In whatever mode it is; not changed.
        stack ([`LayerStack`]): Of the model; it learns what each layer returns.
        tokens (`Tensor`): int64 `[rows, length]`.
        mask (`Tensor` or `None`): int64 `[rows, length]`, 0 where there is padding.
        batches (`Sequence[Tensor]`): Rows that run together, int64.
        residence ([`Residence`]): How many layers are in memory together.
        allocate (`Callable`): Where states between the layers lie: [`StateStore.allocate`].
        description (`str`): What the progress bar says, which counts layers.
        quiet (`bool`): No progress bar.
        arrived (`Callable`, *optional*): Called with a layer's number, the numbers of some rows and the dense model's hidden states
            `[rows, length, hidden]` that enter it; the number of layers stands for what leaves the last one. Layers come in order, and all
            rows of one before those of the next group.
        lengths (`Sequence[int]`, *optional*): Tokens of each batch, of which the rows' first ones are taken; all of them if not given. What is
            kept of a row beyond its batch's length is not written to.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stack: LayerStack,
        tokens: Tensor,
        mask: Tensor | None,
        batches: Sequence[Tensor],
        *,
        residence: Residence,
        allocate: Allocate,
        description: str,
        quiet: bool = False,
        arrived: Callable[[int, Tensor, Tensor], None] | None = None,
        lengths: Sequence[int] | None = None,
    ):
        if not stack.layer_by_layer:
            raise ValueError("layers that hand on more than hidden states cannot run apart")
        self.model, self.stack, self.tokens, self.mask = model, stack, tokens, mask
        self.batches, self.residence, self.allocate = batches, residence, allocate
        self.description, self.quiet = description, quiet
        self.lengths = [tokens.shape[1]] * len(batches) if lengths is None else lengths
        self.arrived = arrived or (lambda index, rows, state: None)
        self.kept: dict[int, Tensor] = {}

    def run(self, gates: Sequence[Sequence[float]] = (), keep: Iterable[int] = ()) -> list[Tensor]:
        """Take all rows through all layers, once for the dense model and once under each gate, with one reading of the weights.

        Args:
            gates (`Sequence[Sequence[float]]`): One number in [0, 1] for each layer.
            keep (`Iterable[int]`): Layers whose inputs in the dense model go to `kept`, `[rows, length, hidden]`; the number of
                layers stands for what leaves the last one, which is always there.

        Returns:
            `list[Tensor]`: What leaves the last layer under each gate, `[rows, length, hidden]`, the model's dtype, on the CPU.

        Raises:
            ModelError: If a file of the weights is written to meanwhile.
        """
        depth = len(self.stack)
        dense = _Stream((1.0,) * depth, 0)
        streams = [dense, *(_Stream(gate, self.stack.entry(gate)[1]) for gate in gates)]
        wanted, weights = {*keep, depth}, MappedWeights()
        stamps = FileStamps(weights.files_of(self.model))
        self.kept = {}
        halving = Halving(self.description, BATCH_SETTINGS)
        with (
            torch.no_grad(),
            evaluation_mode(self.model),
            progress_bar(depth, self.description, self.quiet) as bar,
        ):
            for first in range(0, depth, self.residence.layers):
                group = range(first, min(depth, first + self.residence.layers))
                for rows, length in zip(self.batches, self.lengths, strict=True):
                    run = partial(self._through, group, length=length, streams=streams, wanted=wanted)
                    halving.over(rows, run)
                for index in group:
                    weights.let_go(self.stack.layers[index].parameters())
                stamps.check()
                bar.update(len(group))
        final = self.kept[depth]
        return [final if stream.source == depth else _there(stream.states) for stream in streams[1:]]

    def _through(self, group: range, rows: Tensor, length: int, streams: list[_Stream], wanted: set[int]) -> None:
        """Some rows through some neighbouring layers, on every way."""
        dense, depth = streams[0], len(self.stack)
        began = [None if stream.states is None else stream.states[rows, :length] for stream in streams]
        tokens, mask = self.tokens[rows, :length], None if self.mask is None else self.mask[rows, :length]
        here: list[Tensor | None] = list(began)
        for index in group:
            args, kwargs = layer_arguments(self.model, self.stack, index, tokens, mask)
            entered = layer_input(args, kwargs)
            if index == 0:
                here[0] = entered
            entering = here[0]
            assert entering is not None
            self.arrived(index, rows, entering)
            if index in wanted:
                self._keep(index, rows, entering)
            for number, stream in enumerate(streams):
                if stream.source == index:
                    here[number] = entering
                state = here[number]
                if state is not None and stream.gate[index] != 0:
                    left = called_with(self.stack, index, args, kwargs, state.to(entered.device))
                    openness = stream.gate[index]
                    here[number] = left if openness == 1 else mixed(state.to(entered.device), left, openness)
        for number, stream in enumerate(streams):
            state = here[number]
            if state is None or state is began[number]:
                continue
            if stream is dense and group.stop == depth:
                self.arrived(depth, rows, state)
                self._keep(depth, rows, state)
                continue
            if stream.states is None:
                stream.states = self._allocated(state)
            stream.states[rows, :length] = state.cpu()

    def _keep(self, index: int, rows: Tensor, state: Tensor) -> None:
        if index not in self.kept:
            self.kept[index] = self._allocated(state)
        self.kept[index][rows, : state.shape[1]] = state.cpu()

    def _allocated(self, state: Tensor) -> Tensor:
        return self.allocate((*self.tokens.shape, *state.shape[2:]), state.dtype)


def layer_arguments(
    model: PreTrainedModel, stack: LayerStack, index: int, tokens: Tensor, mask: Tensor | None = None
) -> tuple[tuple, dict[str, Any]]:
    """What a model calls a layer with for some rows, but for the hidden states; no layer is computed for it.

    Args:
        model (`PreTrainedModel`): Its forward makes masks and positions.
        stack ([`LayerStack`]): Of the model; knows what the layers below return.
        index (`int`): The layer.
        tokens (`Tensor`): int64 `[rows, length]`.
        mask (`Tensor`, *optional*): int64 `[rows, length]`, 0 where there is padding.

    Returns:
        `tuple[tuple, dict[str, Any]]`: Positional and named arguments.
    """
    layer = stack.layers[index]
    with ExitStack() as block:
        for below in range(index):
            block.enter_context(replaced_forward(stack.layers[below], hand_on(stack.output_length(below))))
        found = block.enter_context(recorded_arguments(layer))
        with stopped_before(layer):
            run_without_head(model, tokens, mask)
    return found[0]


def called_with(stack: LayerStack, index: int, args: tuple, kwargs: dict[str, Any], hidden: Tensor) -> Tensor:
    """What leaves a layer, `[rows, length, hidden]`, that is called with [`layer_arguments`] and other hidden states."""
    given = ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})
    output = stack.layers[index](*given[0], **given[1])
    stack.note(index, output)
    return layer_hidden(output)


def _there(states: Tensor | None) -> Tensor:
    assert states is not None
    return states
