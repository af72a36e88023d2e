"""The comparisons of the search run, on a tiny model."""

import argparse
import collections
import json

import pytest
from tiny_models import random_tokens, tiny_model

from benchmarks.search import compare, several
from optimum_clp.search.objective import Objective


@pytest.fixture(scope="module")
def setting():
    model = tiny_model(num_layers=5)
    return compare.Setting(
        "tiny", model, random_tokens(60, 8), Objective(model, random_tokens(4, 8, seed=1), quiet=True)
    )


def test_every_strategy_is_compared_with_the_oracle(setting, tmp_path):
    compare.compare(setting, [0.4], [1], tmp_path / "tiny.json")
    runs = {run["strategy"]: run for run in json.loads((tmp_path / "tiny.json").read_text())["runs"]}
    assert set(runs) == {"exhaustive", *compare.AT_ONE_BUDGET, *compare.OF_THE_FIELD}
    for run in runs.values():
        assert sum(stop - start for start, stop in run["segments"]) == 2
        assert run["held_out"]["kl"] > 0
    best = runs["exhaustive"]
    assert all(best["kl"] <= runs[name]["kl"] * (1 + 1e-6) for name in ("halving", "tail"))
    assert runs["fraction"]["forward_equivalents"] <= compare.BUDGET


def test_several_segments_and_budgets(setting):
    found = collections.defaultdict(list)
    args = argparse.Namespace(ratios=[0.4], seeds=[0])
    results = {"runs": [], "budgets": []}
    several.fixed_numbers(setting, args, results, lambda kind, run: found[kind].append(run))
    several.quality_budgets(setting, args, results, lambda kind, run: found[kind].append(run))
    assert [run["strategy"] for run in found["runs"]] == ["gate"] * 3 + ["halving", "perplexity_greedy"]
    assert all(run["num_removed"] == 2 for run in found["runs"])
    greedy = [run for run in found["budgets"] if run["method"] == "greedy"]
    assert [run["increase"] for run in greedy] == list(several.INCREASES)
    assert greedy[0]["num_removed"] <= greedy[1]["num_removed"]
