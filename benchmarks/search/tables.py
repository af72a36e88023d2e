"""Tables and plots from the results of `compare.py`, `several.py` and `calibration.py`.

    python -m benchmarks.search.tables benchmarks/search/results

Writes `tables.md` and, with matplotlib, `quality.png` and `several.png` into that folder.
"""

import collections
import json
import statistics
import sys
from pathlib import Path

from benchmarks import markdown

ORDER = ("exhaustive", "gate", "halving", "fraction", "block_influence", "angular", "cosine_block", "taylor",
         "perplexity_greedy", "tail", "random")  # fmt: skip
AT_ONE_BUDGET = ("gate", "halving", "fraction")
COLOURS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#999999", "#7F3C8D",
           "#8C564B")  # fmt: skip
MARKERS = "*osD^v<>XPh"


def main() -> None:
    folder = Path(sys.argv[1])
    files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    compared = [r for name, r in files.items() if not name.startswith(("several", "calibration"))]
    compared.sort(key=lambda r: len(r["model"]) and max(run["segments"][-1][1] for run in r["runs"]))
    several = [r for name, r in files.items() if name.startswith("several")]
    studied = [r for name, r in files.items() if name.startswith("calibration")]
    text = [quality_table(compared)]
    text += [strategy_table(results) for results in compared]
    text += [several_table(results) + budget_table(results) for results in several]
    text += [calibration_table(results) for results in studied]
    (folder / "tables.md").write_text("\n".join(text))
    plot_quality(compared, folder / "quality.png")
    plot_several(several, folder / "several.png")


def by_cell(runs: list[dict]) -> dict[tuple, dict[str, dict]]:
    """Runs by ratio and seed, then by strategy."""
    cells: dict[tuple, dict[str, dict]] = collections.defaultdict(dict)
    for run in runs:
        cells[run["ratio"], run["seed"]][run["strategy"]] = run
    return cells


def excess(cell: dict[str, dict], strategy: str) -> float:
    """How far the held-out KL of a strategy's choice is above that of the oracle's choice."""
    return cell[strategy]["held_out"]["kl"] / cell["exhaustive"]["held_out"]["kl"] - 1


def quality_table(compared: list[dict]) -> str:
    rows = [["model", "strategy", "cells", "within 1 %", "worst", "forward-equivalents", "most segments scored"]]
    for results in [*compared, {"model": "all", "runs": None}]:
        cells = [c for r in compared if results["runs"] in (None, r["runs"]) for c in by_cell(r["runs"]).values()]
        for strategy in AT_ONE_BUDGET:
            have = [c for c in cells if strategy in c and "exhaustive" in c]
            found = [excess(c, strategy) for c in have]
            costs = [c[strategy]["forward_equivalents"] for c in have]
            rows.append([results["model"], strategy, str(len(found)),
                         f"{sum(e <= 0.01 for e in found) / len(found):.0%}", f"{max(found):+.1%}",
                         f"{statistics.mean(costs):.2f} ({min(costs):.2f} to {max(costs):.2f})",
                         str(max(c[strategy]["num_scored"] for c in have))])  # fmt: skip
    title = "### At one budget, against the oracle\n\nHeld-out KL of the choice against that of exhaustive search's choice.\n"
    return title + "\n" + markdown.table(rows)


def strategy_table(results: dict) -> str:
    plain = results["plain_forward_bytes"]
    rows = [["ratio", "strategy", "forwards", "seconds", "memory", "layers removed", "held-out KL", "perplexity"]]
    cells = by_cell(results["runs"])
    for ratio in sorted({ratio for ratio, _ in cells}):
        here = {seed: cell for (r, seed), cell in sorted(cells.items()) if r == ratio}
        for strategy in ORDER:
            runs = [cell[strategy] for cell in here.values() if strategy in cell]
            if not runs:
                continue
            kl = [run["held_out"]["kl"] for run in runs]
            cuts = collections.Counter(json.dumps(run["segments"]) for run in runs)
            memory = [run["peak_bytes"] / plain for run in runs if "peak_bytes" in run]
            spread = f" ({min(kl):.3f} to {max(kl):.3f})" if max(kl) > min(kl) else ""
            rows.append([str(ratio), strategy, f"{statistics.mean(r['forward_equivalents'] for r in runs):.2f}",
                         f"{statistics.median(r['seconds'] for r in runs):.1f}",
                         f"{memory[0]:.2f}" if memory else "",
                         ", ".join(f"{short(json.loads(cut))}" + (f" x{n}" if len(cuts) > 1 else "")
                                   for cut, n in cuts.most_common(3)),
                         f"{statistics.mean(kl):.3f}{spread}",
                         f"{statistics.mean(r['held_out']['perplexity'] for r in runs):.2f}"])  # fmt: skip
    dense = results["runs"][0]["held_out"]["dense_perplexity"]
    seeds = len({seed for _, seed in cells})
    return (
        f"### {results['model']}\n\nDense perplexity {dense:.2f}; means over {seeds} seeds (spread in parentheses), seconds are "
        f"medians; memory is the peak over that of a plain forward pass ({plain / 1e6:.1f} MB).\n\n"
        + markdown.table(rows)
    )


def short(cut: list[list[int]]) -> str:
    if len(cut) > 3:
        return f"{sum(b - a for a, b in cut)} layers in {len(cut)} runs"
    return " ".join(f"{a}:{b}" for a, b in cut)


def several_table(results: dict) -> str:
    rows = [["layers", "seed", "strategy", "segments", "forwards", "layers removed", "held-out KL", "against one"]]
    one = {(r["num_removed"], r["seed"]): r["held_out"]["kl"] for r in results["runs"] if r.get("num_segments") == 1}
    for run in results["runs"]:
        base = one[run["num_removed"], run["seed"]]
        rows.append([str(run["num_removed"]), str(run["seed"]), run["strategy"], str(run.get("num_segments", "any")),
                     f"{run['forward_equivalents']:.1f}", short(run["segments"]), f"{run['held_out']['kl']:.4f}",
                     f"{run['held_out']['kl'] / base - 1:+.0%}"])  # fmt: skip
    return f"### Several segments: {results['model']}\n\n" + markdown.table(rows) + "\n"


def budget_table(results: dict) -> str:
    rows = [["allowed", "method", "layers", "forwards", "layers removed", "increase on test text"]]
    for run in results["budgets"]:
        held_out = run["held_out"]
        increase = "" if held_out is None else f"{held_out['perplexity'] / held_out['dense_perplexity'] - 1:+.1%}"
        rows.append([f"{run['increase']:.0%}", run["method"], str(run["num_removed"]),
                     f"{run['forward_equivalents']:.1f}", short(run["segments"]), increase])  # fmt: skip
    return "Quality budgets, as increase of the perplexity on validation rows:\n\n" + markdown.table(rows)


def calibration_table(results: dict) -> str:
    texts = list(results["best_held_out"])
    rows = [["text", "tokens", "starts", *(f"above the best on {text}" for text in texts)]]
    groups = collections.defaultdict(list)
    for run in results["runs"]:
        groups[run["source"], run["tokens"]].append(run)
    for (source, tokens), runs in groups.items():
        found = [[run["excess"][text] for run in runs] for text in texts]
        rows.append([source, f"{tokens:,}", ", ".join(str(run["start"]) for run in runs),
                     *(f"{statistics.mean(e):+.1%} (worst {max(e):+.1%})" for e in found)])  # fmt: skip
    return f"### Calibration text: {results['model']}, {results['num_removed']} layers\n\n" + markdown.table(rows)


def plot_quality(compared: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(compared), 4.4), dpi=120, layout="constrained")
    for axes, results in zip(figure.subplots(1, len(compared), squeeze=False)[0], compared, strict=True):
        for strategy, colour, marker in zip(ORDER, COLOURS, MARKERS, strict=True):
            cells = [c for c in by_cell(results["runs"]).values() if strategy in c and "exhaustive" in c]
            if not cells:
                continue
            costs = [c[strategy]["forward_equivalents"] for c in cells]
            ratios = [1 + excess(c, strategy) for c in cells]
            axes.plot(costs, ratios, marker, color=colour, label=strategy, markersize=5, alpha=0.7, linestyle="none")
        axes.axvline(4, color="#767676", linestyle="--", linewidth=1)
        axes.set(xscale="log", yscale="log", title=results["model"], xlabel="forward-equivalents")
        plain_ticks(axes.xaxis)
        plain_ticks(axes.yaxis)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out KL / oracle's")
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(path)


def plain_ticks(axis) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def plot_several(several: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    if not several:
        return
    figure = Figure(figsize=(4.4 * len(several), 4), dpi=120, layout="constrained")
    kinds = [("gate", 1), ("gate", 2), ("gate", 3), ("halving", 2), ("perplexity_greedy", None)]
    for axes, results in zip(figure.subplots(1, len(several), squeeze=False)[0], several, strict=True):
        for (strategy, segments), colour, marker in zip(kinds, COLOURS[1:], "osD^v", strict=False):
            runs = [r for r in results["runs"] if (r["strategy"], r.get("num_segments")) == (strategy, segments)]
            label = strategy if segments is None else f"{strategy}, {segments} segment{'s' if segments > 1 else ''}"
            points = collections.defaultdict(list)
            for run in runs:
                points[run["num_removed"]].append(run["held_out"]["kl"])
            counts = sorted(points)
            axes.plot(counts, [statistics.mean(points[n]) for n in counts], marker=marker, color=colour, label=label)
        axes.set(title=results["model"], xlabel="layers removed", yscale="log")
        plain_ticks(axes.yaxis)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out KL (nats per token)")
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
