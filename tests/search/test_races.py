import math

import pytest
import torch

from optimum_clp.search.races import _surely_behind, exhaustive, successive_halving
from optimum_clp.search.scoreboard import Scoreboard
from optimum_clp.segments import LayerSegment

CUTS = [(LayerSegment(start, start + 2),) for start in range(32)]


class TableObjective:
    """Figures of cuts from a table `[cuts, rows]`; one row of one cut costs `price` of a forward pass."""

    num_layers = 34

    def __init__(self, table, price=0.5):
        self.table, self.price = table, price
        self.tokens = list(range(table.shape[1]))
        self.weights = torch.ones(table.shape[1], dtype=torch.float64)
        self.spent = 0.0

    def price_of(self, cut):
        return self.price

    def measure(self, gates, rows, description):
        self.spent += (1 + self.price * len(gates)) * len(rows) / len(self.tokens)
        starts = [gate.index(0.0) for gate in gates]
        kl = self.table[starts][:, list(rows)]

        class Found:
            loss, dense_loss = kl + 1, torch.zeros(len(rows), dtype=torch.float64)

        Found.kl = kl
        return Found


def noisy_table(seed, spread):
    """Cut 11 is 3 % better than its neighbours, 12 and 10; rows have their own level, as texts do."""
    generator = torch.Generator().manual_seed(seed)
    mean = 1 + 0.03 * (torch.arange(32) - 11).abs().double()
    level = torch.rand(64, generator=generator, dtype=torch.float64) + 0.5
    own = torch.randn(32, 64, generator=generator, dtype=torch.float64)
    return mean[:, None] * level + spread * own


def test_the_best_of_many_is_found_within_the_budget():
    found = []
    for seed in range(20):
        objective = TableObjective(noisy_table(seed, 0.02))
        board = Scoreboard(objective)
        found.append(successive_halving(board, CUTS, range(64), 4.0))
        assert objective.spent <= 4.0 < 1 + 0.5 * 32
        rows = {cut: int(board.rows_of(cut).sum()) for cut in CUTS}
        assert rows[found[-1]] == max(rows.values()) > min(rows.values()) > 0
    assert found.count(CUTS[11]) >= 19


def test_one_row_is_used_whatever_it_costs():
    objective = TableObjective(noisy_table(0, 0.0))
    assert successive_halving(Scoreboard(objective), CUTS, range(64), 1e-3) == CUTS[11]
    assert objective.spent == pytest.approx(17 / 64)


def test_a_cut_that_is_surely_behind_goes_at_once_and_the_race_ends():
    table = torch.ones(2, 64, dtype=torch.float64) * torch.tensor([[1.0], [2.0]])
    objective = TableObjective(table)
    board = Scoreboard(objective)
    assert successive_halving(board, CUTS[:2], range(64), 100.0) == CUTS[0]
    table = torch.ones(3, 64, dtype=torch.float64) * torch.tensor([[1.0], [2.0], [3.0]])
    objective = TableObjective(table)
    assert successive_halving(Scoreboard(objective), CUTS[:3], range(64), 4.0) == CUTS[0]
    assert objective.spent < 4.0


@pytest.mark.parametrize(("freedom", "quantile"), [(7, 4.785), (15, 3.733), (31, 3.375), (120, 3.160)])
def test_the_threshold_is_students_quantile(freedom, quantile):
    assert _surely_behind(quantile * 1.03, 1.0, freedom + 1)
    assert not _surely_behind(quantile * 0.93, 1.0, freedom + 1)


def test_cuts_without_a_finite_score_lose():
    table = noisy_table(0, 0.0)
    table[11] = math.nan
    for search in (
        lambda board: successive_halving(board, CUTS, range(64), 4.0),
        lambda board: exhaustive(board, CUTS, range(64)),
    ):
        assert search(Scoreboard(TableObjective(table))) in (CUTS[10], CUTS[12])


def test_what_is_behind_is_compared_on_common_rows():
    table = torch.tensor([[1.0, 5.0, 1.0, 5.0], [2.0, 6.5, 2.0, 6.5]], dtype=torch.float64)
    board = Scoreboard(TableObjective(table))
    board.measure([CUTS[0]], [0, 1, 2, 3])
    board.measure([CUTS[1]], [0, 1])
    behind, error = board.behind(CUTS[1], CUTS[0])
    assert behind == pytest.approx(1.25)
    assert error == pytest.approx(torch.tensor([1.0, 1.5]).std().item() / 2**0.5)
    chosen, other = board.scored(CUTS[0])
    assert (chosen.kl, chosen.num_rows, chosen.behind) == (3.0, 4, 0.0)
    assert (other.kl, other.num_rows, other.loss) == (4.25, 2, 5.25)
