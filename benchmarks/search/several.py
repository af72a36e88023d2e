"""Several segments against one, and quality budgets: what more freedom is worth, at equal cost.

    python -m benchmarks.search.several --data DATA --models stories-llama-16l deep32 deep80 --models-dir MODELS

Arguments and folders as for `compare.py`; results go to `several-NAME.json`. For each number of layers:
`gate` with 1, 2 and 3 segments; and at the cost that the gates of 2 segments had, a race of all cuts (`halving`) and greedy
removal of single layers (`perplexity_greedy`, on as many rows as the cost pays for). For each quality budget: the number of
layers that bisection finds with 1 and 2 segments, and greedy removal until the budget is used up.
"""

import argparse
import json
import math
from pathlib import Path

from benchmarks.folders import MODELS
from benchmarks.search.compare import RATIOS, ROWS, Setting, distinct_counts, load_setting, on_held_out
from optimum_clp import SearchConfig
from optimum_clp.errors import SearchError
from optimum_clp.report.environment import environment_info
from optimum_clp.search.enumeration import number_of_cuts
from optimum_clp.search.objective import Objective
from optimum_clp.search.problem import cut_of
from optimum_clp.search.scoreboard import Scoreboard
from optimum_clp.search.segment_search import search_segments, search_within_budget

INCREASES = (0.25, 1.0)
VALIDATION_ROWS = 24
# the first round of a race alone looks at every cut: with 80 layers that took longer than everything else together
MOST_RACED = 5000


def configurations() -> list[SearchConfig]:
    return [gate(), race(4.0), greedy_removal(ROWS), within_budget()]


def gate() -> SearchConfig:
    return SearchConfig(strategy="gate")


def race(budget: float) -> SearchConfig:
    return SearchConfig(strategy="halving", budget=budget)


def greedy_removal(rows: int) -> SearchConfig:
    return SearchConfig(strategy="perplexity_greedy", num_sequences=rows)


def within_budget() -> SearchConfig:
    return SearchConfig()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--models-dir", type=Path, default=MODELS)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    for name in args.models:
        setting = load_setting(name, args.models_dir, args.data)
        file = args.output / f"several-{name}.json"
        results = json.loads(file.read_text()) if file.is_file() else {"model": name, "runs": [], "budgets": []}
        results["environment"] = environment_info()

        def keep(kind: str, run: dict, name=name, results=results, file=file) -> None:
            results[kind].append(run)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(results, indent=1) + "\n")
            print(name, {k: v for k, v in run.items() if k != "lengths"}, flush=True)

        fixed_numbers(setting, args, results, keep)
        quality_budgets(setting, args, results, keep)


def fixed_numbers(setting: Setting, args: argparse.Namespace, results: dict, keep) -> None:
    done = {(r["ratio"], r["seed"]) for r in results["runs"] if r["strategy"] == "perplexity_greedy"}
    for ratio, count in distinct_counts(args.ratios, setting.held_out.num_layers).items():
        for seed in args.seeds:
            if (ratio, seed) in done:
                continue
            results["runs"] = [r for r in results["runs"] if (r["ratio"], r["seed"]) != (ratio, seed)]
            cell = {"ratio": ratio, "seed": seed, "num_removed": count}
            spent = 0.0
            for segments in (1, 2, 3):
                run = one_run(setting, seed, count, gate(), segments)
                spent = run["forward_equivalents"] if segments == 2 else spent
                keep("runs", {**cell, "strategy": "gate", "num_segments": segments, **run})
            if number_of_cuts(setting.held_out.num_layers, count, 2) <= MOST_RACED:
                run = one_run(setting, seed, count, race(spent / 3), 2)
                keep("runs", {**cell, "strategy": "halving", "num_segments": 2, **run})
            rows = max(1, min(ROWS, int(spent / greedy_price(setting.held_out.num_layers, count) * ROWS)))
            run = one_run(setting, seed, count, greedy_removal(rows), 1)
            keep("runs", {**cell, "strategy": "perplexity_greedy", **run})


def greedy_price(depth: int, count: int) -> float:
    """Forward-equivalents of greedy removal of single layers: in each round every layer that is left, half a pass each."""
    return sum(1 + (depth - gone) / 2 for gone in range(count))


def one_run(setting: Setting, seed: int, count: int, config: SearchConfig, segments: int) -> dict:
    result = search_segments(
        setting.model, setting.rows(seed), count, config, num_segments=segments, seed=seed, quiet=True
    )
    cut = [s.to_list() for s in result.segments]
    return {
        "segments": cut,
        "kl": result.score,
        "rows": min(ROWS, config.num_sequences),
        "forward_equivalents": result.forward_equivalents * min(ROWS, config.num_sequences) / ROWS,
        "seconds": result.seconds,
        "held_out": on_held_out(setting, cut),
    }


def quality_budgets(setting: Setting, args: argparse.Namespace, results: dict, keep) -> None:
    done = {(r["increase"], r["method"]) for r in results["budgets"]}
    rows = setting.rows(args.seeds[0], ROWS + VALIDATION_ROWS)
    search, check = rows[:ROWS], rows[ROWS:]
    for increase in INCREASES:
        for segments in (1, 2):
            method = f"bisection, {segments} segment{'s' if segments > 1 else ''}"
            if (increase, method) in done:
                continue
            try:
                result = search_within_budget(
                    setting.model, search, check, increase, within_budget(), num_segments=segments, quiet=True
                )
            except SearchError:
                continue
            cut = [s.to_list() for s in result.segments]
            keep("budgets", {"increase": increase, "method": method, "num_removed": result.num_removed, "segments": cut,
                             "forward_equivalents": result.forward_equivalents, "seconds": result.seconds,
                             "held_out": on_held_out(setting, cut),
                             "lengths": [t.to_dict() for t in result.lengths]})  # fmt: skip
        if (increase, "greedy") not in done:
            keep("budgets", {"increase": increase, "method": "greedy", **greedy(setting, search, check, increase)})


def greedy(setting: Setting, search, check, increase: float) -> dict:
    """One layer after the other, each time the one that costs least perplexity, until the next would exceed the budget."""
    rows = 4
    objective = Objective(setting.model, search[:rows], quiet=True)
    validation = Objective(setting.model, check, quiet=True)
    gone: list[int] = []
    while len(gone) < objective.num_layers - 1:
        board = Scoreboard(objective)
        cuts = {cut_of([*gone, i], objective.num_layers): i for i in range(objective.num_layers) if i not in gone}
        board.measure(cuts, range(rows))
        best = min(cuts, key=lambda cut: board.mean(cut, board.loss))
        checked = Scoreboard(validation)
        checked.measure([best], range(len(check)))
        if math.expm1(checked.mean(best, checked.loss) - checked.mean_dense_loss(best)) > increase:
            break
        gone.append(cuts[best])
    cut = [s.to_list() for s in cut_of(gone, objective.num_layers)] if gone else []
    spent = objective.spent * rows / ROWS + validation.spent * len(check) / ROWS
    held_out = on_held_out(setting, cut) if gone else None
    return {
        "num_removed": len(gone),
        "segments": cut,
        "rows": rows,
        "forward_equivalents": spent,
        "held_out": held_out,
    }


if __name__ == "__main__":
    main()
