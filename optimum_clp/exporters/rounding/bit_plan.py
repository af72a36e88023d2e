"""Which matrices of an int4 file get more bits: where a byte more lowers the divergence from the float model most."""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import QuantizationError
from ...forward.hooks import hooked
from ...progress import progress_bar
from ..experts import unrolled_experts
from .input_grams import linear_matrix, weight_names
from .matrices import GraphMatrix, IntegerForm, RoundedMatrix
from .nearest import round_to_nearest

# Tokens whose gradients are looked at; a cost is a mean over them, and only the order of the costs is used.
_TOKENS = 4096


def plan_bits(
    matrices: Mapping[str, GraphMatrix],
    costs: Mapping[str, float],
    block_size: int,
    bits_per_weight: float,
    offered: Sequence[int] = (8,),
    together: Collection[Collection[str]] = (),
) -> dict[str, IntegerForm]:
    """The matrices that get more than 4 bits, the most divergence for each byte first, as long as the budget lasts.

    Args:
        matrices (`Mapping[str, GraphMatrix]`): All that are stored in integers.
        costs (`Mapping[str, float]`): From [`rounding_costs`]; a matrix without a cost keeps 4 bits.
        block_size (`int`): Weights that share a scale.
        bits_per_weight (`float`): Largest allowed mean over all these weights, scales included.
        offered (`Sequence[int]`): Bits that a matrix may have instead of 4, ascending.
        together (`Collection[Collection[str]]`): Matrices of as many columns that are to have one form, by their names.

    Returns:
        `dict[str, IntegerForm]`: By name, in the order in which names were first chosen.

    Raises:
        QuantizationError: If the matrices take more in 4 bits already.
    """
    weights = sum(matrix.rows * matrix.columns for matrix in matrices.values())
    left = bits_per_weight * weights / 8
    forms = {name: matrix.forms(block_size, offered) for name, matrix in matrices.items()}
    left -= sum(matrix.stored_bytes(forms[name][0]) for name, matrix in matrices.items())
    if left < 0:
        least_bits = bits_per_weight - 8 * left / weights
        rule = f"in 4 bits with groups of {block_size} this model takes {least_bits:.3f}, scales included"
        remedy = "Give at least that, or a larger quantization.group_size"
        raise QuantizationError.of("quantization.bits_per_weight", bits_per_weight, rule, remedy)
    group_of = {name: tuple(sorted(group)) for group in together for name in group}
    units = dict.fromkeys(group_of.get(name, (name,)) for name in matrices)
    steps = []
    for names in units:
        cost, bytes_of = sum(costs.get(name, 0.0) for name in names), partial(_stored_bytes, matrices, names)
        pairs = itertools.pairwise(forms[names[0]]) if cost > 0 else ()
        steps += [_Step(names, less, more, bytes_of(more) - bytes_of(less), cost) for less, more in pairs]
    found: dict[str, IntegerForm] = {}
    for step in sorted(steps, key=lambda step: -step.gain / step.extra):
        # a second step gains less for a byte than the first, so it comes after it
        if step.extra <= left and found.get(step.names[0], forms[step.names[0]][0]) == step.less:
            left -= step.extra
            found |= dict.fromkeys(step.names, step.more)
    return found


def _stored_bytes(matrices: Mapping[str, GraphMatrix], names: Collection[str], form: IntegerForm) -> int:
    return sum(matrices[name].stored_bytes(form) for name in names)


@dataclass(frozen=True)
class _Step:
    """A larger form of matrices, which takes `extra` bytes more, where their rounding to 4 bits costs `cost`."""

    names: tuple[str, ...]
    less: IntegerForm
    more: IntegerForm
    extra: int
    cost: float

    @property
    def gain(self) -> float:
        """Of divergence, up to a factor that all steps share: what a rounding costs goes with its squared error."""
        return self.cost * (self.less.error - self.more.error)


def rounding_costs(
    model: PreTrainedModel,
    tokens: Tensor,
    names: Collection[str],
    block_size: int,
    *,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, float]:
    """What rounding each matrix alone to 4 bits adds to `KL(float || rounded)`, estimated to second order.

    For a change `e` of a module's output the divergence is half the expectation of `(g e)^2`, where `g` is the gradient
    of the log-likelihood of tokens that the model itself draws (the Fisher information). So one backward pass for each
    row serves all matrices. Errors of different tokens are taken as independent.

    Args:
        model (`PreTrainedModel`): In float32 on the CPU, in evaluation mode; left as it was.
        tokens (`Tensor`): int64 `[rows, length]`, without padding; as many rows are used as 4096 tokens need.
        names (`Collection[str]`): The weights' names in the graph.
        block_size (`int`): Weights that share a scale.
        seed (`int`): Of the tokens that are drawn.
        quiet (`bool`): No progress bar.

    Returns:
        `dict[str, float]`: Nats per token, by name, for linear modules and the embedding; for an embedding that is the head too the sum of its two uses.
    """
    rows = tokens[: max(1, _TOKENS // tokens.shape[1])]
    generator = torch.Generator().manual_seed(seed)
    with unrolled_experts(model), torch.enable_grad(), ExitStack() as stack:
        watch = _OutputErrors(model, names, block_size)
        stack.enter_context(hooked(after=watch.hooks().items()))
        bar = stack.enter_context(progress_bar(len(rows), "Sensitivity of the weights", quiet))
        for row in rows:
            log_probabilities = model(input_ids=row[None], use_cache=False).logits[0].float().log_softmax(-1)
            drawn = torch.multinomial(log_probabilities.detach().exp(), 1, generator=generator)
            log_probabilities.gather(1, drawn).sum().backward()
            bar.update()
    return {name: 0.5 * total / rows.numel() for name, total in watch.totals.items()}


class _OutputErrors:
    """Sums of `(g e)^2` over tokens; the rounded matrices are held in 4 bits, the errors are made one at a time."""

    def __init__(self, model: PreTrainedModel, names: Collection[str], block_size: int):
        self.block_size = block_size
        embedding: Any = model.get_input_embeddings()
        self.embedding: nn.Module = embedding
        aliases = weight_names(model)
        self.modules: dict[nn.Module, str] = {}
        for module in model.modules():
            if module is embedding or linear_matrix(module) is not None:
                weight: Any = module.weight
                name = next((name for name in aliases[id(weight)] if name in names), None)
                if name is not None:
                    self.modules[module] = name
        self.rounded: dict[str, RoundedMatrix] = {}
        self.totals = dict.fromkeys(self.modules.values(), 0.0)

    def hooks(self) -> dict[nn.Module, Callable]:
        linear = {module: self._linear_hook for module in self.modules if module is not self.embedding}
        # also where it stays in float: gradients begin there
        return {self.embedding: self._embedding_hook, **linear}

    def _error(self, module: nn.Module) -> tuple[str, Tensor, Tensor]:
        weight: Any = module.weight
        matrix = weight.detach() if module is self.embedding else linear_matrix(module)
        assert matrix is not None
        name = self.modules[module]
        if name not in self.rounded:
            self.rounded[name] = round_to_nearest(matrix.numpy(), 4, self.block_size)
        return name, matrix, torch.from_numpy(self.rounded[name].dequantize()) - matrix

    def _linear_hook(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        inputs = args[0].detach()

        def backward(gradient: Tensor) -> None:
            name, _, error = self._error(module)
            self.totals[name] += _squared((gradient @ error) * inputs)

        if output.requires_grad:
            output.register_hook(backward)

    def _embedding_hook(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        # no weight requires a gradient: from here on everything does
        output = output.detach().requires_grad_().clone()

        def backward(gradient: Tensor) -> None:
            name, matrix, error = self._error(module)
            rows = matrix[args[0]]
            # Gemma's embedding multiplies what it has looked up
            scale = (output.detach() * rows).sum() / rows.square().sum()
            self.totals[name] += _squared(gradient * scale * error[args[0]])

        if module in self.modules:
            output.register_hook(backward)
        return output


def _squared(products: Tensor) -> float:
    """The sum over tokens of the square of the sum over features."""
    return float(np.square(products.sum(-1).double().numpy()).sum())
