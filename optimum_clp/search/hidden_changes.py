"""How much layers turn the hidden states of the dense model: what the rules of ShortGPT, Gromov et al. and LLM-Streamline look at."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..forward.dense_outputs import StateStore
from ..forward.hooks import BeforeForward, hooked, layer_hidden, layer_input, run_without_head
from ..forward.layer_major import LayerMajorPasses, Residence
from .objective import Objective

_NAMES = ("one_minus_cosine", "angle")
Sums = dict[str, list[float]]
"""By the name of a measure: for each run of layers, the sum over the tokens of some rows."""


def hidden_changes(objective: Objective, length: int) -> dict[str, list[float]]:
    """How much `length` layers turn the hidden states, by the first of them: token means over all rows.

    Under a bound on memory all rows go through one layer after the other, and the weights are read once; the figures are the same, bit for
    bit.

    Args:
        objective ([`Objective`]): Its model, its rows; the work is counted there, and what was measured is in its journal.
        length (`int`): Layers in a run, in [1, the model's].

    Returns:
        `dict[str, list[float]]`: `"one_minus_cosine"` in [0, 2], and `"angle"` in half-turns, [0, 1].

    Raises:
        TuningError: Under a bound, if the disk has no room for the states of `length` layers.
    """
    places = len(objective.stack.layers) - length + 1
    rows = range(len(objective.tokens))
    # the states of `length` layers wait for what they are compared with
    size, key = max(1, objective.batch_size // length), ["hidden_states", length]

    def plainly(batch: list[int]) -> Sums:
        mask = None if objective.mask is None else objective.mask[batch]
        sums = _no_sums(places)
        kept = _real(objective, batch)

        def compare(start: int, before: Tensor, after: Tensor) -> None:
            _add(sums, start, before, after, kept)

        with torch.no_grad(), _compared(objective.stack.layers, length, compare):
            run_without_head(objective.model, objective.tokens[batch], mask)
        return sums

    figures: Callable[[list[int]], Sums] = plainly
    if objective.residence is not None:
        new = objective.not_in_journal(key, rows, size)
        found = _by_layers(objective, objective.residence, new, length, places) if new else {}
        figures = lambda batch: found[tuple(batch)]  # noqa: E731
    parts = objective.over_rows(key, rows, size, figures, "Hidden states")
    objective.spend(1, objective.work.of(range(len(objective.stack)), head=False), len(objective.stack))
    tokens = objective.weights.sum().item()
    return {
        name: [math.fsum(part[name][start] for part in parts) / tokens for start in range(places)] for name in _NAMES
    }


def _by_layers(
    objective: Objective, residence: Residence, batches: Sequence[list[int]], length: int, places: int
) -> dict[tuple[int, ...], Sums]:
    """The same sums of all micro-batches, with one reading of the weights."""
    own = [row for batch in batches for row in batch]
    parts = torch.arange(len(own)).split([len(batch) for batch in batches])
    numbers = {int(part[0]): tuple(batch) for part, batch in zip(parts, batches, strict=True)}
    sums = {tuple(batch): _no_sums(places) for batch in batches}
    real = {tuple(batch): _real(objective, batch) for batch in batches}
    store = StateStore(residence.folder, residence.state_memory)
    # a place for each state that waits; the one that was compared last is written over
    waiting: list[Tensor] = []

    def arrived(index: int, rows: Tensor, state: Tensor) -> None:
        batch = numbers[int(rows[0])]
        if index < length and len(waiting) == index:
            waiting.append(store.allocate((len(own), *state.shape[1:]), state.dtype))
        place = waiting[index % length]
        if index >= length:
            _add(sums[batch], index - length, place[rows].to(state.device), state, real[batch])
        place[rows] = state.cpu()

    LayerMajorPasses(
        objective.model,
        objective.stack,
        objective.tokens[own],
        None if objective.mask is None else objective.mask[own],
        parts,
        residence=residence,
        allocate=store.allocate,
        description="Hidden states, layer by layer",
        quiet=objective.quiet,
        arrived=arrived,
    ).run()
    return sums


def _no_sums(places: int) -> Sums:
    return {name: [0.0] * places for name in _NAMES}


def _real(objective: Objective, batch: list[int]) -> Tensor:
    """Which tokens are no padding, bool `[rows, length]`."""
    if objective.mask is None:
        return torch.ones_like(objective.tokens[batch], dtype=torch.bool)
    return objective.mask[batch].bool()


def _add(sums: Sums, start: int, before: Tensor, after: Tensor, real: Tensor) -> None:
    # by the distance d of the unit vectors: 1 - cos = d^2 / 2 and angle = 2 arcsin(d / 2) keep their digits
    # where the cosine is nearly 1
    unit = F.normalize(after.float(), dim=-1)
    distance = (unit - F.normalize(before.to(after.device).float(), dim=-1)).norm(dim=-1)
    distance = distance.cpu()[real].double()
    sums["one_minus_cosine"][start] = (distance.square() / 2).sum().item()
    sums["angle"][start] = (2 / math.pi * (distance / 2).clamp(max=1).asin()).sum().item()


@contextmanager
def _compared(layers: nn.ModuleList, length: int, compare: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `compare(start, before, after)` for every run of `length` layers that a forward pass goes through.

    `before` enters its first layer, `after` leaves its last one. No more states are held than wait to be compared.
    """
    waiting: dict[int, Tensor] = {}

    def arrived(index: int, hidden: Tensor) -> None:
        before = waiting.pop(index - length, None)
        if before is not None:
            compare(index - length, before, hidden)
        waiting[index] = hidden

    def entering(index: int) -> BeforeForward:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            arrived(index, layer_input(args, kwargs))

        return hook

    def last(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        arrived(len(layers), layer_hidden(output))

    with hooked([(layer, entering(index)) for index, layer in enumerate(layers)], [(layers[-1], last)]):
        yield
