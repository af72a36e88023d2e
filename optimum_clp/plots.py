"""Pictures of the search and of endpoint tuning, made from the report alone. matplotlib is an optional extra."""

import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigurationError, Problem
from .report import CLPReport, describe_loss

SEARCH_PLOT = "plots/search.png"
TUNING_PLOT = "plots/tuning.png"
# Okabe and Ito's palette, which colour-blind readers can tell apart
_BLUE, _VERMILION, _GREY = "#0072B2", "#D55E00", "#767676"


def plots_available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def write_plots(report: CLPReport, folder: str | os.PathLike) -> list[Path]:
    """Write every plot that `report` has figures for; none if matplotlib is not installed.

    Args:
        report ([`CLPReport`]): Its `search` and `tuning` sections are drawn.
        folder (`str` or `os.PathLike`): The files are `plots/search.png` and `plots/tuning.png` in it.

    Returns:
        `list[Path]`: The files that were written.
    """
    if not plots_available():
        return []
    written = []
    if report.search and report.search.get("scored"):
        written.append(plot_search(report, Path(folder) / SEARCH_PLOT))
    if report.tuning and report.tuning.get("history"):
        written.append(plot_tuning(report, Path(folder) / TUNING_PLOT))
    return written


def plot_search(report: CLPReport, path: str | os.PathLike) -> Path:
    """Draw the exact KL of each scored segment by its first layer; below it the gate's way there, if there was a gate.

    Args:
        report ([`CLPReport`]): With a `search` section.
        path (`str` or `os.PathLike`): PNG file; its folder is made if missing.

    Returns:
        `Path`: `path`.

    Raises:
        ConfigurationError: If matplotlib is not installed, or if no segment was scored.
    """
    search = _section(report.search, "search", "scored")
    steps = search.get("trajectory") or []
    figure = _figure(7.2, 5.4 if steps else 3.4)
    if steps:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        _draw_trajectory(lower, steps)
        bottom = lower
    else:
        bottom = upper = figure.subplots()
    _draw_scores(upper, search)
    bottom.set_xlabel("first layer removed")
    bottom.set_xlim(-0.5, search["num_layers"] - search["num_removed"] + 0.5)
    bottom.xaxis.get_major_locator().set_params(integer=True)
    return _save(figure, path)


def plot_tuning(report: CLPReport, path: str | os.PathLike) -> Path:
    """Draw train and validation loss over the steps, with the untuned model's validation loss as a line.

    Args:
        report ([`CLPReport`]): With a `tuning` section.
        path (`str` or `os.PathLike`): PNG file; its folder is made if missing.

    Returns:
        `Path`: `path`.

    Raises:
        ConfigurationError: If matplotlib is not installed, or if there is no history.
    """
    tuning = _section(report.tuning, "tuning", "history")
    figure = _figure(7.2, 3.6)
    axes = figure.subplots()
    untuned = tuning.get("initial_validation_loss")
    if _drawable(untuned):
        axes.axhline(untuned, color=_GREY, linestyle="--", linewidth=1.5, label="validation, not tuned")
    for key, label, color, marker in (
        ("train_loss", "train", _BLUE, "s"),
        ("validation_loss", "validation", _VERMILION, "o"),
    ):
        points = [(entry["step"], entry[key]) for entry in tuning["history"] if _drawable(entry.get(key))]
        axes.plot(*_columns(points), color=color, marker=marker, markersize=4, linewidth=1.5, label=label)
    best = tuning.get("best_validation_loss")
    if tuning.get("improved") and _drawable(best):
        axes.plot([tuning["best_step"]], [best], "o", markersize=11, fillstyle="none", color=_VERMILION, label="kept")
    title = f"Tuning of layers {', '.join(map(str, tuning['layers']))}, loss: {describe_loss(tuning['loss'])}"
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.legend(frameon=False)
    return _save(figure, path)


def _draw_scores(axes, search: dict[str, Any]) -> None:
    scored = sorted((entry for entry in search["scored"] if _drawable(entry["kl"])), key=lambda entry: entry["start"])
    chosen = {start for start, _ in search["segments"]}
    starts, scores = _columns([(entry["start"], entry["kl"]) for entry in scored])
    errors = [entry.get("standard_error") or 0.0 for entry in scored]
    axes.errorbar(starts, scores, yerr=errors, color=_BLUE, marker="o", linestyle="none", capsize=3, label="scored")
    if len(starts) > 1:
        axes.plot(starts, scores, color=_BLUE, linewidth=1, alpha=0.4)
    best = [(entry["start"], entry["kl"]) for entry in scored if entry["start"] in chosen]
    axes.plot(
        *_columns(best), "o", markersize=13, fillstyle="none", color=_VERMILION, mew=2, linestyle="none", label="cut"
    )
    axes.set(
        ylabel="KL to dense (nats per token)",
        title=f"{search['num_removed']} of {search['num_layers']} layers removed, strategy: {search['strategy']}",
    )
    positive = [score for score in scores if score > 0]
    if len(positive) == len(scores) and max(positive) > 20 * min(positive):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0, *scores) if len(scores) > 1 else None)
    axes.legend(frameon=False)


def _draw_trajectory(axes, steps: Sequence[dict[str, Any]]) -> None:
    drawable = [entry for entry in steps if _drawable(entry["start"])]
    first = min(entry["step"] for entry in drawable)
    # several entries for the first step are places that were compared before the gate began to move
    tried = [entry for entry in drawable if entry["step"] == first]
    path = [entry for entry in drawable if entry["step"] > first or len(tried) == 1]
    if len(tried) > 1:
        scan = _columns([(entry["start"], entry["step"]) for entry in tried])
        axes.plot(*scan, "x", color=_GREY, linestyle="none", label="tried to begin from")
    starts, numbers = _columns([(entry["start"], entry["step"]) for entry in path])
    axes.plot(starts, numbers, color=_VERMILION, marker=".", linewidth=1.5, label="gate")
    axes.plot(
        starts[-1:], numbers[-1:], "o", markersize=8, fillstyle="none", color=_VERMILION, mew=2, label="final gate"
    )
    axes.set_ylabel("gate step")
    axes.invert_yaxis()
    axes.legend(frameon=False)


def _section(section: dict[str, Any] | None, name: str, key: str) -> dict[str, Any]:
    if not plots_available():
        raise ConfigurationError(
            Problem("matplotlib", None, "plots need it, and it is not installed", "pip install 'optimum-clp[plots]'")
        )
    if not section or not section.get(key):
        remedy = f"Plot a report whose {name} stage has run"
        raise ConfigurationError(Problem(f"report.{name}", section, f"there is no {key} to draw", remedy))
    return section


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: str | os.PathLike) -> Path:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _drawable(value: Any) -> bool:
    return value is not None and math.isfinite(value)
