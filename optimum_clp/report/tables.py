"""Numbers and tables, for terminals and for Markdown."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

Show = str | Callable[[Any], str]
"""How a value is written: a format specification such as `".4f"`, or a function."""


def is_known(value: float | None) -> TypeGuard[float]:
    """Whether a figure was measured, and is a finite number."""
    return value is not None and math.isfinite(value)


def cell(value: Any, show: Show = "", missing: str = "-") -> str:
    """A value as text; `missing` for `None`, NaN and infinities."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return missing
    return show(value) if callable(show) else format(value, show)


def format_bytes(count: float) -> str:
    """`count` bytes with a decimal unit (1 MB is 1,000,000 bytes)."""
    return _in_units(count, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))) or f"{count:.0f} B"


def memory_cell(memory: Mapping[str, Any]) -> str:
    """The peak of a row's `memory`."""
    return format_bytes(memory["peak"])


def format_count(count: float) -> str:
    """`count` with a decimal unit (1 M is 1,000,000)."""
    return _in_units(count, (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))) or f"{count:.0f}"


def _in_units(count: float, units: Iterable[tuple[str, float]]) -> str | None:
    return next((f"{count / size:.2f} {unit}" for unit, size in units if count >= size), None)


def describe_loss(weights: dict[str, float]) -> str:
    """The tuning loss as `"kd"` or `"0.9 kd + 0.1 ce"`."""
    used = {name: weight for name, weight in weights.items() if weight > 0}
    if len(used) == 1:
        return next(iter(used))
    return " + ".join(f"{weight:g} {name}" for name, weight in used.items())


class Column(NamedTuple):
    """A column of a table whose rows are records.

    Args:
        key (`str`): Of the value in each record.
        title (`str`): What stands above it.
        show (`str` or `Callable`): How its values are written.
    """

    key: str
    title: str
    show: Show = ""


def record_cells(
    records: Sequence[Mapping[str, Any]], columns: Iterable[Column], missing: str = "-"
) -> list[list[str]]:
    """The titles, and a row of cells for each record; a column without any value is left out.

    Args:
        records (`Sequence[Mapping]`): What the rows are about.
        columns (`Iterable[Column]`): What is shown of each.
        missing (`str`): Stands for a value that is not there, or is no finite number.
    """
    used = [column for column in columns if any(record.get(column.key) is not None for record in records)]
    rows = [[cell(record.get(column.key), column.show, missing) for column in used] for record in records]
    return [[column.title for column in used], *rows]


def text_table(
    rows: Iterable[Sequence[Any]], align: str = "lr", *, ruled: bool = False, widths: Sequence[int] = ()
) -> str:
    """Rows of cells for a terminal, two spaces apart.

    Args:
        rows (`Iterable[Sequence]`): The cells; what is not text is made into it.
        align (`str`): `l` or `r` for each column; the last letter also holds for all columns after it.
        ruled (`bool`): A line of dashes below the first row.
        widths (`Sequence[int]`): The least width of the first columns, in characters.

    Returns:
        `str`: One line for each row, without white space at its end.
    """
    cells = [list(map(str, row)) for row in rows]
    if not cells:
        return ""
    least = [*widths, *[0] * len(cells[0])]
    widest = [max(least[i], *(len(row[i]) for row in cells)) for i in range(len(cells[0]))]
    if ruled:
        cells.insert(1, ["-" * width for width in widest])
    letters = align.ljust(len(widest), align[-1])
    return "\n".join(
        "  ".join(
            text.ljust(width) if letter == "l" else text.rjust(width)
            for text, letter, width in zip(row, letters, widest, strict=False)
        ).rstrip()
        for row in cells
    )


def markdown_table(rows: Sequence[Sequence[str]], align: str = "-") -> str:
    """Rows of cells as a Markdown table; the first row is its head.

    Args:
        rows (`Sequence[Sequence[str]]`): The cells.
        align (`str`): As in [`text_table`]; `-` leaves it to the reader's program.
    """
    marks = [{"l": ":--", "r": "--:", "-": " --- "}[letter] for letter in align.ljust(len(rows[0]), align[-1])]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "|".join(marks[: len(rows[0])]) + "|")
    return "\n".join(lines)


def threads(count: int) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count} thread{'s' if count != 1 else ''}"


def form_line(choice: Mapping[str, Any]) -> str:
    """What was chosen for speed, and by which ratio, in a clause.

    Args:
        choice (`Mapping`): `export.speed_choice` of the report.
    """
    form = f"groups of {choice['group_size']}, accuracy level {choice['accuracy_level']}, a head of {choice['head_bits']} bits"
    if (choice["group_size"], choice["accuracy_level"], choice["head_bits"]) == (32, 4, 4):
        return f"{form}, the plain one: none is faster by more than such ratios scatter"
    parts = f"prompt {choice['prompt_speed']:.2f}, decoding {choice['decode_speed']:.2f}"
    return f"{form}, {choice['speed']:.2f} times as fast as groups of 32, level 4 and 4 bits ({parts}; {threads(choice['threads'])})"
