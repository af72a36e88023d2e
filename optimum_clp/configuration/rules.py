"""Rules for single values: whether one holds, what it says, and what to do."""

import math
from collections.abc import Callable
from typing import Any

from ..errors import Problem

Rule = tuple[Callable[[Any], bool], str, str]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _between(low: float, high: float, open_ends: bool = False) -> Rule:
    def holds(value: Any) -> bool:
        return _is_number(value) and (low < value < high if open_ends else low <= value <= high)

    shown = f"between {low} and {high}" + (", both excluded" if open_ends else "")
    return holds, f"it must be a number {shown}", f"Choose a number {shown}"


def _positive() -> Rule:
    return lambda v: _is_number(v) and v > 0, "it must be a number above 0", "Choose a number above 0"


def _not_negative() -> Rule:
    return lambda v: _is_number(v) and v >= 0, "it must be a number of at least 0", "Choose 0 or more"


def _integer(low: int, high: int | None = None) -> Rule:
    shown = f"at least {low}" if high is None else f"from {low} to {high}"

    def holds(value: Any) -> bool:
        return (
            isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
        )

    return holds, f"it must be a whole number {shown}", f"Choose a whole number {shown}"


def _one_of(*values: Any) -> Rule:
    shown = ", ".join(repr(v) for v in values)
    return (
        lambda v: any(type(v) is type(x) and v == x for x in values),
        f"it must be one of {shown}",
        f"Choose one of {shown}",
    )


def _boolean() -> Rule:
    return lambda v: isinstance(v, bool), "it must be True or False", "Choose True or False"


def _text() -> Rule:
    return lambda v: isinstance(v, str) and v != "", "it must be a string that is not empty", "Give a string"


def _or_none(rule: Rule) -> Rule:
    return lambda v: v is None or rule[0](v), f"{rule[1]}, or None", f"{rule[2]}, or None"


def _check(name: str, value: Any, rule: Rule) -> list[Problem]:
    holds, text, remedy = rule
    return [] if holds(value) else [Problem(name, value, text, remedy)]
