"""What is known of integer cuts: their figures on each row, and how sure the best of them is."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..segments import LayerSegment
from .objective import Objective, gate_of
from .result import ScoredCut

Cut = tuple[LayerSegment, ...]


class Scoreboard:
    """Exact figures of cuts, row by row; rows that a cut was not measured on are NaN.

    Args:
        objective ([`Objective`]): Measures.

    Attributes:
        kl, loss (`dict[Cut, Tensor]`): float64 `[rows]`, in nats per token.
        repaired (`dict[Cut, Tensor]`): KL after the repair, of cuts that had one, alike.
        dense_loss (`Tensor`): The dense model's, float64 `[rows]`.
    """

    def __init__(self, objective: Objective):
        self.objective = objective
        self.kl: dict[Cut, Tensor] = {}
        self.loss: dict[Cut, Tensor] = {}
        self.repaired: dict[Cut, Tensor] = {}
        self.dense_loss = self._unknown()

    def measure(self, cuts: Iterable[Cut], rows: Sequence[int], description: str = "Scoring cuts") -> None:
        """Measure cuts on rows."""
        cuts = list(cuts)
        gates = [gate_of(cut, self.objective.num_layers) for cut in cuts]
        found = self.objective.measure(gates, rows, description)
        for index, cut in enumerate(cuts):
            for table, values in ((self.kl, found.kl), (self.loss, found.loss)):
                table.setdefault(cut, self._unknown())[list(rows)] = values[index]
        self.dense_loss[list(rows)] = found.dense_loss

    def add_repaired(self, cut: Cut, rows: Sequence[int], kl: Sequence[float]) -> None:
        """Note the KL of a repaired cut on rows, in nats per token."""
        table = self.repaired.setdefault(cut, self._unknown())
        table[list(rows)] = torch.tensor(kl, dtype=torch.float64)

    def rows_of(self, cut: Cut) -> Tensor:
        """Rows that a cut was measured on, bool `[rows]`."""
        return ~self.kl[cut].isnan()

    def mean(self, cut: Cut, of: dict[Cut, Tensor] | None = None) -> float:
        """Token mean over the rows that a cut was measured on; of its KL if not said otherwise."""
        values = (of or self.kl)[cut]
        return self._weighted(values, ~values.isnan())[0]

    def behind(self, cut: Cut, other: Cut) -> tuple[float, float]:
        """How much greater a cut's KL is than another's on the rows that both were measured on, and its standard error."""
        rows = self.rows_of(cut) & self.rows_of(other)
        return self._weighted(self.kl[cut] - self.kl[other], rows)

    def best(self, among: Iterable[Cut] | None = None, of: dict[Cut, Tensor] | None = None) -> Cut:
        """The cut of the smallest KL, or of another figure; the first in the stack of equal ones. Cuts without a finite one
        come last."""
        cuts = list(self.kl if among is None else among)
        means = {cut: self.mean(cut, of) for cut in cuts}
        return min(cuts, key=lambda c: (means[c] if math.isfinite(means[c]) else math.inf, c))

    def scored(self, chosen: Cut) -> tuple[ScoredCut, ...]:
        """Everything that was measured, by place."""
        entries = []
        for cut in sorted(self.kl):
            kl, error = self._weighted(self.kl[cut], self.rows_of(cut))
            behind, behind_error = self.behind(cut, chosen) if cut != chosen else (0.0, 0.0)
            rows = int(self.rows_of(cut).sum())
            repaired = self.mean(cut, self.repaired) if cut in self.repaired else None
            entries.append(ScoredCut(cut, kl, error, self.mean(cut, self.loss), rows, behind, behind_error, repaired))
        return tuple(entries)

    def mean_dense_loss(self, cut: Cut) -> float:
        """Cross-entropy of the dense model over the rows that a cut was measured on."""
        return self._weighted(self.dense_loss, self.rows_of(cut))[0]

    def _unknown(self) -> Tensor:
        return torch.full((len(self.objective.tokens),), math.nan, dtype=torch.float64)

    def _weighted(self, values: Tensor, rows: Tensor) -> tuple[float, float]:
        count = int(rows.sum())
        if count == 0:
            return math.nan, math.nan
        weights = self.objective.weights[rows] / self.objective.weights[rows].sum()
        mean = (weights * values[rows]).sum()
        if count == 1:
            return mean.item(), math.nan
        spread = (weights**2 * (values[rows] - mean) ** 2).sum() * count / (count - 1)
        return mean.item(), spread.sqrt().item()
