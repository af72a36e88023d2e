"""What every strategy measures: the divergence from the dense model under gates, soft ones and hard ones.

For each micro-batch of rows the dense model runs once, and the hidden states that a gate is entered with are kept; then
each gate runs from the first layer that is not open in it. Final hidden states are turned into logits a few tokens at a
time, so that a vocabulary-wide tensor of a whole batch never exists.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..architecture.lookup import text_config
from ..forward.dense_outputs import StateStore
from ..forward.hooks import recorded_inputs, run_without_head
from ..forward.layer_major import LayerMajorPasses, Residence
from ..forward.layer_stack import LayerStack
from ..out_of_memory import Halving
from ..processes import gathered, is_first, rank, world_size
from ..progress import progress_bar
from ..resume import Journal
from ..segments import LayerSegment
from ..surgery.sizes import count_bytes
from .gate import hard_gate
from .work import ForwardWork, measure_work

Gate = tuple[float, ...]
"""The gate of each layer, in [0, 1]."""

# A search may take a quarter more than a plain forward pass of one batch (weights and all logits), and it has no such
# logits: shares of what is free so, for hidden states that wait and for the float32 temporaries of the divergence. The
# rest is for what a layer needs while it runs.
_FREE_OF_WEIGHTS, _FREE_OF_LOGITS = 0.2, 0.8
_SHARE_OF_STATES, _SHARE_OF_PIECES = 0.5, 0.25
_TEMPORARIES = 5
_FLOAT_BYTES = 4


def gate_of(segments: Iterable[LayerSegment], num_layers: int) -> Gate:
    """The gate that is 0 on some segments and 1 elsewhere."""
    gate = torch.ones(num_layers, dtype=torch.float64)
    for segment in segments:
        gate *= hard_gate(segment.start, len(segment), num_layers)
    return tuple(gate.tolist())


@dataclass(frozen=True)
class RowMeasures:
    """Figures of some gates on some rows, float64 `[gates, rows]`.

    Args:
        kl (`Tensor`): Mean `KL(dense || gated)` of each row's tokens, in nats.
        loss (`Tensor`): Mean cross-entropy of each row's tokens but the first, in nats.
        dense_loss (`Tensor`): The same of the dense model, float64 `[rows]`.
    """

    kl: Tensor
    loss: Tensor
    dense_loss: Tensor


class Objective:
    """Divergence from the dense model, for gates; counts the work.

    In a group of processes (`torch.distributed`) the micro-batches are dealt out, and every process gets all figures.
    A micro-batch is computed alike wherever it is computed, so the figures do not depend on the number of processes.

    Args:
        model (`PreTrainedModel`): The dense model, in evaluation mode; not changed.
        tokens (`Tensor`): int64 `[rows, length]`.
        attention_mask (`Tensor`, *optional*): int64 `[rows, length]`, 0 where there is padding. Padding is measured by
            nothing; a row's weight is its number of tokens.
        batch_size (`int`): Rows in one forward pass, at most; fewer where memory says so.
        journal ([`Journal`], *optional*): For a search that can be interrupted.
        name (`str`): Of the rows, in the journal.
        quiet (`bool`): No progress bars.
        residence ([`Residence`], *optional*): For a model that memory does not hold: all gates of a call run with one
            reading of the weights, layer by layer. Figures are the same; without it, and where layers hand on more than hidden states, each
            micro-batch runs through all layers.

    Attributes:
        stack ([`LayerStack`]), work ([`ForwardWork`]): Of the model.
        weights (`Tensor`): float64 `[rows]`: tokens of each row.
        probe (`float`): Work that it took to measure `work`: one row.
        spent (`float`): Work so far, in forward-equivalents.
        layer_passes (`float`): Layers run so far, in passes over all rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        *,
        attention_mask: Tensor | None = None,
        batch_size: int = 8,
        journal: Journal | None = None,
        name: str = "search",
        quiet: bool = False,
        residence: Residence | None = None,
    ):
        self.name = name
        self.model, self.tokens, self.mask = model, tokens, attention_mask
        self.batch_size, self.quiet = batch_size, quiet
        self.journal = journal or Journal()
        self.stack = LayerStack(model, run=residence is None)
        self.residence = residence if self.stack.layer_by_layer else None
        self.num_layers = len(self.stack)
        self.weights = (torch.ones_like(tokens) if attention_mask is None else attention_mask).sum(1).double()
        self.work: ForwardWork = measure_work(model, self.stack, tokens[:1], residence is not None)
        self.probe = self.spent = 1 / len(tokens)
        self.layer_passes = self.num_layers / len(tokens)
        self._halving = Halving("search", "search.batch_size")
        limit = math.inf if residence is None else residence.work_memory
        self._memory = _MemoryRule(model, tokens.shape[1], batch_size, limit)

    def price(self, gate: Gate) -> float:
        """Work of one gate over all rows, in forward-equivalents, without the dense pass."""
        return self.work.of(self.stack.layers_run(gate))

    def price_of(self, segments: Iterable[LayerSegment]) -> float:
        """As [`~Objective.price`], for a cut."""
        return self.price(gate_of(segments, self.num_layers))

    def measure(self, gates: Sequence[Gate], rows: Sequence[int], description: str = "Search") -> RowMeasures:
        """Measure gates on rows.

        Args:
            gates (`Sequence[Gate]`): One number for each layer; all on the same rows.
            rows (`Sequence[int]`): Rows of the tokens.
            description (`str`): What the progress bar says.

        Returns:
            [`RowMeasures`]: In the order of `gates` and `rows`.
        """

        def plainly(batch: list[int]) -> dict[str, Any]:
            return _listed(self._halving.over(batch, partial(self._measure, gates)))

        size = self.micro_batch(len(gates))
        figures: Callable[[list[int]], dict[str, Any]] = plainly
        if self.residence is not None:
            figures = self._measured_by_layers(gates, rows, size, self.residence, description)
        parts = self.over_rows(list(gates), rows, size, figures, description)
        share = len(rows) / len(self.tokens)
        runs = [self.stack.layers_run(gate) for gate in gates]
        self.spend(share, 1 + sum(map(self.work.of, runs)), self.num_layers + sum(map(len, runs)))
        tables = {
            name: torch.cat([torch.tensor(part[name], dtype=torch.float64) for part in parts], dim=-1)
            for name in ("kl", "loss", "dense_loss")
        }
        return RowMeasures(**tables)

    def mean_kl(self, gates: Sequence[Gate], rows: Sequence[int], description: str = "Search") -> list[float]:
        """Token-mean KL of each gate over some rows; see [`~Objective.measure`]."""
        weights = self.weights[list(rows)]
        return (self.measure(gates, rows, description).kl @ (weights / weights.sum())).tolist()

    def micro_batch(self, num_gates: int) -> int:
        """Rows that so many gates may be measured on at once, so that memory stays near that of a plain pass."""
        return self._memory.rows(num_gates)

    def spend(self, share: float, forwards: float, layer_passes: float) -> None:
        """Count work on a share of the rows."""
        self.spent += share * forwards
        self.layer_passes += share * layer_passes

    def over_rows(
        self, key: Any, rows: Sequence[int], size: int, figures: Callable[[list[int]], Any], description: str
    ) -> list[Any]:
        """Take figures of each micro-batch of rows: here, in another process, or from the journal.

        Args:
            key: JSON-ready: what is measured.
            rows (`Sequence[int]`): Rows of the tokens.
            size (`int`): Rows in a micro-batch.
            figures (`Callable`): Called with the rows of one micro-batch; what it returns is JSON-ready.
            description (`str`): What the progress bar says.

        Returns:
            `list`: In the order of `rows`.
        """
        batches, world = _batches(rows, size), world_size()
        found: list[Any] = []
        with progress_bar(len(rows), description, self.quiet or not is_first()) as bar:
            for first in range(0, len(batches), world):
                turn = batches[first : first + world]
                found += self._turn(turn, key, figures)
                bar.update(sum(map(len, turn)))
        return found

    def not_in_journal(self, key: Any, rows: Sequence[int], size: int) -> list[list[int]]:
        """The micro-batches of [`~Objective.over_rows`] that this process has to measure.

        Args:
            key, rows, size: As there.
        """
        mine = _batches(rows, size)[rank() :: world_size()]
        return [batch for batch in mine if not self.journal.knows([self.name, key, batch])]

    def _turn(self, turn: list[list[int]], key: Any, figures: Callable[[list[int]], Any]) -> list[Any]:
        """One micro-batch for each process; all get what each has found, in order."""

        def recalled(batch: list[int], measure: Callable[[], Any]) -> Any:
            return self.journal.recall([self.name, key, batch], measure)

        if world_size() == 1:
            return [recalled(batch, partial(figures, batch)) for batch in turn]
        mine = rank()
        found = gathered(recalled(turn[mine], partial(figures, turn[mine])) if mine < len(turn) else None)
        # the first process writes down what the others have found, and none of them measures it again
        return [recalled(batch, [value].pop) for batch, value in zip(turn, found[: len(turn)], strict=True)]

    def _measure(self, gates: Sequence[Gate], rows: list[int]) -> dict[str, Tensor]:
        ids = self.tokens[rows]
        mask = None if self.mask is None else self.mask[rows]
        last = self.num_layers
        sources = [self.stack.entry(gate)[1] for gate in gates]
        with torch.no_grad():
            with recorded_inputs(self.stack.layers, sorted({*sources, last})) as states:
                run_without_head(self.model, ids, mask)
            dense = states[last]
            finals: list[Tensor] = [dense] * len(gates)
            # from the end of the stack to its beginning, so that states are let go as results take their place
            for index in sorted(range(len(gates)), key=lambda i: -sources[i]):
                for source in [s for s in states if s > sources[index]]:
                    del states[source]
                finals[index] = self._final(gates[index], states, sources[index], ids, mask, dense)
            states.clear()
            return self.figures(dense, finals, ids, mask)

    def _measured_by_layers(
        self, gates: Sequence[Gate], rows: Sequence[int], size: int, residence: Residence, description: str
    ) -> Callable[[list[int]], dict[str, Any]]:
        """Measure every micro-batch of this process that the journal does not know, with one reading of the weights.

        Returns:
            `Callable`: Gives the figures of a micro-batch.
        """
        new = self.not_in_journal(list(gates), rows, size)
        found: dict[tuple[int, ...], dict[str, Any]] = {}
        if new:
            own = [row for batch in new for row in batch]
            tokens, mask = self.tokens[own], None if self.mask is None else self.mask[own]
            parts = torch.arange(len(own)).split([len(batch) for batch in new])
            store = StateStore(residence.folder, residence.state_memory)
            options: dict[str, Any] = {"residence": residence, "allocate": store.allocate, "quiet": self.quiet}
            options |= {"description": f"{description}, layer by layer"}
            passes = LayerMajorPasses(self.model, self.stack, tokens, mask, parts, **options)
            finals, dense = passes.run(gates), passes.kept[self.num_layers]
            device = self.model.device

            def figures(part: Tensor) -> dict[str, Tensor]:
                states = [final[part].to(device) for final in finals]
                return self.figures(dense[part].to(device), states, tokens[part], None if mask is None else mask[part])

            with torch.no_grad():
                for batch, part in zip(new, parts, strict=True):
                    found[tuple(batch)] = _listed(self._halving.over(part, figures))
        return lambda batch: found[tuple(batch)]

    def _final(self, gate: Gate, states: dict[int, Tensor], source: int, ids: Tensor, mask, dense: Tensor) -> Tensor:
        """Hidden states that leave the last layer under a gate."""
        if source == self.num_layers:
            return dense
        if not self.stack.layers_run(gate):
            return states[source]
        with (
            self.stack.gated(gate, states[source]),  # first, so that the last layer is recorded behind its gate
            recorded_inputs(self.stack.layers, [self.num_layers]) as found,
        ):
            run_without_head(self.model, ids, mask)
        return found[self.num_layers]

    def figures(
        self, dense: Tensor, finals: list[Tensor], ids: Tensor, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Row means of divergence and cross-entropy, a few tokens at a time.

        Args:
            dense (`Tensor`): `[rows, length, hidden]`: what leaves the dense model's last layer.
            finals (`list[Tensor]`): What leaves the last layer of whatever is compared with it, alike.
            ids (`Tensor`): int64 `[rows, length]`.
            mask (`Tensor`, *optional*): int64 `[rows, length]`, 0 where there is padding.

        Returns:
            `dict[str, Tensor]`: As [`RowMeasures`], by name.
        """
        rows, length = ids.shape
        weights = torch.ones(rows, length) if mask is None else mask.float()
        labels = F.pad(ids[:, 1:], (0, 1))
        predicted = F.pad(weights[:, 1:] * weights[:, :-1], (0, 1))
        sums = torch.zeros(3, len(finals), rows, dtype=torch.float64)
        with self.stack.head(self.model) as head:
            for where in self._memory.pieces(rows, length):
                dense_log = head(dense[where]).float().log_softmax(-1)
                probabilities = dense_log.exp()
                label = labels[where].to(dense_log.device)[..., None]
                entropy = -dense_log.gather(-1, label)[..., 0]
                sums[2, :, where[0]] += (entropy.cpu() * predicted[where]).double().sum(1)
                for index, final in enumerate(finals):
                    cut_log = head(final[where]).float().log_softmax(-1)
                    entropy = -cut_log.gather(-1, label)[..., 0]
                    kl = torch.sub(dense_log, cut_log, out=cut_log).mul_(probabilities).sum(-1)
                    del cut_log
                    sums[0, index, where[0]] += (kl.cpu() * weights[where]).double().sum(1)
                    sums[1, index, where[0]] += (entropy.cpu() * predicted[where]).double().sum(1)
                del dense_log, probabilities
        counts = torch.stack([weights.sum(1), predicted.sum(1), predicted.sum(1)]).double().clamp(min=1)[:, None]
        kl, loss, dense_loss = sums / counts
        return {"kl": kl, "loss": loss, "dense_loss": dense_loss[0]}


def _listed(parts: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """Figures of the rows of some parts, one behind the other, JSON-ready."""
    return {name: torch.cat([part[name] for part in parts], dim=-1).tolist() for name in parts[0]}


def _batches(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[first : first + size]) for first in range(0, len(rows), size)]


class _MemoryRule:
    """How many rows and tokens may be held at once, so that a search stays near the memory of a plain forward pass."""

    def __init__(self, model: PreTrainedModel, length: int, batch_size: int, limit: float):
        config = text_config(model.config)
        self.vocabulary, self.hidden = config.vocab_size, config.hidden_size
        self.length, self.batch_size = length, batch_size
        self.element = model.dtype.itemsize
        logits = batch_size * length * self.vocabulary * self.element
        self.free = min(limit, _FREE_OF_WEIGHTS * count_bytes(model) + _FREE_OF_LOGITS * logits)

    def rows(self, num_gates: int) -> int:
        """Rows of a micro-batch: the states that the gates are entered with, or those that they give, are all held."""
        row = (num_gates + 2) * self.length * self.hidden * self.element
        return max(1, min(self.batch_size, int(_SHARE_OF_STATES * self.free / row)))

    def pieces(self, rows: int, length: int) -> list[tuple[slice, slice]]:
        """Pieces of a `[rows, length]` batch whose logits may exist at once."""
        room = int(_SHARE_OF_PIECES * self.free / (_TEMPORARIES * _FLOAT_BYTES * self.vocabulary))
        room = max(16, min(room, 2048))
        if room < length:
            return [(slice(r, r + 1), slice(t, t + room)) for r in range(rows) for t in range(0, length, room)]
        step = room // length
        return [(slice(r, r + step), slice(0, length)) for r in range(0, rows, step)]
