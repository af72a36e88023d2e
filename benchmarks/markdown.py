"""Markdown tables, whole or row by row."""

from collections.abc import Sequence


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def head(cells: Sequence[str]) -> str:
    """The first two lines of a table."""
    return f"{row(cells)}\n|{'---|' * len(cells)}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """All lines of a table, the first row its head."""
    return "\n".join([head(rows[0]), *map(row, rows[1:])]) + "\n"
