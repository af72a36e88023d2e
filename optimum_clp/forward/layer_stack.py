"""Decoder layers that are partly open, skipped, or fed from a cache, for as long as a `with` block lasts.

All of it is hooks and instance attributes on the caller's model, and all of it comes off at the end of the block, also
after an exception. Weights are never touched.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..architecture.lookup import decoder_layers, find_architecture
from .hooks import hand_on, hooked, mixed_with_input, output_length, output_lengths, replaced_forward, replaced_output


class LayerStack:
    """A model's decoder layers, and how a forward pass is started in the middle of them.

    Args:
        model (`PreTrainedModel`): Not changed beyond the length of a `with` block.
        run (`bool`): See at once what each layer returns, in a forward pass of one token. Without it what they return is
            learnt by [`~LayerStack.note`], since such a pass reads every weight.

    Attributes:
        layers (`nn.ModuleList`): The decoder layers.
    """

    def __init__(self, model: PreTrainedModel, *, run: bool = True):
        self.layers = decoder_layers(model)
        self._threads_state = find_architecture(model.config).threads_state
        self._output_lengths: dict[int, int | None] = {}
        if run or self._threads_state:
            self._output_lengths |= enumerate(output_lengths(model))
        self._takes_use_cache = "use_cache" in inspect.signature(model.forward).parameters

    @property
    def layer_by_layer(self) -> bool:
        """Whether layers hand on hidden states alone, so that all rows can run through one before any runs through the next."""
        return not self._threads_state

    def note(self, index: int, output: Any) -> None:
        """Learn what a layer returns."""
        self._output_lengths[index] = output_length(output)

    def output_length(self, index: int) -> int | None:
        """What a layer that has run returns: `None` for a tensor, the length of a tuple otherwise."""
        return self._output_lengths[index]

    def __len__(self) -> int:
        return len(self.layers)

    @contextmanager
    def resumed(self, first: int, hidden: Tensor) -> Iterator[None]:
        """Run the model from layer `first` on: the layers below are not computed, and `hidden` enters layer `first`.

        The model's own forward still does everything around the layers (masks, rotary embedding, final norm, head), so
        this holds for every architecture. With `first = len(layers)` only norm and head run. Skipping the segment
        `[s, t)` for inputs that are known is `resumed(t, hidden_that_entered_s)`.

        Where layers hand later ones more than hidden states (shared keys and values), the layers below are computed
        for that, and only their hidden states are thrown away.

        Args:
            first (`int`): First layer that runs, in [1, len(layers)]; with 0 nothing is skipped and `hidden` is not used.
            hidden (`Tensor`): `[batch, length, hidden]`.
        """
        with ExitStack() as stack:
            if self._threads_state and 0 < first < len(self.layers):
                stack.enter_context(replaced_output(self.layers[first - 1], hidden))
            else:
                for index in range(first):
                    forward = hand_on(self._output_lengths[index], hidden if index == first - 1 else None)
                    stack.enter_context(replaced_forward(self.layers[index], forward))
            yield

    def entry(self, gate: Sequence[float]) -> tuple[int, int]:
        """Where a forward pass under a gate can begin, given the dense model's hidden states.

        Args:
            gate (`Sequence[float]`): Gate of each layer, in [0, 1].

        Returns:
            `tuple[int, int]`: The first layer that runs, and the layer whose input in the dense model it is given. The
            layers before the second number are open, those from there to the first are closed.
        """
        source = next((i for i, value in enumerate(gate) if value != 1), len(gate))
        first = next((i for i in range(source, len(gate)) if gate[i] != 0), len(gate))
        return first, source

    def layers_run(self, gate: Sequence[float]) -> list[int]:
        """The layers that [`~LayerStack.gated`] computes."""
        if self._threads_state:
            return list(range(len(gate)))
        first, _ = self.entry(gate)
        return [i for i in range(first, len(gate)) if gate[i] != 0]

    @contextmanager
    def gated(self, gate: Sequence[float], hidden: Tensor) -> Iterator[None]:
        """Run the model under a gate, from the first layer that is not open in it.

        Every layer's output is mixed with its input: `gate * layer(x) + (1 - gate) * x`, to the last bit, but open
        layers before the first that is not are not computed again, and closed layers are not computed at all.

        Args:
            gate (`Sequence[float]`): Gate of each layer, in [0, 1].
            hidden (`Tensor`): `[batch, length, hidden]`: what the dense model gives to the second layer of
                [`~LayerStack.entry`].
        """
        first, _ = self.entry(gate)
        with ExitStack() as stack:
            if first > 0:
                stack.enter_context(self.resumed(first, hidden))
            for index in range(first, len(gate)):
                if gate[index] == 0 and not self._threads_state:
                    stack.enter_context(replaced_forward(self.layers[index], hand_on(self._output_lengths[index])))
                elif gate[index] != 1:
                    stack.enter_context(hooked(after=[(self.layers[index], mixed_with_input(gate[index]))]))
            yield

    @contextmanager
    def head(self, model: PreTrainedModel) -> Iterator[Callable[[Tensor], Tensor]]:
        """The final norm and the head alone, as the model's own forward computes them.

        Nothing behind the last layer looks at a token's neighbours or at its position, so any piece of a batch can be
        given: the logits of many tokens need never exist at once.

        Yields:
            `Callable`: Takes hidden states `[rows, length, hidden]` that leave the last layer, gives logits
            `[rows, length, vocab]`.
        """
        given: list[Tensor] = []

        def last(*args: Any, **kwargs: Any) -> Any:
            return hand_on(self._output_lengths[len(self.layers) - 1], given[0])(*args, **kwargs)

        def logits(hidden: Tensor) -> Tensor:
            given[:] = [hidden]
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=model.device)
            options = {"use_cache": False} if self._takes_use_cache else {}
            try:
                return model(input_ids=ids, **options).logits
            finally:
                given.clear()

        with ExitStack() as stack:
            for index, layer in enumerate(self.layers[:-1]):
                stack.enter_context(replaced_forward(layer, hand_on(self._output_lengths[index])))
            stack.enter_context(replaced_forward(self.layers[-1], last))
            yield logits
