"""Hooks and replaced forwards that last as long as a `with` block.

All of it is put on the caller's model, and all of it comes off at the end of the block, also after an exception. Weights
are never touched.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architecture.lookup import decoder_layers
from ..mapped_weights import MappedWeights, tensors_of

BeforeForward = Callable[[nn.Module, tuple, dict[str, Any]], tuple[tuple, dict[str, Any]] | None]
"""`(module, args, kwargs)`; returns what enters instead, or `None`."""
AfterForward = Callable[[nn.Module, tuple, dict[str, Any], Any], Any]
"""`(module, args, kwargs, output)`; returns what leaves instead, or `None`."""


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Without dropout, skipped layers and compiled code; every module's own mode is put back, and what it has changed of
    itself while it ran (rotary frequencies that follow the length of the text). An ONNX file has no modes."""
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training, module._compiled_call_impl) for module in model.modules()]
    model.eval()
    for module, _, compiled in modes:
        if compiled is not None:
            module._compiled_call_impl = None
    try:
        with _own_state_kept(model):
            yield
    finally:
        for module, mode, compiled in modes:
            module.training = mode
            if compiled is not None:
                module._compiled_call_impl = compiled


@contextmanager
def _own_state_kept(model: nn.Module) -> Iterator[None]:
    """Put back what modules with buffers outside the checkpoint change of themselves in a forward pass, in place or not."""
    before = [
        (module, _public(module), dict(module._buffers), [(b, b.clone()) for b in computed_buffers(module).values()])
        for module in model.modules()
        if module._non_persistent_buffers_set
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, attributes, buffers, values in before:
                for name in _public(module).keys() - attributes.keys():
                    delattr(module, name)
                vars(module).update(attributes)
                module._buffers.clear()
                module._buffers.update(buffers)
                for buffer, value in values:
                    buffer.copy_(value)


def _public(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in ("forward", "training")}


def computed_buffers(module: nn.Module) -> dict[str, Tensor]:
    """A module's own float buffers that a checkpoint does not hold, and that its class computes: rotary frequencies."""
    names = module._non_persistent_buffers_set
    return {n: b for n, b in module._buffers.items() if n in names and b is not None and b.is_floating_point()}


@contextmanager
def at_rest(model: PreTrainedModel) -> Iterator[None]:
    """In evaluation mode, as if no long text had ever been read: some rotary embeddings keep the frequencies of the last one."""
    with evaluation_mode(model):
        if model.device.type != "meta" and follows_length(model):
            with torch.no_grad():
                run_without_head(model, torch.zeros(1, 1, dtype=torch.long))
        yield


def follows_length(model: nn.Module) -> bool:
    """Whether its rotary frequencies depend on how long the text is (`longrope`, dynamic scaling)."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else (kinds,)
        if any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds):
            return True
    return False


@contextmanager
def only_trainable(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Only the given parameters of a model require gradients until the block ends; gradients that they get are dropped."""
    chosen = {id(parameter) for parameter in parameters}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
            if id(parameter) in chosen:
                parameter.grad = None


def layer_hidden(output: Any) -> Tensor:
    """The hidden states in a decoder layer's output, which is a tensor, or a tuple or list that starts with it."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    return type(output)((hidden, *output[1:])) if isinstance(output, (tuple, list)) else hidden


def layer_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states in a decoder layer's arguments."""
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def hooked(
    before: Iterable[tuple[nn.Module, BeforeForward]] = (),
    after: Iterable[tuple[nn.Module, AfterForward]] = (),
    *,
    always_call: bool = False,
) -> Iterator[None]:
    """Hooks on modules until the block ends; each module may have several, which are called in this order.

    Args:
        before (`Iterable[tuple[nn.Module, Callable]]`): Called with `(module, args, kwargs)` before the module's forward;
            may return `(args, kwargs)` that enter it instead.
        after (`Iterable[tuple[nn.Module, Callable]]`): Called with `(module, args, kwargs, output)` after it; may return
            what leaves it instead.
        always_call (`bool`): Call those of `after` also when the forward has raised an exception.
    """
    with ExitStack() as stack:
        for module, enter in before:
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        for module, leave in after:
            handle = module.register_forward_hook(leave, with_kwargs=True, always_call=always_call)
            stack.callback(handle.remove)
        yield


@contextmanager
def let_go_behind(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let the weights of each module that lie in files go when its forward is done, until the block ends."""
    mapped = MappedWeights()

    def leave(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        mapped.let_go(tensors_of(module))

    with hooked(after=[(module, leave) for module in modules]):
        yield


def mixed_with_input(openness: float) -> AfterForward:
    """A hook for [`hooked`] that mixes a layer's output with its input: `openness * layer(x) + (1 - openness) * x`.

    `torch.lerp` is exact at both ends: 1 leaves the output bit for bit as it is, 0 passes the input on unchanged (if the
    output is finite).

    Args:
        openness (`float`): The layer's gate, in [0, 1].
    """

    def mix(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        return _with_hidden(output, mixed(layer_input(args, kwargs), layer_hidden(output), openness))

    return mix


def mixed(entered: Tensor, left: Tensor, openness: float) -> Tensor:
    """What enters a layer and what leaves it, mixed as [`mixed_with_input`] does it."""
    value = torch.tensor(openness, dtype=torch.float64)
    return torch.lerp(entered.to(left), left, value.to(left.device, left.dtype))


@contextmanager
def recorded_arguments(layer: nn.Module) -> Iterator[list[tuple[tuple, dict[str, Any]]]]:
    """Collect what a module is called with.

    Yields:
        `list`: Positional and keyword arguments of each call.
    """
    found: list[tuple[tuple, dict[str, Any]]] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))

    with hooked(before=[(layer, record)]):
        yield found


@contextmanager
def recorded_inputs(layers: nn.ModuleList, indices: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the hidden states that enter some layers; index `len(layers)` stands for what leaves the last one.

    Yields:
        `dict[int, Tensor]`: Filled by each forward pass; `[batch, length, hidden]`, detached, the model's dtype.
    """
    found: dict[int, Tensor] = {}

    def entering(index: int) -> BeforeForward:
        def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found[index] = layer_input(args, kwargs).detach()

        return record

    def last(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        found[len(layers)] = layer_hidden(output).detach()

    wanted = list(indices)
    before = [(layers[index], entering(index)) for index in wanted if index < len(layers)]
    after = [(layers[-1], last)] if len(layers) in wanted else []
    with hooked(before, after):
        yield found


@contextmanager
def recorded_outputs(layers: nn.ModuleList, indices: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the hidden states that leave some layers, with their gradient if there is one.

    Yields:
        `dict[int, Tensor]`: Filled by each forward pass; `[batch, length, hidden]`, the model's dtype.
    """
    found: dict[int, Tensor] = {}

    def leaving(index: int) -> AfterForward:
        def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            found[index] = layer_hidden(output)

        return record

    with hooked(after=[(layers[index], leaving(index)) for index in indices]):
        yield found


class _Reached(Exception):
    """Ends a forward pass whose remaining layers are not needed."""


@contextmanager
def stopped_before(layer: nn.Module) -> Iterator[None]:
    """End the block's forward pass when it reaches `layer`; what follows in the block is not run.

    Hooks that were put on `layer` before see its input; see [`recorded_inputs`].
    """

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        raise _Reached

    with suppress(_Reached), hooked(before=[(layer, stop)]):
        yield


@contextmanager
def replaced_input(layer: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Let `hidden`, `[batch, length, hidden]`, enter a layer, whatever the layers below or the embedding give."""

    def replace(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        value = hidden.to(layer_input(args, kwargs).device)
        return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": value})

    with hooked(before=[(layer, replace)]):
        yield


@contextmanager
def replaced_output(module: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Let `hidden` leave a module instead of the hidden states that it computes; whatever else it returns stays.

    A copy leaves it every time: some layers add to what their modules give in place (Falcon).
    """

    def replace(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        return _with_hidden(output, hidden.to(layer_hidden(output).device, copy=True))

    with hooked(after=[(module, replace)]):
        yield


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


def output_length(output: Any) -> int | None:
    """`None` for a layer's output that is a tensor, the length of a tuple or list otherwise."""
    return len(output) if isinstance(output, (tuple, list)) else None


def output_lengths(model: PreTrainedModel) -> tuple[int | None, ...]:
    """What each decoder layer returns: `None` for a tensor, the length of a tuple otherwise.

    It differs between architectures and between versions of transformers, so it is seen in a forward pass of one token.
    """
    layers = decoder_layers(model)
    lengths: dict[int, int | None] = {}

    def noting(index: int) -> AfterForward:
        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            lengths[index] = output_length(output)

        return note

    hooks = [(layer, noting(index)) for index, layer in enumerate(layers)]
    with torch.no_grad(), evaluation_mode(model), hooked(after=hooks):
        run_without_head(model, torch.zeros(1, 1, dtype=torch.long))
    return tuple(lengths[index] for index in range(len(layers)))


def hand_on(length: int | None, value: Tensor | None = None):
    """A layer's forward that computes nothing.

    Args:
        length (`int` or `None`): What the layer returns, from [`output_lengths`].
        value (`Tensor`, *optional*): What it hands on; its input if not given.

    Returns:
        `Callable`: Takes what the layer takes.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = layer_input(args, kwargs)
        hidden = hidden if value is None else value.to(hidden.device)
        return hidden if length is None else (hidden, *[None] * (length - 1))

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
