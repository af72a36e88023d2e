"""Numbers and tables for terminals and Markdown."""

import math
from typing import Any


def format_bytes(count: float) -> str:
    """`count` bytes with a decimal unit (1 MB is 1,000,000 bytes)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def format_count(count: float) -> str:
    """`count` with a decimal unit (1 M is 1,000,000)."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f}"


def describe_loss(weights: dict[str, float]) -> str:
    """The tuning loss as `"kd"` or `"0.9 kd + 0.1 ce"`."""
    used = {name: weight for name, weight in weights.items() if weight > 0}
    if len(used) == 1:
        return next(iter(used))
    return " + ".join(f"{weight:g} {name}" for name, weight in used.items())


def cell(value: Any, show) -> str:
    usable = value is not None and (not isinstance(value, float) or math.isfinite(value))
    return show(value) if usable else "-"


def text_table(cells: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_table(cells: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    lines.insert(1, "|:--" + "|--:" * (len(cells[0]) - 1) + "|")
    return "\n".join(lines)
