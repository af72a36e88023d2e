"""What the page draws of the sections `search` and `tuning` of a report, with the words around it."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from . import charts
from .charts import NARROW, WIDE, ScoredLine, Series, layers_text
from .plots import layer_importance, layers_of, segments_of, strategy_name
from .tables import cell, describe_loss, format_count, is_known

# rows of the table behind the landscape; the chart has all of them
_LISTED_CUTS = 1000


def search_drawings(search: Mapping[str, Any] | None, cut: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Why these layers: the landscape of all scored cuts and what lies below it, in both widths, and a table of the cuts.

    Args:
        search (`Mapping` or `None`): The `search` section of a report.
        cut (`Mapping` or `None`): Its `cut` section, which may be another choice than the search's.

    Returns:
        `dict` or `None`: What the template reads; `None` if nothing was scored.
    """
    if not search or not search.get("scored"):
        return None
    cuts = list(_scored_lines(search))
    gone = set(layers_of(search["segments"]))
    listed = sorted((line for line in cuts if is_known(line.kl)), key=lambda line: line.kl)
    return {
        "strategy": strategy_name(search),
        "drawings": [
            (
                width,
                charts.landscape(search, cuts, width),
                charts.strip(search, gone, width),
                charts.importance(search, layer_importance(search), gone, width),
                _gates_way(search, width),
            )
            for width in (WIDE, NARROW)
        ],
        "ranks": bool(search.get("layer_scores")),
        "by_hand": cut is not None and cut["segments"] != search["segments"],
        "several": any(len(line.segments) > 1 for line in cuts),
        "fewer": any(line.fewer for line in cuts),
        "number": len(cuts),
        "listed": [
            (layers_text(line.segments), f"{line.kl:.4f}", cell(line.error, ".4f"), cell(line.num_rows), line.chosen)
            for line in listed[:_LISTED_CUTS]
        ],
        "work": search.get("forward_equivalents"),
    }


def _scored_lines(search: Mapping[str, Any]) -> Iterator[ScoredLine]:
    most = max((entry.get("num_rows") or 0 for entry in search["scored"]), default=0)
    chosen = [list(bounds) for bounds in search["segments"]]
    for entry in search["scored"]:
        segments, error, rows = segments_of(entry), entry.get("standard_error"), entry.get("num_rows")
        kl = entry["kl"] if is_known(entry["kl"]) else float("nan")
        words = f"Layers {layers_text(segments)}: KL {kl:.4g}"
        words += f" ± {error:.2g}" if is_known(error) else ""
        words += f", on {rows} row{'s' if rows != 1 else ''}" if rows else ""
        if is_known(entry.get("behind")) and segments != chosen:
            words += f"; {entry['behind']:+.3g} beside the chosen one"
            words += f" (± {entry['behind_error']:.2g})" if is_known(entry.get("behind_error")) else ""
        if is_known(entry.get("repaired_kl")):
            words += f"; {entry['repaired_kl']:.4g} after a cheap repair"
        words += " (chosen)" if segments == chosen else ""
        spans = tuple((start, stop) for start, stop in segments)
        yield ScoredLine(spans, kl, error, rows, (rows or most) < most, segments == chosen, words)


def _gates_way(search: Mapping[str, Any], width: int) -> Markup | None:
    steps = [s for s in search.get("trajectory") or () if is_known(s["start"]) and is_known(s["loss"])]
    if not steps:
        return None
    first = min(step["step"] for step in steps)

    def told(step: Mapping[str, Any]) -> tuple[float, float, str]:
        words = f"step {step['step']}: valley at {step['start']:.2f}, steepness {step['steepness']:.3g}, KL {step['loss']:.4g}"
        return step["start"], step["loss"], words

    swept = sorted(told(step) for step in steps if step["step"] == first)
    later = [told(step) for step in steps if step["step"] != first]
    series = [Series("look along the stack", swept, "s2"), Series("gate", later, "s1", line=False)]
    return charts.curves("The gate's way", series, "layer", "KL under the gate", width)


def tuning_drawings(tuning: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """How the cut was healed: the losses by kind of text, stage by stage, and what pilots foretold, in both widths.

    Args:
        tuning (`Mapping` or `None`): The `tuning` section of a report.

    Returns:
        `dict` or `None`: What the template reads; `None` without tuning.
    """
    if not tuning:
        return None
    history = tuning["history"]
    kinds = sorted({kind for entry in history for kind in entry.get("by_kind") or ()})
    series = [_curve("validation", history, lambda entry: entry["validation_loss"], "s1")]
    series += [
        _curve(f"validation: {kind}", history, lambda entry, kind=kind: (entry.get("by_kind") or {}).get(kind), style)
        for kind, style in zip(kinds, ("s2", "s3", "s4"), strict=False)
    ]
    series.append(_curve("train", history, lambda entry: entry.get("train_loss"), "s0"))
    series = [line for line in series if line.points]
    untuned, best = tuning.get("initial_validation_loss"), tuning.get("best_validation_loss")
    ring = None
    if tuning.get("improved") and is_known(best):
        ring = (tuning["best_step"], best, f"kept: step {tuning['best_step']:,}, {best:.4g} nats")
    levels = {"validation loss before tuning": untuned} if is_known(untuned) else {}
    stages = tuning.get("stages") or [tuning]
    ends = list(itertools.accumulate(stage["steps"] for stage in stages))
    borders = [
        (end, f"step {end:,}: from here with the loss {describe_loss(stage['loss'])}")
        for end, stage in zip(ends, stages[1:], strict=False)
    ]
    labels = ("Losses while tuning", series, "step", "nats per token")
    extras: dict[str, Any] = {"log_y": True, "levels": levels, "ring": ring, "borders": borders}
    return {
        "drawings": [(width, charts.curves(*labels, width, **extras)) for width in (WIDE, NARROW)],
        "legend": [(line.style, line.name) for line in series],
        "kept": ring is not None,
        "layers": tuning["layers"],
        "num_trainable": format_count(tuning["num_trainable"]),
        "stages": [
            (
                describe_loss(stage["loss"]),
                f"{stage['steps']:,}",
                f"{stage['num_tokens']:,}",
                f"{stage['learning_rate']:.2g}",
            )
            for stage in stages
        ],
        "before": cell(untuned, ".4f"),
        "after": cell(best, ".4f"),
        "improved": tuning["improved"],
        "seconds": f"{tuning['seconds']:,.0f}",
        "forecast": _forecast(tuning),
    }


def _curve(name: str, history: Any, value: Any, style: str) -> Series:
    points = [(entry["step"], value(entry)) for entry in history]
    known = [(step, loss, f"step {step:,}: {loss:.4g} nats") for step, loss in points if is_known(loss)]
    return Series(name, known, style)


def _forecast(tuning: Mapping[str, Any]) -> list[tuple[int, Markup | None]] | None:
    """What short pilots foretold, over the number of fresh tokens."""
    forecast = tuning.get("forecast")
    if not forecast:
        return None
    told = [(p["num_tokens"], p["loss"]) for p in forecast["pilots"] if is_known(p["loss"])]
    pilots = [(tokens, loss, f"{tokens:,} tokens: {loss:.4g} nats") for tokens, loss in told]
    foretold, spans = [], []
    for entry in forecast["predictions"]:
        if all(is_known(entry[key]) for key in ("loss", "low", "high")):
            words = (
                f"{entry['num_tokens']:,} tokens: {entry['loss']:.4g} ({entry['low']:.4g} to {entry['high']:.4g}) nats"
            )
            foretold.append((entry["num_tokens"], entry["loss"], words))
            spans.append((entry["num_tokens"], entry["low"], entry["high"], f"forecast, {words}"))
    series = [Series("pilot", pilots, "s2"), Series("forecast", foretold, "s1", line=False)]
    labels = ("What pilots foretold", series, "fresh tokens", "nats per token")
    return [(width, charts.curves(*labels, width, log_x=True, log_y=True, spans=spans)) for width in (WIDE, NARROW)]
