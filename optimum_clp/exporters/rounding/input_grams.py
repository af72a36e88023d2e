"""What enters each linear module on calibration text, as Gram matrices, while the modules below are quantized one after another."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...errors import QuantizationError
from ...forward.hooks import (
    hooked,
    recorded_inputs,
    recorded_outputs,
    replaced_input,
    run_without_head,
    stopped_before,
)
from ...forward.layer_stack import LayerStack
from ...freed_memory import return_freed_memory
from ...mapped_weights import tensors_of
from ...progress import progress_bar
from ..experts import unrolled_experts
from ..room import ExportRoom
from .dependency_levels import dependency_levels
from .drift_correction import InputGrams
from .nearest import NEAREST
from .products import products_in


@dataclass(frozen=True)
class NamedWeight:
    """A weight of the model.

    Args:
        names (`list[str]`): All its names, one of which it has in the graph.
        weight (`np.ndarray` of shape `[outputs, inputs]`, float32): A view of the parameter.
    """

    names: list[str]
    weight: np.ndarray

    @property
    def address(self) -> int:
        """Where its numbers lie: that of another module with the same parameter is the same."""
        return self.weight.__array_interface__["data"][0]


class Dequantize(Protocol):
    """What makes a weight's numbers each time they are needed: the integers take less room."""

    def __call__(self, rows: np.ndarray | slice = ..., /) -> np.ndarray:
        """All rows or some, float32 `[rows, inputs]`."""


Quantize = Callable[[Sequence[NamedWeight], InputGrams | None, bool], Sequence[Dequantize]]
# What has entered modules, call by call.
Recorded = dict[nn.Module, list[Tensor]]
# Tokens of the float model that say what enters a head that is the embedding too.
_TIED_TOKENS = 4096


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
    model: PreTrainedModel,
    tokens: Tensor,
    wanted: Collection[str],
    quantize: Quantize,
    *,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    room: ExportRoom | None = None,
    quiet: bool = False,
) -> None:
    """Hand weights and what enters their modules to `quantize`: the embedding, then layer by layer, then the head.

    What enters a module comes from the modules below with the weights that `quantize` has returned for them, as in the
    quantized model; modules of a layer that do not depend on one another are seen at once. Beside it the float model's own
    activations are computed. Weights are dequantized module by module, for as long as one is called. Fused experts come one
    by one, under the names that they have in the exported graph; a module that no token reaches does not come.

    Args:
        model (`PreTrainedModel`): In float32 on the CPU, in evaluation mode; left as it was.
        tokens (`Tensor`): int64 `[rows, length]`, without padding.
        wanted (`Collection[str]`): The weights to visit, each by one of its names.
        quantize (`Callable`): Takes [`NamedWeight`]s of modules that are given the same input; its [`InputGrams`], which
            belong to the callee; and whether it is head and embedding at once. Returns for each a [`Dequantize`] that makes
            the weight to go on with. An embedding of its own comes without them. One that is the head too comes first,
            with what enters the head in the float model, of 4096 tokens.
        batch_size (`int`): Rows in one forward pass.
        dtype (`torch.dtype`): Of products, see [`~exporters.rounding.products.product_dtype`]; sums are float32.
        room ([`~exporters.room.ExportRoom`], *optional*): Where what enters layers and modules lies; main memory if not given.
        quiet (`bool`): No progress bar.

    Raises:
        QuantizationError: If the hidden states are not finite.
    """
    with torch.no_grad(), unrolled_experts(model):
        _Visitor(model, tokens, wanted, quantize, batch_size, dtype, room or ExportRoom()).run(quiet)


class _Visitor:
    """The loop of [`visit_layers`]."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        wanted: Collection[str],
        quantize: Quantize,
        batch_size: int,
        dtype: torch.dtype,
        room: ExportRoom,
    ):
        self.model, self.quantize, self.dtype, self.room = model, quantize, dtype, room
        self.batches = tokens.split(batch_size)
        self.stack = LayerStack(model)
        self.names = {key: names for key, names in weight_names(model).items() if set(wanted) & set(names)}
        self.embedding: Any = model.get_input_embeddings()
        self.head: Any = model.get_output_embeddings()

    def run(self, quiet: bool) -> None:
        floats: list[Tensor | None] = [None] * len(self.batches)
        with progress_bar(len(self.stack) + 1, "Calibrating the quantization", quiet) as bar:
            states = self._embedded(self._rounded_embedding())
            for index, layer in enumerate(self.stack.layers):
                replaced: dict[nn.Module, Dequantize] = {}
                modules = [module for module in layer.modules() if self._is_wanted(module)]
                levels = self._levels(index, modules, floats[0]) if modules else []
                floats, expected = self._float_pass(index, modules, floats)
                for level in levels:
                    return_freed_memory()
                    replaced |= self._rounded(self._grams(index, level, expected, states, replaced, level[-1]))
                with _replaced_weights(replaced):
                    states = [self._left(index, *inputs) for inputs in zip(self.batches, states, strict=True)]
                self.room.let_go(tensors_of(layer))
                bar.update()
            if self._is_wanted(self.head) and self.head.weight is not self.embedding.weight:
                _, expected = self._float_pass(len(self.stack), [self.head], floats)
                self._rounded(self._grams(len(self.stack), [self.head], expected, states, {}, self.head))
            bar.update()

    def _is_wanted(self, module: nn.Module | None) -> bool:
        return module is not None and linear_matrix(module) is not None and id(module.weight) in self.names

    def _rounded_embedding(self) -> Dequantize | None:
        """The embedding, as `quantize` makes it; `None` if it is not wanted."""
        weight: Any = self.embedding.weight
        names = self.names.get(id(weight))
        if names is None:
            return None
        sums = None
        tied = self._is_wanted(self.head) and self.head.weight is weight
        if tied:
            found = _Grams([self.head])
            rows = -(-_TIED_TOKENS // self.batches[0].shape[1])
            for batch in torch.cat(self.batches)[:rows].split(len(self.batches[0])):
                with _recorded([self.head]) as inputs, stopped_before(self.head), products_in(self.dtype):
                    self.model(input_ids=batch, use_cache=False)
                found.add({}, inputs, batch)
            ((_, sums),) = found.taken()
            _check_finite(names, sums)
        (rounded,) = self.quantize([NamedWeight(names, weight.detach().numpy())], sums, tied)
        return rounded

    def _embedded(self, embedding: Dequantize | None) -> list[Tensor | None]:
        """What enters the first layer, `[rows, length, hidden]`, with another embedding; `None` without one."""
        if embedding is None:
            return [None] * len(self.batches)
        states: list[Tensor | None] = []
        looked_up = torch.cat(self.batches).unique().numpy()
        # memory of zeros that is never written to is not taken: of a large embedding it is a few rows that are
        weight = np.zeros(self.embedding.weight.shape, dtype=np.float32)
        weight[looked_up] = embedding(looked_up)
        with _replaced_weights({self.embedding: lambda rows=slice(None): weight[rows]}):
            for batch in self.batches:
                with recorded_inputs(self.stack.layers, [0]) as found, stopped_before(self.stack.layers[0]):
                    run_without_head(self.model, batch)
                states.append(self.room.keep(found[0]))
        return states

    def _levels(self, index: int, modules: list[nn.Module], state: Tensor | None) -> list[list[nn.Module]]:
        batch, layer = self.batches[0], self.stack.layers[index]
        return dependency_levels(layer, modules, lambda: self._run(index, batch, state))

    def _float_pass(
        self, index: int, modules: Sequence[nn.Module], states: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], list[Recorded]]:
        """What leaves a layer of the float model, and what enters modules of it, batch by batch: kept until their level has
        been compared with it, so that one pass serves all levels. With the number of layers as index, of the head."""
        left: list[Tensor | None] = []
        entered: list[Recorded] = []
        for batch, state in zip(self.batches, states, strict=True):
            # the head's products are nobody's inputs
            ends = stopped_before(self.head) if index == len(self.stack) else nullcontext()
            with _recorded(modules) as inputs, ends:
                left.append(self._left(index, batch, state))
            entered.append(self._kept(inputs))
        return left, entered

    def _left(self, index: int, batch: Tensor, state: Tensor | None) -> Tensor | None:
        """What leaves a layer, where it may stay."""
        left = self._run(index, batch, state)
        return None if left is None else self.room.keep(left)

    def _kept(self, inputs: Recorded) -> Recorded:
        """What has entered modules, where it may stay; what several were given lies there once."""
        kept: dict[tuple, Tensor] = {}
        for tensor in (tensor for tensors in inputs.values() for tensor in tensors):
            if _place(tensor) not in kept:
                kept[_place(tensor)] = self.room.keep(tensor)
        return {module: [kept[_place(tensor)] for tensor in tensors] for module, tensors in inputs.items()}

    def _grams(
        self,
        index: int,
        modules: Sequence[nn.Module],
        expected: Sequence[Recorded],
        states: Sequence[Tensor | None],
        replaced: dict[nn.Module, Dequantize],
        last: nn.Module,
    ) -> "_Grams":
        """Gram matrices of what enters modules of one layer, `last` of which is called last; with the number of layers as index, of the head."""
        grams = _Grams(modules)
        for batch, floats, state in zip(self.batches, expected, states, strict=True):
            with _replaced_weights(replaced), _recorded(modules) as inputs, stopped_before(last):
                self._run(index, batch, state)
            # each is wanted once; what is left is all that is held of a layer's inputs
            grams.add({module: floats.pop(module, []) for module in modules}, inputs, batch)
        return grams

    def _rounded(self, grams: "_Grams") -> dict[nn.Module, Dequantize]:
        """What `quantize` makes of the modules that `grams` are of."""
        found: dict[nn.Module, Dequantize] = {}
        for modules, sums in grams.taken():
            matrices = [cast(Tensor, linear_matrix(module)).numpy() for module in modules]
            names = [self.names[id(module.weight)] for module in modules]
            weights = [NamedWeight(*pair) for pair in zip(names, matrices, strict=True)]
            _check_finite(weights[0].names, sums)
            found.update(zip(modules, self.quantize(weights, sums, False), strict=True))
        return found

    def _run(self, index: int, batch: Tensor, state: Tensor | None) -> Tensor | None:
        """What leaves a layer, `[rows, length, hidden]`; `state` has entered it. Nothing if the pass ends within the layer, and
        for the number of layers, which stands for the head."""
        seen: dict[int, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(products_in(self.dtype))
            if state is not None:
                resumed = self.stack.resumed(index, state) if index else replaced_input(self.stack.layers[0], state)
                stack.enter_context(resumed)
            if index == len(self.stack):
                self.model(input_ids=batch, use_cache=False)
                return None
            seen = stack.enter_context(recorded_outputs(self.stack.layers, [index]))
            if index + 1 < len(self.stack):
                stack.enter_context(stopped_before(self.stack.layers[index + 1]))
            run_without_head(self.model, batch)
        return seen[index].detach() if seen else None


class _Grams:
    """Sums over tokens for several modules; modules that are given the same tensor share them."""

    def __init__(self, modules: Sequence[nn.Module]):
        self.owners: dict[nn.Module, nn.Module | None] = dict.fromkeys(modules)
        self.found: dict[nn.Module, InputGrams] = {}

    def add(self, floats: Recorded, inputs: Recorded, tokens: Tensor) -> None:
        """Add a batch: what has entered each module in the float model and in the quantized one, and its tokens."""
        by_tensor: dict[tuple, nn.Module] = {}
        for module, tensors in inputs.items():
            owner = by_tensor.setdefault(_place(tensors[0]), module)
            known = self.owners[module]
            if known is None:
                self.owners[module] = known = self.owners[owner] or owner
            if known is module:
                self._add(module, floats.get(module, []), tensors, *tokens.shape)

    def _add(self, module: nn.Module, floats: list[Tensor], inputs: list[Tensor], rows: int, length: int) -> None:
        width = inputs[0].shape[-1]
        # a module that was given every token once, in both models, has drifts
        matched = [tensor.numel() for tensor in (*floats, *inputs)] == [rows * length * width] * 2
        if module not in self.found:
            self.found[module] = InputGrams.zeros(width, matched=matched)
        sums = self.found[module]
        if matched:
            floats = [tensor.reshape(rows, length, width).float() for tensor in floats]
            sums.add(inputs[0].reshape(rows, length, width).float(), floats[0])
        else:
            sums.add(torch.cat([tensor.reshape(-1, width) for tensor in inputs]).float())

    def taken(self) -> Iterator[tuple[list[nn.Module], InputGrams]]:
        """Modules that share sums, and the sums, which are not held here any more; not modules that no token reached."""
        owners = list(self.found)
        for owner in owners:
            sums = self.found.pop(owner)
            if any(gram.diagonal().any() for gram in sums.grams):
                yield [module for module, known in self.owners.items() if known is owner], sums


def _place(tensor: Tensor) -> tuple:
    """Where a tensor's numbers lie, which tells whether another one, also in memory, is the same."""
    # what has no numbers lies nowhere: the tokens of an expert that got none are not another one's
    return (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (id(tensor),)


def _check_finite(names: list[str], sums: InputGrams | None) -> None:
    # no other number is larger than the diagonal's, and a look at all of them would take the matrix once more
    if sums is not None and not all(gram.diagonal().isfinite().all() for gram in sums.grams):
        rule = "what enters it on the calibration text is not finite"
        raise QuantizationError.of("weight", names[0], rule, f'Check the weights, or use the method "{NEAREST}"')


@contextmanager
def _recorded(modules: Sequence[nn.Module]) -> Iterator[Recorded]:
    """Collect what enters modules, call by call."""
    found: Recorded = {}

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.setdefault(module, []).append(args[0].detach())

    with hooked((module, record) for module in modules):
        yield found


@contextmanager
def _replaced_weights(weights: dict[nn.Module, Dequantize]) -> Iterator[None]:
    """Inside the block modules have other weights, `[outputs, inputs]`, which exist while a module is called."""
    before = {module: module.weight for module in weights}

    def replace(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        weight = torch.from_numpy(weights[module]())
        module.weight = nn.Parameter(weight.T if isinstance(module, Conv1D) else weight, requires_grad=False)

    def put_back(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        module.weight = cast(nn.Parameter, before[module])

    put = [(module, put_back) for module in weights]
    # put back also after an exception
    with hooked([(module, replace) for module in weights], put, always_call=True):
        yield
