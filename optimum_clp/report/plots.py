"""Pictures of the search and of endpoint tuning, made from the report alone. matplotlib is an optional extra."""

import importlib.util
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from .report import CLPReport
from .tables import describe_loss, is_known

logger = logging.getLogger(__name__)

_REMEDY = "pip install 'optimum-clp[plots]'"
SEARCH_PLOT = "plots/search.png"
TUNING_PLOT = "plots/tuning.png"
# Okabe and Ito's palette, which colour-blind readers can tell apart
_BLUE, _VERMILION, _GREY = "#0072B2", "#D55E00", "#767676"
_CROWD = 40  # more bars than these are drawn thinner


def plots_available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def write_plots(report: CLPReport, folder: str | os.PathLike) -> list[Path]:
    """Write every plot that `report` has figures for; none, and a notice, if matplotlib is not installed.

    Args:
        report ([`CLPReport`]): Its `search` and `tuning` sections are drawn.
        folder (`str` or `os.PathLike`): The files are `plots/search.png` and `plots/tuning.png` in it.

    Returns:
        `list[Path]`: The files that were written.
    """
    drawn = [(plot_search, SEARCH_PLOT)] if report.search and report.search.get("scored") else []
    drawn += [(plot_tuning, TUNING_PLOT)] if report.tuning and report.tuning.get("history") else []
    if drawn and not plots_available():
        logger.warning(
            f"plots: {' and '.join(name for _, name in drawn)} are left out, as matplotlib is not installed "
            f"({_REMEDY} brings it); report.html needs none and has the same figures."
        )
        return []
    return [plot(report, Path(folder) / name) for plot, name in drawn]


def plot_search(report: CLPReport, path: str | os.PathLike) -> Path:
    """Draw why these layers: the KL of every scored cut, the layers' importance, and the gate's way if there was a gate.

    Args:
        report ([`CLPReport`]): With a `search` section.
        path (`str` or `os.PathLike`): PNG file; its folder is made if missing.

    Returns:
        `Path`: `path`.

    Raises:
        ConfigurationError: If matplotlib is not installed, or if no cut was scored.
    """
    search = _section(report.search, "search", "scored")
    importance = layer_importance(search)
    steps = [entry for entry in search.get("trajectory") or [] if is_known(entry["start"])]
    ratios = [3.0]
    ratios += [1.6] if any(map(is_known, importance)) else []
    ratios += [2.0] if steps else []
    figure = _figure(9.6, 0.9 + 1.05 * sum(ratios))
    panels = list(figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0])
    panels[0].set_title(
        f"{search['num_removed']} of {search['num_layers']} layers removed, strategy: {strategy_name(search)}"
    )
    panels[-1].set_xlabel("layer")
    panels[-1].set_xlim(-0.75, search["num_layers"] - 0.25)
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    _draw_scores(panels[0], search)
    if steps:
        _draw_trajectory(panels.pop(), steps)
    if len(panels) > 1:
        _draw_importance(panels[1], search, importance)
    for axes in figure.axes:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.align_ylabels()
    return _save(figure, path)


def segments_of(entry: Mapping[str, Any]) -> list[list[int]]:
    """The `[start, stop]` of each segment of a scored cut; older reports have only one, without a list."""
    return [list(bounds) for bounds in entry.get("segments") or [[entry["start"], entry["stop"]]]]


def layers_of(segments: Iterable[Sequence[int]]) -> list[int]:
    """The layers in `[start, stop]` segments."""
    return [layer for start, stop in segments for layer in range(start, stop)]


def strategy_name(search: Mapping[str, Any]) -> str:
    """A search's strategy; for `auto` also what it used."""
    asked, used = search["strategy"], search.get("used_strategy")
    return asked if used in (None, asked) else f"{asked} (used {used})"


def layer_importance(search: Mapping[str, Any]) -> list[float | None]:
    """How much each layer matters, for any strategy.

    Args:
        search (`dict`): The `search` section of a report.

    Returns:
        `list[float | None]`: The strategy's own scores if it ranks layers (`layer_scores`). Otherwise the smallest KL
        among the scored cuts that contain the layer, which is how cheap it is at best to lose it; `None` where no
        scored cut contains it.
    """
    if search.get("layer_scores"):
        return list(search["layer_scores"])
    importance: list[float | None] = [None] * search["num_layers"]
    for entry in search["scored"]:
        if is_known(entry["kl"]):
            for layer in layers_of(segments_of(entry)):
                known = importance[layer]
                importance[layer] = entry["kl"] if known is None else min(known, entry["kl"])
    return importance


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
    if is_known(untuned):
        axes.axhline(untuned, color=_GREY, linestyle="--", linewidth=1.5, label="validation, not tuned")
    for key, label, color, marker in (
        ("train_loss", "train", _BLUE, "s"),
        ("validation_loss", "validation", _VERMILION, "o"),
    ):
        points = [(entry["step"], entry[key]) for entry in tuning["history"] if is_known(entry.get(key))]
        axes.plot(*_columns(points), color=color, marker=marker, markersize=4, linewidth=1.5, label=label)
    best = tuning.get("best_validation_loss")
    if tuning.get("improved") and is_known(best):
        axes.plot([tuning["best_step"]], [best], "o", markersize=11, fillstyle="none", color=_VERMILION, label="kept")
    title = f"Tuning of layers {', '.join(map(str, tuning['layers']))}, loss: {describe_loss(tuning['loss'])}"
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.legend(frameon=False)
    return _save(figure, path)


def _draw_scores(axes, search: dict[str, Any]) -> None:
    scored = [entry for entry in search["scored"] if is_known(entry["kl"])]
    chosen = [list(bounds) for bounds in search["segments"]]
    rows = max((entry.get("num_rows") or 0 for entry in scored), default=0)
    single = {entry["start"]: entry["kl"] for entry in scored if len(segments_of(entry)) == 1}
    if len(single) > 1:
        # a start that was not scored breaks the line
        line = [single.get(start, math.nan) for start in range(search["num_layers"])]
        axes.plot(range(search["num_layers"]), line, color=_BLUE, linewidth=1, alpha=0.4)
    for fewer, alpha, label, fill in ((False, 1.0, "", {}), (True, 0.45, ",\nfewer rows", {"mfc": "white"})):
        group = [entry for entry in scored if ((entry.get("num_rows") or rows) < rows) == fewer]
        style = {"color": _BLUE, "alpha": alpha}
        alone = [entry for entry in group if len(segments_of(entry)) == 1]
        if alone:
            points = _columns([(entry["start"], entry["kl"]) for entry in alone])
            errors = [entry["standard_error"] if is_known(entry.get("standard_error")) else 0.0 for entry in alone]
            style_of_points = {"marker": "o", "markersize": 5, "linestyle": "none", "capsize": 2, **style, **fill}
            axes.errorbar(*points, yerr=errors, label=f"segment, at its first layer{label}", **style_of_points)
        several = [(entry["kl"], segments_of(entry)) for entry in group if 1 < len(segments_of(entry))]
        bars = [(kl, segments) for kl, segments in several if segments != chosen]
        _draw_spans(axes, bars, label=f"several segments{label}", **style)
    best = [entry for entry in scored if segments_of(entry) == chosen]
    if len(chosen) > 1:
        bars = [(entry["kl"], chosen) for entry in best]
        _draw_spans(axes, bars, linewidth=5, color=_VERMILION, label="chosen")
    else:
        points = _columns([(entry["start"], entry["kl"]) for entry in best])
        ring = {"markersize": 12, "fillstyle": "none", "mew": 2, "zorder": 3}
        axes.plot(*points, "o", color=_VERMILION, linestyle="none", label="chosen", **ring)
    axes.set_ylabel("KL to dense, standard error\n(nats per token)")
    _scale(axes, [entry["kl"] for entry in scored])


def _draw_spans(axes, lines: Sequence[tuple[float, Sequence[Sequence[float]]]], **style: Any) -> None:
    """A horizontal bar over the layers of every segment, at its line's height; a layer is one wide, around its number."""
    if not lines:
        return
    bars = [(height, start - 0.5, stop - 0.5) for height, segments in lines for start, stop in segments]
    crowded = len(lines) > _CROWD
    axes.hlines(*zip(*bars, strict=True), capstyle="butt", **{"linewidth": 0.8 if crowded else 2.5, **style})
    gaps = [(height, a[1] - 0.5, b[0] - 0.5) for height, segments in lines for a, b in pairwise(segments)]
    if gaps and not crowded:
        thin = {"linewidth": 0.6, "linestyle": ":", "alpha": 0.5 * style.get("alpha", 1.0)}
        axes.hlines(*zip(*gaps, strict=True), color=style["color"], **thin)


def _draw_importance(axes, search: dict[str, Any], importance: Sequence[float | None]) -> None:
    gone = set(layers_of(search["segments"]))
    known = [(layer, value) for layer, value in enumerate(importance) if is_known(value)]
    for removed, color, label in ((False, _BLUE, "stays"), (True, _VERMILION, "removed")):
        bars = [(layer, value) for layer, value in known if (layer in gone) == removed]
        if bars:
            axes.bar(*_columns(bars), width=0.8, color=color, label=label)
    ranks = bool(search.get("layer_scores"))
    unknown = sorted(set(range(search["num_layers"])) - {layer for layer, _ in known})
    if unknown:
        # at the foot of the panel, whatever its scale
        marks = {"color": _GREY, "linestyle": "none", "markersize": 4, "transform": axes.get_xaxis_transform()}
        label = "not known" if ranks else "in no scored cut"
        axes.plot(unknown, [0.04] * len(unknown), "x", label=label, **marks)
    name = search.get("used_strategy") or search["strategy"]
    axes.set_ylabel(f"importance\n({name})" if ranks else "smallest KL of\na scored cut with it")
    _scale(axes, [value for _, value in known])


def _draw_trajectory(axes, steps: Sequence[dict[str, Any]]) -> None:
    """One valley: its KL at every place that was looked at, a line for each step. Several: where they were, step by step."""
    first = min(entry["step"] for entry in steps)
    swept = [entry for entry in steps if entry["step"] == first]
    if len(swept) == 1:
        swept = []
    later = [entry for entry in steps if entry not in swept]
    if any(len(_valleys(entry)) > 1 for entry in steps):
        scan = _columns([(start, entry["step"]) for entry in swept for start, _ in _valleys(entry)])
        if swept:
            axes.plot(*scan, "x", color=_GREY, linestyle="none", label="tried to begin from")
        spans = [(entry["step"], [(start, start + length) for start, length in _valleys(entry)]) for entry in later]
        if spans:
            _draw_spans(axes, spans, color=_VERMILION, alpha=0.45, label="gate's valleys")
            _draw_spans(axes, spans[-1:], linewidth=5, color=_VERMILION, label="final gate")
        axes.set_ylabel("gate step")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.invert_yaxis()
        return
    if swept:
        axes.plot(*_by_start(swept), color=_GREY, marker="x", linewidth=1, label="sweep along the stack")
    numbers = sorted({entry["step"] for entry in later})
    for number in numbers:
        label = "steeper gates, the last darkest" if number == numbers[-1] else None
        alpha = 0.25 + 0.75 * (1 + numbers.index(number)) / len(numbers)
        looks = [entry for entry in later if entry["step"] == number]
        axes.plot(*_by_start(looks), color=_VERMILION, marker=".", linewidth=1, alpha=alpha, label=label)
    axes.set_ylabel("KL under the gate\n(nats per token)")
    _scale(axes, [entry["loss"] for entry in steps if is_known(entry["loss"])])


def _by_start(steps: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return _columns(sorted((entry["start"], entry["loss"]) for entry in steps if is_known(entry["loss"])))


def _valleys(entry: dict[str, Any]) -> Sequence[Sequence[float]]:
    return entry.get("valleys") or [(entry["start"], 0.0)]


def _scale(axes, values: Sequence[float]) -> None:
    """Logarithmic where the first layers would dwarf all others; else from 0."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    if values and min(values) > 0 and max(values) > 8 * min(values):
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(values) / 2)
        few = max(values) < 500 * min(values)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=12 if few else 7))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=min([0.0, *values]))


def _section(section: dict[str, Any] | None, name: str, key: str) -> dict[str, Any]:
    if not plots_available():
        raise ConfigurationError.of("matplotlib", None, "plots need it, and it is not installed", _REMEDY)
    if not section or not section.get(key):
        remedy = f"Plot a report whose {name} stage has run"
        raise ConfigurationError.of(f"report.{name}", section, f"there is no {key} to draw", remedy)
    return section


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: str | os.PathLike) -> Path:
    for axes in figure.axes:
        axes.set_axisbelow(True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
