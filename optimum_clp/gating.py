"""Decoder layers that are partly open, skipped, or fed from a cache, for as long as a `with` block lasts.

All of it is hooks and instance attributes on the caller's model, and all of it comes off at the end of the block, also
after an exception. Weights are never touched.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architecture import decoder_layers, find_architecture


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout and skipped layers; every module's own mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def layer_hidden(output: Any) -> Tensor:
    """The hidden states in a decoder layer's output, which is a tensor, or a tuple or list that starts with it."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    return type(output)((hidden, *output[1:])) if isinstance(output, (tuple, list)) else hidden


def layer_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states in a decoder layer's arguments."""
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def gated(layers: nn.ModuleList, gate: Tensor) -> Iterator[None]:
    """Mix every layer's output with its input: `gate * layer(x) + (1 - gate) * x`.

    `torch.lerp` is exact at both ends: a gate of 1 leaves the model bit for bit as it is, a gate of 0 passes the input on
    unchanged (if the layer's output is finite).

    Args:
        layers (`nn.ModuleList`): The decoder layers.
        gate (`Tensor`): `[num_layers]`, values in [0, 1]; gradients flow to it.
    """

    def hook_for(value: Tensor):
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            hidden = layer_hidden(output)
            before = layer_input(args, kwargs).to(hidden)
            return _with_hidden(output, torch.lerp(before, hidden, value.to(hidden.device, hidden.dtype)))

        return hook

    with ExitStack() as stack:
        for layer, value in zip(layers, gate, strict=True):
            stack.callback(layer.register_forward_hook(hook_for(value), with_kwargs=True).remove)
        yield


@contextmanager
def recorded_inputs(layers: nn.ModuleList, indices: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the hidden states that enter some layers; index `len(layers)` stands for what leaves the last one.

    Yields:
        `dict[int, Tensor]`: Filled by each forward pass; `[batch, length, hidden]`, detached, the model's dtype.
    """
    found: dict[int, Tensor] = {}

    def hook_for(index: int):
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found[index] = layer_input(args, kwargs).detach()

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            found[index] = layer_hidden(output).detach()

        if index == len(layers):
            return layers[-1].register_forward_hook(after)
        return layers[index].register_forward_pre_hook(before, with_kwargs=True)

    with ExitStack() as stack:
        for index in indices:
            stack.callback(hook_for(index).remove)
        yield found


class _Reached(Exception):
    """Ends a forward pass whose remaining layers are not needed."""


@contextmanager
def stopped_before(layer: nn.Module) -> Iterator[None]:
    """End the block's forward pass when it reaches `layer`; what follows in the block is not run.

    Hooks that were put on `layer` before see its input; see [`recorded_inputs`].
    """

    def stop(module: nn.Module, args: tuple) -> None:
        raise _Reached

    handle = layer.register_forward_pre_hook(stop)
    try:
        yield
    except _Reached:
        pass
    finally:
        handle.remove()


def run_without_head(model: PreTrainedModel, tokens: Tensor) -> None:
    """Run a model for what hooks see; logits, a vocabulary wide, are not computed.

    Args:
        model (`PreTrainedModel`): In whatever mode it is.
        tokens (`Tensor`): int64 `[rows, length]`.
    """
    base = model.base_model
    # OpenAI GPT takes no use_cache in transformers 4
    cached = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
    base(input_ids=tokens.to(model.device), **cached)


def layer_forms(model: PreTrainedModel) -> tuple[int | None, ...]:
    """What each decoder layer returns: `None` for a tensor, the length of a tuple otherwise.

    It differs between architectures and between versions of transformers, so it is seen in a forward pass of one token.
    """
    layers = decoder_layers(model)
    forms: dict[int, int | None] = {}

    def hook_for(index: int):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            forms[index] = len(output) if isinstance(output, (tuple, list)) else None

        return hook

    with torch.no_grad(), evaluation_mode(model), ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(hook_for(index)).remove)
        run_without_head(model, torch.zeros(1, 1, dtype=torch.long))
    return tuple(forms[index] for index in range(len(layers)))


class LayerStack:
    """A model's decoder layers, and how a forward pass is started in the middle of them.

    Args:
        model (`PreTrainedModel`): Not changed beyond the length of a `with` block.

    Attributes:
        layers (`nn.ModuleList`): The decoder layers.
    """

    def __init__(self, model: PreTrainedModel):
        self.layers = decoder_layers(model)
        self._forms = layer_forms(model)
        self._threads_state = find_architecture(model.config).threads_state

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
                stack.callback(self.layers[first - 1].register_forward_hook(_replace_output(hidden)).remove)
            else:
                for index in range(first):
                    forward = hand_on(self._forms[index], hidden if index == first - 1 else None)
                    stack.enter_context(replaced_forward(self.layers[index], forward))
            yield


def _replace_output(hidden: Tensor):
    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        return _with_hidden(output, hidden.to(layer_hidden(output).device))

    return hook


def hand_on(form: int | None, value: Tensor | None = None):
    """A layer's forward that computes nothing.

    Args:
        form (`int` or `None`): What the layer returns, from [`layer_forms`].
        value (`Tensor`, *optional*): What it hands on; its input if not given.

    Returns:
        `Callable`: Takes what the layer takes.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = layer_input(args, kwargs)
        hidden = hidden if value is None else value.to(hidden.device)
        return hidden if form is None else (hidden, *[None] * (form - 1))

    return forward


@contextmanager
def replaced_forward(layer: nn.Module, forward) -> Iterator[None]:
    """Call `forward` instead of the layer's own until the block ends."""
    # accelerate keeps its own forward in the instance's dict; put back exactly what was there
    missing = object()
    before = layer.__dict__.get("forward", missing)
    layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is missing:
            del layer.__dict__["forward"]
        else:
            layer.__dict__["forward"] = before
