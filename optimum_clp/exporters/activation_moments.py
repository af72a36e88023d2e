"""Gram matrices of what enters each linear module on calibration text, layer by layer, so that one layer's are held."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import Problem, QuantizationError
from ..gating import LayerStack, layer_hidden, run_without_head, stopped_before
from ..progress import progress_bar
from .onnx_experts import unrolled_experts

Quantize = Callable[[list[str], np.ndarray, np.ndarray, bool], np.ndarray]


def linear_matrix(module: nn.Module) -> Tensor | None:
    """The weight of a linear module as `[outputs, inputs]`, over its own storage; `None` for any other module."""
    if isinstance(module, Conv1D):
        return module.weight.detach().T
    # a router that is a linear layer with a forward of its own may multiply by something else
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return cast(Tensor, module.weight).detach() if plain else None


def weight_names(model: nn.Module) -> dict[int, list[str]]:
    """All names of every linear module's weight, and of the embedding's, by the weight's `id`; the graph has one of them."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Embedding) or linear_matrix(module) is not None:
            names.setdefault(id(module.weight), []).append(f"{name}.weight")
    return names


def visit_layers(
    model: PreTrainedModel, tokens: Tensor, quantize: Quantize, *, batch_size: int = 8, quiet: bool = False
) -> None:
    """Hand every linear module's weight and inputs to `quantize`, from the bottom up, the head last.

    What enters a layer comes from the layers below with the weights that `quantize` has returned for them, as in the
    quantized model; within a layer all modules are seen at once. A layer's weights are replaced only while what leaves
    it is computed. Fused experts come one by one, under the names that they have in the exported graph; a module that no
    token reaches does not come.

    Args:
        model (`PreTrainedModel`): In float32 on the CPU, in evaluation mode; left as it was.
        tokens (`Tensor`): int64 `[rows, length]`, without padding.
        quantize (`Callable`): Takes the weight's names, one of which it has in the graph; the weight (float32
            `[outputs, inputs]`); the sum over tokens of `x x^T` of its inputs (float64 `[inputs, inputs]`); and whether it
            is the embedding's table too. Returns the weight to go on with.
        batch_size (`int`): Rows in one forward pass.
        quiet (`bool`): No progress bar.

    Raises:
        QuantizationError: If the hidden states are not finite.
    """
    with torch.no_grad(), unrolled_experts(model):
        _Visitor(model, tokens, quantize, batch_size).run(quiet)


class _Visitor:
    """The loop of [`visit_layers`]."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor, quantize: Quantize, batch_size: int):
        self.model, self.quantize = model, quantize
        self.batches = tokens.split(batch_size)
        self.stack = LayerStack(model)
        self.names = weight_names(model)
        self.embedding: Any = model.get_input_embeddings()

    def run(self, quiet: bool) -> None:
        states: list[Tensor | None] = [None] * len(self.batches)
        with progress_bar(len(self.stack) + 1, "Calibrating the quantization", quiet) as bar:
            for index, layer in enumerate(self.stack.layers):
                modules = [module for module in layer.modules() if linear_matrix(module) is not None]
                with _replaced_weights(self._quantized(index, modules, states)):
                    states = [
                        self._run(index, batch, state) for batch, state in zip(self.batches, states, strict=True)
                    ]
                bar.update()
            head: Any = self.model.get_output_embeddings()
            if head is not None and linear_matrix(head) is not None:
                self._quantized(len(self.stack), [head], states)
            bar.update()

    def _quantized(self, index: int, modules: list[nn.Module], states: list[Tensor | None]) -> dict[nn.Module, Tensor]:
        """What `quantize` makes of some modules of a layer; of the head, with the number of layers as index."""
        moments = _Moments(modules)
        with ExitStack() as stack:
            for module in modules:
                stack.callback(module.register_forward_pre_hook(moments.add).remove)
            for batch, state in zip(self.batches, states, strict=True):
                moments.seen.clear()
                if index < len(self.stack):
                    self._run(index, batch, state)
                else:
                    assert state is not None
                    with self.stack.resumed(index, state), stopped_before(modules[0]):
                        self.model(input_ids=batch, use_cache=False)
        found = {}
        for module in modules:
            gram = moments.gram(module)
            if gram is None:
                continue
            weight: Any = module.weight
            names = self.names[id(weight)]
            if not np.isfinite(gram).all():
                rule = "what enters it on the calibration text is not finite"
                raise QuantizationError(
                    Problem("weight", names[0], rule, 'Check the weights, or use the method "rtn"')
                )
            matrix = linear_matrix(module)
            assert matrix is not None
            found[module] = torch.from_numpy(
                self.quantize(names, matrix.numpy(), gram, weight is self.embedding.weight)
            )
        return found

    def _run(self, index: int, batch: Tensor, state: Tensor | None) -> Tensor:
        """What leaves a layer, `[rows, length, hidden]`; `state` has entered it."""
        seen: list[Tensor] = []
        with ExitStack() as stack:
            layer = self.stack.layers[index]
            stack.callback(layer.register_forward_hook(lambda _, __, out: seen.append(layer_hidden(out))).remove)
            if state is not None:
                stack.enter_context(self.stack.resumed(index, state))
            if index + 1 < len(self.stack):
                stack.enter_context(stopped_before(self.stack.layers[index + 1]))
            run_without_head(self.model, batch)
        return seen[-1]


class _Moments:
    """Gram matrices of several modules; modules that are given the same tensor share one."""

    def __init__(self, modules: list[nn.Module]):
        self.owners = dict.fromkeys(modules)
        self.grams: dict[nn.Module, Tensor] = {}
        self.seen: list[tuple[Tensor, nn.Module]] = []

    def add(self, module: nn.Module, args: tuple) -> None:
        """A hook before `module`'s forward."""
        owner = next((other for tensor, other in self.seen if tensor is args[0]), module)
        self.seen.append((args[0], module))
        known = self.owners[module]
        if known is None:
            self.owners[module] = known = self.owners[owner] or owner
        if known is not module:
            return
        inputs = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        if module not in self.grams:
            self.grams[module] = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
        self.grams[module] += inputs.T @ inputs

    def gram(self, module: nn.Module) -> np.ndarray | None:
        """The sum over tokens of `x x^T`, float64; `None` if no token came."""
        owner = self.owners[module]
        gram = None if owner is None else self.grams[owner]
        return None if gram is None or not gram.any() else gram.numpy()


@contextmanager
def _replaced_weights(weights: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Inside the block modules have other weights, given as `[outputs, inputs]`."""
    before = {module: module.weight for module in weights}
    try:
        for module, weight in weights.items():
            weight = weight.T if isinstance(module, Conv1D) else weight
            module.weight = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for module, parameter in before.items():
            module.weight = cast(nn.Parameter, parameter)
