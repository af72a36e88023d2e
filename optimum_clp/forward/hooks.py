"""Hooks and replaced forwards that last as long as a `with` block.

All of it is put on the caller's model, and all of it comes off at the end of the block, also after an exception. Weights
are never touched."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architecture.lookup import decoder_layers


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

    with ExitStack() as stack:
        for layer, value in zip(layers, gate, strict=True):
            stack.callback(layer.register_forward_hook(lerp_hook(value), with_kwargs=True).remove)
        yield


def lerp_hook(value: Tensor):
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        hidden = layer_hidden(output)
        before = layer_input(args, kwargs).to(hidden)
        return _with_hidden(output, torch.lerp(before, hidden, value.to(hidden.device, hidden.dtype)))

    return hook


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


@contextmanager
def replaced_input(layer: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Let `hidden`, `[batch, length, hidden]`, enter a layer, whatever the layers below or the embedding give."""

    def replace(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        value = hidden.to(layer_input(args, kwargs).device)
        return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": value})

    handle = layer.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def run_without_head(model: PreTrainedModel, tokens: Tensor, attention_mask: Tensor | None = None) -> None:
    """Run a model for what hooks see; logits, a vocabulary wide, are not computed.

    Args:
        model (`PreTrainedModel`): In whatever mode it is.
        tokens (`Tensor`): int64 `[rows, length]`.
        attention_mask (`Tensor`, *optional*): int64 `[rows, length]`, 0 where there is padding.
    """
    base = model.base_model
    # OpenAI GPT takes no use_cache in transformers 4
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
    if attention_mask is not None:
        options["attention_mask"] = attention_mask.to(model.device)
    base(input_ids=tokens.to(model.device), **options)


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


def replacing_output(hidden: Tensor):
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
