"""Markdown tables of a folder of runs: what each method took, how near it is, what it recognises, how it answers."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import markdown
from benchmarks.recovery.chat_model.rivals import RIVALS
from benchmarks.recovery.chat_model.runs import EQUAL_TIME, ON_POLICY, read_json

Record = dict[str, Any]
Figure = Callable[[Record], float | None]
LABELS = {
    "dense": "dense",
    **{name: rival.label for name, rival in RIVALS.items() if not rival.trains},
    "closed_form": "closed form alone, ours",
    "ours": "**ours**",
    **{name: rival.label for name, rival in RIVALS.items() if rival.trains},
}
TEXTS = {"plain": "own plain text", "conversations": "own conversations", "c4": "C4", "wikitext": "WikiText"}
TASKS = {"piqa": "PIQA", "arc_easy": "ARC-easy", "lambada": "LAMBADA"}
# of `GenerationRow`, with what it is called here
ANSWERS = {
    "loops": "loops",
    "ended": "ends by itself",
    "length": "tokens",
    "dense_loss": "dense model's loss",
    "kl": "KL on its answers",
    "agreement": "first 32 agree",
    "json_parses": "JSON parses",
    "arithmetic_right": "arithmetic right",
}


def show(folder: Path) -> str:
    """All tables of all ratios.

    Args:
        folder (`Path`): With the records of `benchmarks.recovery.chat`.
    """
    records = [r for r in map(read_json, sorted(folder.glob("*.json"))) if isinstance(r, dict) and "method" in r]
    parts = []
    for ratio in sorted({r["ratio"] for r in records}):
        cells = _by_method([r for r in records if r["ratio"] == ratio])
        cut = next(iter(cells.values()))[0]["segment"]
        parts.append(f"## {100 * ratio:g} % of the layers: [{cut[0]}, {cut[1]})\n")
        parts += [_table(title, cells, columns) for title, columns in _tables().items()]
    return "\n".join(part for part in parts if part)


def _tables() -> dict[str, dict[str, tuple[Figure, int]]]:
    """For each table its columns: a figure of a record, and its digits."""
    return {
        "What it took": {
            "trained, M": (lambda r: r["num_trained"] / 1e6 if "num_trained" in r else None, 2),
            "tokens, k": (lambda r: r["num_tokens"] / 1e3 if "num_tokens" in r else None, 0),
            "minutes": (lambda r: _all_seconds(r) / 60, 1),
            "rate, 1e-4": (lambda r: r["rate"] * 1e4 if r.get("rate") else None, 2),
            "validation KL": (_reader("validation", "kl"), 3),
        },
        "KL to the dense model": {label: (_reader("evaluation", "texts", k, "kl"), 3) for k, label in TEXTS.items()},
        "Retention: dense perplexity over the model's": {
            label: (_reader("evaluation", "texts", k, "retention"), 3) for k, label in TEXTS.items()
        },
        "Recognition": {label: (_reader("evaluation", "tasks", k, "accuracy"), 3) for k, label in TASKS.items()},
        "Generation": {label: (_reader("evaluation", "generation", k), 3) for k, label in ANSWERS.items()},
    }


def _reader(*keys: str) -> Figure:
    def read(record: Record) -> float | None:
        found: Any = record
        for key in keys:
            found = (found or {}).get(key)
        return found

    return read


def _all_seconds(record: Record) -> float:
    return record.get("seconds", 0.0) + record.get("seconds_before", 0.0)


def _by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """In the order of `LABELS`, what is behind a name after the name alone."""
    methods = sorted({r["method"] for r in records}, key=lambda m: (list(LABELS).index(_base(m)), m))
    return {method: [r for r in records if r["method"] == method] for method in methods}


def _base(method: str) -> str:
    return method.removesuffix(ON_POLICY).removesuffix(EQUAL_TIME)


def _label(method: str) -> str:
    label = LABELS[_base(method)]
    label += ", as long as ours" if EQUAL_TIME in method else ""
    return label + (", then on-policy" if ON_POLICY in method else "")


def _table(title: str, cells: dict[str, list[Record]], columns: dict[str, tuple[Figure, int]]) -> str:
    """Nothing of what no record has."""
    found = {
        column: {m: _over_seeds([figure(r) for r in records], digits) for m, records in cells.items()}
        for column, (figure, digits) in columns.items()
    }
    known = [column for column, figures in found.items() if any(figures.values())]
    rows = [[title, "seeds", *known]]
    for method, records in cells.items():
        figures = [found[column][method] for column in known]
        if any(figures):
            rows.append([_label(method), str(len(records)), *figures])
    return markdown.table(rows) if known else ""


def _over_seeds(values: Sequence[float | None], digits: int) -> str:
    """The mean, and the smallest and the largest where they differ."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = (f"{value:.{digits}f}" for value in (min(known), max(known)))
    spread = "" if low == high else f" ({low} to {high})"
    return f"{statistics.mean(known):.{digits}f}{spread}"
