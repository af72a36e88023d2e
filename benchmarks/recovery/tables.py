"""Tables and plots from the results of `compare.py`, and what they say about the goals.

    python -m benchmarks.recovery.tables benchmarks/recovery/results

Writes `tables.md` and, with matplotlib, two plots for each model into that folder.
"""

import collections
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import markdown

# in the order of the tables; what a plain checkpoint cannot hold has a star
LABELS = {
    "cut": "cut, untouched",
    "linear_patch": "LinearPatch *",
    "ghosted": "Ghosted Layers *",
    "replaceme": "ReplaceMe (fold)",
    "refit_before": "refit, layer before only",
    "least_squares": "closed form alone",
    "last3": "last 3 layers + norm, CE",
    "last3_kd": "last 3 layers + norm, KL",
    "lora_r8": "LoRA, rank 8, KL",
    "lora_equal": "LoRA, our size, KL",
    "endpoints_ce": "endpoints, CE",
    "endpoints_kd": "endpoints, KL",
    "clp": "**ours**: closed form, then endpoints, KL",
    "clp_default_rate": "ours, learning rate and epochs by default",
    "all_layers_kd": "all layers, KL",
    "all_layers_start": "closed form, then all layers, KL",
    "all_layers_ce": "all layers, CE",
    "dense_ce": "dense, same steps, CE",
}
COLOURS = {"rival": "#0072B2", "own": "#D55E00", "ceiling": "#009E73", "control": "#999999"}
MARKERS = dict(zip(LABELS, "x+<*psPXv^>oD8hdHp", strict=True))
RIVAL_SIZE, RETENTION, MARGIN, HEALTHY, SHARE = 1.5, 0.9534, 0.0429, 0.93, 0.8
# columns of the table of shares: a method, and all layers from the untouched cut or from where ours starts
SHARES = {
    "closed form alone": ("least_squares", "all_layers_kd"),
    "endpoints, KL": ("endpoints_kd", "all_layers_kd"),
    "ours": ("clp", "all_layers_kd"),
    "ours, of all layers after the closed form": ("clp", "all_layers_start"),
}

Cells = dict[tuple[float, int], dict[str, dict]]


def main() -> None:
    write(Path(sys.argv[1]))


def write(folder: Path) -> None:
    """Tables and plots of the results in a folder, into it."""
    files = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    compared = [r for r in files if r.get("runs") and "method" in r["runs"][0]]
    compared.sort(key=lambda r: r["num_layers"])
    parts = ["# Ways to heal a cut\n", goals(compared)]
    for results in compared:
        parts += [model_table(results), retention_table(results), equal_time_table(results), rate_table(results)]
    (folder / "tables.md").write_text("\n".join(part for part in parts if part))
    for results in compared:
        plot_parameters(results, folder / f"{results['model']}-parameters.png")
        plot_methods(results, folder / f"{results['model']}-methods.png")


def cells_of(results: dict) -> Cells:
    """Runs by ratio and seed, then by method."""
    cells: Cells = collections.defaultdict(dict)
    for run in results["runs"]:
        cells[run["ratio"], run["seed"]][run["method"]] = run
    return cells


def texts_of(results: dict) -> list[str]:
    return list(results["dense"])


def runs_of(cells: Cells, ratio: float, method: str) -> list[dict]:
    return [cell[method] for (r, _), cell in sorted(cells.items()) if r == ratio and method in cell]


def over_seeds(runs: list[dict], figure: Callable[[dict], float | None], digits: int = 3) -> str:
    """Mean, and smallest and largest where they differ."""
    values = [v for v in map(figure, runs) if v is not None]
    if not values:
        return ""
    low, high = (f"{v:.{digits}f}" for v in (min(values), max(values)))
    return f"{statistics.mean(values):.{digits}f}" + (f" ({low} to {high})" if low != high else "")


def rows_by_method(results: dict) -> Iterator[tuple[float, str, list[dict]]]:
    cells = cells_of(results)
    for ratio in sorted({ratio for ratio, _ in cells}):
        for method in LABELS:
            if runs := runs_of(cells, ratio, method):
                yield ratio, method, runs


def model_table(results: dict) -> str:
    texts = texts_of(results)
    rows = [["ratio", "method", "trained", "CPU s", "peak MB", "rate", "validation KL", *(f"KL, {t}" for t in texts),
             *(f"agreement, {t}" for t in texts)]]  # fmt: skip
    for ratio, method, runs in rows_by_method(results):
        # with several seeds the segment may differ, and with it the layers that have an end
        trained = sorted({run["num_trained"] for run in runs})
        memory = [run["peak_bytes"] / 1e6 for run in runs if run["peak_bytes"] is not None]
        rows.append([str(ratio), LABELS[method], " or ".join(f"{n:,}" for n in trained) if trained[-1] else "-",
                     "-" if method == "cut" else f"{statistics.median(r['cpu_seconds'] for r in runs):.0f}",
                     f"{statistics.median(memory):.0f}" if memory and method != "cut" else "-",
                     f"{runs[0]['learning_rate']:g}" if "learning_rate" in runs[0] else "-",
                     over_seeds(runs, lambda r: r["validation"]["kl"]),
                     *(over_seeds(runs, lambda r, t=t: r["test"][t]["kl"]) for t in texts),
                     *(over_seeds(runs, lambda r, t=t: r["test"][t]["top1_agreement"]) for t in texts)])  # fmt: skip
    seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in results["runs"]}))
    cuts = collections.defaultdict(list)
    for cell in results["cells"]:
        cuts[cell["ratio"]].append((cell["seed"], cell["segment"]))
    shown = "; ".join(
        f"{ratio}: {', '.join(f'[{a}, {b})' for _, (a, b) in sorted(found))}" for ratio, found in sorted(cuts.items())
    )
    return (
        f"## {results['model']}\n\n{results['num_layers']} layers; removed, by ratio and seed: {shown}. Seeds "
        f"{seeds}: means (smallest to largest). Seconds (one run at the chosen rate) and memory are medians; memory "
        "is by how much the process grew.\n\n" + markdown.table(rows)
    )


def retention_table(results: dict) -> str:
    texts = texts_of(results)
    rows = [["ratio", "method", *(f"perplexity, {t}" for t in texts), *(f"retention, {t}" for t in texts),
             *(f"against the tuned dense model, {t}" for t in texts)]]  # fmt: skip
    for ratio, method, runs in rows_by_method(results):
        rows.append([str(ratio), LABELS[method],
                     *(over_seeds(runs, lambda r, t=t: r["test"][t]["perplexity"], 2) for t in texts),
                     *(over_seeds(runs, lambda r, t=t: r["test"][t]["retention"]) for t in texts),
                     *(over_seeds(runs, lambda r, t=t: r["test"][t].get("retention_of_tuned_dense"))
                       for t in texts)])  # fmt: skip
    dense = ", ".join(f"{figures['perplexity']:.2f} on {text}" for text, figures in results["dense"].items())
    return f"### Retention: {results['model']}\n\nDense perplexity {dense}.\n\n" + markdown.table(rows)


def equal_time_table(results: dict) -> str:
    texts = texts_of(results)
    rows = [["method", "epochs", "trained", "CPU s", *(f"KL, {t}" for t in texts)]]
    for _, cell in sorted(cells_of(results).items()):
        longer = [name for name in cell if name.endswith("_equal_time")]
        for name in ["clp", *longer] if longer else []:
            run = cell[name]
            epochs = str(run.get("epochs", results["setting"]["epochs"]))
            rows.append([LABELS[name.removesuffix("_equal_time")], epochs, f"{run['num_trained']:,}",
                         f"{run['cpu_seconds']:.0f}", *(f"{run['test'][t]['kl']:.4f}" for t in texts)])  # fmt: skip
    if len(rows) == 1:
        return ""
    title = f"### At our seconds or more: {results['model']}, ratio 0.2, seed 0\n"
    note = "Rivals of at most 1.5 times our size that were faster, at the rate chosen before, with more epochs.\n"
    return f"{title}\n{note}\n" + markdown.table(rows)


def rate_table(results: dict) -> str:
    """Validation loss of every rate that was tried."""
    runs = [run for run in results["runs"] if "tried" in run]
    rates = sorted({t["learning_rate"] for run in runs for t in run["tried"]})
    rows = [["ratio", "method", *(f"{rate:g}" for rate in rates)]]
    for run in sorted(runs, key=lambda r: (r["ratio"], list(LABELS).index(r["method"]))):
        found = {t["learning_rate"]: t["validation_loss"] for t in run["tried"]}
        cells = (f"{found[rate]:.4f}" if rate in found else "" for rate in rates)
        bold = (f"**{c}**" if rate == run["learning_rate"] else c for rate, c in zip(rates, cells, strict=True))
        rows.append([str(run["ratio"]), LABELS[run["method"]], *bold])
    return f"### Learning rates: {results['model']}, validation loss\n\n" + markdown.table(rows)


def goals(compared: list[dict]) -> str:
    """What was asked for, and where it is met. A cell is a model, a ratio, a seed and a test text."""
    checks = {
        f"lower KL than every rival of at most {RIVAL_SIZE} times our size": beats_rivals,
        f"retention of at least {RETENTION} at ratio 0.2, against the better of the dense model and the equally tuned "
        "one": keeps_enough,
        f"at least {100 * MARGIN:.2f} points of retention above the best rival that tunes nothing, where that one "
        f"keeps under {HEALTHY:.0%}": beats_untuned,
        f"at least {SHARE:.0%} of what tuning all layers gains": functools.partial(
            reaches_ceiling, ceiling="all_layers_kd"
        ),
        f"at least {SHARE:.0%} of what tuning all layers gains after the same closed form": functools.partial(
            reaches_ceiling, ceiling="all_layers_start"
        ),
    }
    rows = [["goal", *(r["model"] for r in compared), "all"]]
    misses = []
    for goal, check in checks.items():
        found = [list(verdicts(results, check)) for results in compared]
        if not any(found):
            continue
        shown = [
            f"{sum(met for met, _ in of_model)} of {len(of_model)}" if of_model else "-"
            for of_model in (*found, [v for f in found for v in f])
        ]
        rows.append([goal, *shown])
        missed = [text for of_model in found for met, text in of_model if not met]
        if missed:
            misses.append(f"Missed: {goal}:\n\n" + "\n".join(f"- {text}" for text in missed) + "\n")
    title = "## Goals\n\nCells (model, ratio, seed, test text) that meet each one.\n\n"
    return title + markdown.table(rows) + "\n" + "\n".join([*misses, share_table(compared), rival_table(compared)])


def verdicts(results: dict, check: Callable) -> Iterator[tuple[bool, str]]:
    for (ratio, seed), cell in sorted(cells_of(results).items()):
        for text in texts_of(results):
            verdict = check(cell, text, ratio) if "clp" in cell else None
            if verdict is not None:
                met, shown = verdict
                yield met, f"{results['model']}, ratio {ratio}, seed {seed}, {text}: {shown}"


def rivals(cell: dict[str, dict]) -> list[dict]:
    """What others do, at no more than 1.5 times our size (to two digits: three layers and a norm against two)."""
    size = cell["clp"]["num_trained"]
    return [
        run
        for name, run in cell.items()
        if run["kind"] == "rival" and name in LABELS and round(run["num_trained"] / size, 2) <= RIVAL_SIZE
    ]


def beats_rivals(cell: dict[str, dict], text: str, ratio: float) -> tuple[bool, str]:
    ours = cell["clp"]["test"][text]["kl"]
    better = {r["method"]: r["test"][text]["kl"] for r in rivals(cell) if r["test"][text]["kl"] <= ours}
    return not better, ", ".join(f"{LABELS[m]} {kl:.4f}" for m, kl in better.items()) + f" against {ours:.4f}"


def keeps_enough(cell: dict[str, dict], text: str, ratio: float) -> tuple[bool, str] | None:
    if ratio != 0.2:
        return None
    figures = cell["clp"]["test"][text]
    kept = min(figures["retention"], figures.get("retention_of_tuned_dense", figures["retention"]))
    return kept >= RETENTION, f"{kept:.4f}"


def beats_untuned(cell: dict[str, dict], text: str, ratio: float) -> tuple[bool, str] | None:
    kept, name = max((r["test"][text]["retention"], r["method"]) for r in rivals(cell) if r["loss"] is None)
    if kept >= HEALTHY:
        return None
    ours = cell["clp"]["test"][text]["retention"]
    return ours - kept >= MARGIN, f"{ours:.4f}, {100 * (ours - kept):.2f} points above {LABELS[name]}"


def reaches_ceiling(cell: dict[str, dict], text: str, ratio: float, *, ceiling: str) -> tuple[bool, str] | None:
    share = share_of_ceiling(cell, "clp", text, ceiling)
    return None if share is None else (share >= SHARE, f"{share:.1%}")


def share_of_ceiling(cell: dict[str, dict], method: str, text: str, ceiling: str) -> float | None:
    if not {"cut", ceiling, method} <= cell.keys():
        return None
    cut, found, best = (cell[m]["test"][text]["kl"] for m in ("cut", method, ceiling))
    return (cut - found) / (cut - best)


def share_table(compared: list[dict]) -> str:
    """How much of the gain of tuning all layers each method has."""
    rows = [["model", "ratio", "text", *SHARES]]
    for results in compared:
        cells = cells_of(results)
        for ratio in sorted({ratio for ratio, _ in cells}):
            here = [cell for (r, _), cell in sorted(cells.items()) if r == ratio]
            for text in texts_of(results):
                shown = (over_seeds(here, lambda c, m=m, t=text, n=n: share_of_ceiling(c, m, t, n), 2)
                         for m, n in SHARES.values())  # fmt: skip
                rows.append([results["model"], str(ratio), text, *shown])
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    title = "### Share of the gain of tuning all layers\n\n"
    return title + "(KL of the cut - KL) / (KL of the cut - KL of all layers, KL loss).\n\n" + markdown.table(rows)


def rival_table(compared: list[dict]) -> str:
    """Ours against each rival and each part of ours, one by one."""
    rows = [["against", "cells with lower KL", "our KL / its KL, median", "smallest", "largest"]]
    for method in LABELS:
        ratios = [
            cell["clp"]["test"][text]["kl"] / cell[method]["test"][text]["kl"]
            for results in compared
            for cell in cells_of(results).values()
            if {"clp", method} <= cell.keys() and method not in ("clp", "dense_ce")
            for text in texts_of(results)
        ]
        if ratios:
            spread = (f"{f(ratios):.2f}" for f in (statistics.median, min, max))
            rows.append([LABELS[method], f"{sum(r < 1 for r in ratios)} of {len(ratios)}", *spread])
    return "### Ours against each, one by one\n\n" + markdown.table(rows)


def plot_grid(results: dict, height: float):
    """A figure with a row for each text and a column for each ratio; `None` without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return None
    ratios, texts = sorted({run["ratio"] for run in results["runs"]}), texts_of(results)
    size = (max(9, 1.5 + 3.2 * len(ratios)), height * len(texts) + 1.2)
    figure, axes = plt.subplots(
        len(texts), len(ratios), figsize=size, sharey="row", squeeze=False, layout="constrained"
    )
    places = [(axes[i][j], text, ratio) for i, text in enumerate(texts) for j, ratio in enumerate(ratios)]
    for axis, text, ratio in places:
        axis.set_title(f"{text}, ratio {ratio}", fontsize=9)
        axis.tick_params(which="both", labelsize=8)
    return plt, figure, places


def spread_of(runs: list[dict], text: str) -> tuple[float, list[list[float]]]:
    """Mean KL, and its distances to the smallest and to the largest."""
    values = [run["test"][text]["kl"] for run in runs]
    mean = statistics.mean(values)
    return mean, [[mean - min(values)], [max(values) - mean]]


def plain_label(method: str) -> str:
    return LABELS[method].replace("**", "")


def plot_parameters(results: dict, file: Path) -> None:
    grid = plot_grid(results, 3)
    if grid is None:
        return
    plt, figure, places = grid
    cells = cells_of(results)
    smallest = min((r["num_trained"] for r in results["runs"] if r["num_trained"]), default=1)
    for axis, text, ratio in places:
        for method in LABELS:
            runs = runs_of(cells, ratio, method)
            if not runs or method == "dense_ce":
                continue
            mean, spread = spread_of(runs, text)
            ours = method == "clp"
            axis.errorbar(
                statistics.mean(r["num_trained"] for r in runs),
                mean,
                yerr=spread,
                marker=MARKERS[method],
                color=COLOURS[runs[0]["kind"]],
                markersize=11 if ours else 6,
                fillstyle="none" if ours else "full",  # or it would hide what is near it
                linestyle="none",
                capsize=2,
                label=plain_label(method),
            )
        axis.set_xscale("symlog", linthresh=smallest / 2)
        axis.set_yscale("log")
        axis.grid(True, which="both", alpha=0.2)
    for axis, _, _ in places:
        if axis.get_subplotspec().is_last_row():
            axis.set_xlabel("trained parameters", fontsize=8)
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("KL to the dense model", fontsize=8)
    known = {}
    for axis, _, _ in places:
        known |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(known.values(), known, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(results["model"], fontsize=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def plot_methods(results: dict, file: Path) -> None:
    grid = plot_grid(results, 3.6)
    if grid is None:
        return
    plt, figure, places = grid
    cells = cells_of(results)
    shown = [m for m in reversed(LABELS) if m != "dense_ce" and any(m in cell for cell in cells.values())]
    for axis, text, ratio in places:
        for place, method in enumerate(shown):
            if runs := runs_of(cells, ratio, method):
                mean, spread = spread_of(runs, text)
                colour = COLOURS[runs[0]["kind"]]
                axis.barh(place, mean, xerr=spread, color=colour, alpha=1 if method == "clp" else 0.55, capsize=2)
                axis.text(mean + spread[1][0], place, f" {mean:.3f}", va="center", fontsize=7)
        axis.set_yticks(range(len(shown)), [plain_label(m) for m in shown], fontsize=8)
        axis.set_xlim(0, 1.25 * max(spread_of(runs, text)[0] + spread_of(runs, text)[1][1][0]
                                    for m in shown if (runs := runs_of(cells, ratio, m))))  # fmt: skip
        if axis.get_subplotspec().is_last_row():
            axis.set_xlabel("KL to the dense model", fontsize=8)
    figure.suptitle(results["model"], fontsize=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
