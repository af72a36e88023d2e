"""What weights and the gradients of the dense model's loss say together, layer by layer: what the rule of LLM-Pruner looks at."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError
from ..forward.dense_outputs import StateStore
from ..forward.hooks import evaluation_mode
from ..forward.layer_major import LayerMajorPasses, Residence, called_with, layer_arguments
from ..forward.losses import next_token_cross_entropy
from ..mapped_weights import FileStamps, MappedWeights
from .objective import Objective

_PIECE = 2**24  # weights whose float32 products exist at one time
_KEY = ["taylor"]


def weights_by_gradients(objective: Objective) -> list[float]:
    """`sum |w * dCE/dw|` of each layer, CE being the dense model's next-token cross-entropy: a mean over all predicted tokens.

    The absolute value is taken row by row, so that sums do not depend on the batch size; a row's weight is its number of predicted
    tokens. A gradient is dropped as soon as it is used: in memory are one row's activations and the gradient of one parameter at a time.

    Under a bound on memory rows go up through one layer after the other, and their gradients come down the same way, each layer computed
    again: the weights are read twice, and one layer's activations of one row exist at a time. The figures are the same. Where several layers
    share a weight its gradient is whole only at the end, and each row goes through all layers.

    Args:
        objective ([`Objective`]): Its model, its rows; the work is counted there, and what was measured is in its journal.

    Raises:
        ModelError: If the layers' weights have no gradients: quantized ones, or ones that are kept elsewhere.
        TuningError: Under a bound, if the disk has no room for what enters all layers.
    """
    count, rows = len(objective.stack), range(len(objective.tokens))
    with _requiring_gradients(objective.model, objective.stack.layers) as gradients:

        def plainly(batch: list[int]) -> list[float]:
            gradients.sums[:] = [0.0] * count
            with torch.enable_grad():
                _loss_of(objective, batch).backward()
            return list(gradients.sums)

        figures: Callable[[list[int]], list[float]] = plainly
        if objective.residence is not None and not gradients.shared:
            new = objective.not_in_journal(_KEY, rows, 1)
            found = _by_layers(objective, objective.residence, [row for (row,) in new], gradients) if new else {}
            figures = lambda batch: found[batch[0]]  # noqa: E731
        parts = objective.over_rows(_KEY, rows, 1, figures, "Gradients")
    objective.spend(1, 3, 3 * count)  # a backward pass is counted as two forwards
    total = predicted(objective).sum().item()
    return [math.fsum(part[index] for part in parts) / total for index in range(count)]


def predicted(objective: Objective) -> Tensor:
    """Which tokens after the first are predicted: bool `[rows, length - 1]`; none that is padding or follows it."""
    if objective.mask is None:
        return torch.ones_like(objective.tokens[:, 1:], dtype=torch.bool)
    return (objective.mask[:, 1:] * objective.mask[:, :-1]).bool()


class _Gradients:
    """Adds `sum |w * dw|` to the number of each layer when a backward pass has a weight's gradient, and drops it."""

    def __init__(self, layers: nn.ModuleList):
        self.owners: dict[Tensor, list[int]] = {}
        for index, layer in enumerate(layers):
            for parameter in layer.parameters():
                self.owners.setdefault(parameter, []).append(index)
        self.sums = [0.0] * len(layers)

    @property
    def shared(self) -> bool:
        """Whether several layers have a weight in common, which counts for each of them."""
        return any(len(owners) > 1 for owners in self.owners.values())

    def add(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        pieces = zip(parameter.detach().flatten().split(_PIECE), gradient.flatten().split(_PIECE), strict=True)
        total = math.fsum((weight.float() * slope.float()).abs().sum().item() for weight, slope in pieces)
        for index in self.owners[parameter]:
            self.sums[index] += total


@contextmanager
def _requiring_gradients(model: PreTrainedModel, layers: nn.ModuleList) -> Iterator[_Gradients]:
    """Every backward pass of the block adds to the sums of the layers; no gradient is kept.

    Only the layers' parameters require gradients. What required them before, and the gradients that there were, are put
    back.

    Raises:
        ModelError: If a layer's weights have no gradients.
    """
    gradients = _Gradients(layers)
    _check_gradients(model, list(gradients.owners))
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    with ExitStack() as stack:
        stack.callback(_put_back, before)
        for parameter, _, _ in before:
            parameter.requires_grad_(parameter in gradients.owners)
            parameter.grad = None
        for owned in gradients.owners:
            stack.callback(owned.register_post_accumulate_grad_hook(gradients.add).remove)
        yield gradients


def _put_back(before: Sequence[tuple[nn.Parameter, bool, Tensor | None]]) -> None:
    for parameter, required, gradient in before:
        parameter.requires_grad_(required)
        parameter.grad = gradient


def _check_gradients(model: PreTrainedModel, parameters: Sequence[Tensor]) -> None:
    if getattr(model, "is_quantized", False) or not all(p.is_floating_point() for p in parameters):
        rule = "its weights are quantized, and integers have no gradients"
    elif any(p.is_meta for p in parameters):
        rule = "some of its weights are not in memory (offloaded), and get no gradients there"
    else:
        return
    remedy = "Give the dense model, loaded whole, or use a strategy without gradients, such as block_influence"
    raise ModelError.of("model", type(model).__name__, rule, remedy)


def _loss_of(objective: Objective, batch: list[int]) -> Tensor:
    """Summed next-token cross-entropy of some rows, with a graph."""
    model = objective.model
    ids = objective.tokens[batch].to(model.device)
    options: dict[str, Any] = (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )
    if objective.mask is not None:
        options["attention_mask"] = objective.mask[batch].to(model.device)
    return _summed(objective, model(input_ids=ids, **options).logits, batch)


def _summed(objective: Objective, logits: Tensor, batch: list[int]) -> Tensor:
    losses = next_token_cross_entropy(logits, objective.tokens[batch].to(logits.device))
    return losses[predicted(objective)[batch].to(losses.device)].sum()


def _by_layers(
    objective: Objective, residence: Residence, rows: list[int], gradients: _Gradients
) -> dict[int, list[float]]:
    """The sums of each row, with two readings of the weights."""
    depth, device = len(objective.stack), objective.model.device
    store = StateStore(residence.folder, residence.state_memory)
    entered = _entered(objective, residence, rows, store)
    sums = {row: [0.0] * depth for row in rows}
    slopes = store.allocate(entered[depth].shape, entered[depth].dtype)
    weights = MappedWeights()
    stamps = FileStamps(weights.files_of(objective.model))
    with torch.enable_grad(), evaluation_mode(objective.model):
        with objective.stack.head(objective.model) as head:
            for place, row in enumerate(rows):
                last = entered[depth][place : place + 1].to(device).requires_grad_()
                _summed(objective, head(last), [row]).backward()
                slopes[place] = _gradient(last)[0].cpu()
        for index in reversed(range(depth)):
            for place, row in enumerate(rows):
                gradients.sums[index] = 0.0
                # nothing below the first layer has a gradient
                state = entered[index][place : place + 1].to(device).requires_grad_(index > 0)
                left = _left(objective, index, row, state)
                left.backward(slopes[place : place + 1].to(left.device))
                sums[row][index] = gradients.sums[index]
                if index:
                    slopes[place] = _gradient(state)[0].cpu()
            weights.let_go(objective.stack.layers[index].parameters())
            stamps.check()
            del entered[index + 1]
    return sums


def _entered(objective: Objective, residence: Residence, rows: list[int], store: StateStore) -> dict[int, Tensor]:
    """What enters each layer, and what leaves the last one, `[rows, length, hidden]`, each row computed alone."""
    passes = LayerMajorPasses(
        objective.model,
        objective.stack,
        objective.tokens[rows],
        None if objective.mask is None else objective.mask[rows],
        torch.arange(len(rows)).split(1),
        residence=residence,
        allocate=store.allocate,
        description="Gradients, layer by layer",
        quiet=objective.quiet,
    )
    passes.run(keep=range(len(objective.stack)))
    return passes.kept


def _left(objective: Objective, index: int, row: int, state: Tensor) -> Tensor:
    """What leaves a layer for one row, with a graph."""
    model, stack = objective.model, objective.stack
    mask = None if objective.mask is None else objective.mask[[row]]
    with torch.no_grad():
        args, kwargs = layer_arguments(model, stack, index, objective.tokens[[row]], mask)
    return called_with(stack, index, args, kwargs, state)


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
