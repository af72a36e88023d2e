"""Lengths of time as people write them: `"20min"`, `"1h30min"`, `90`."""

import re

from ..errors import shown
from .rules import Rule, is_number, quantity

_UNITS = {"d": 86400.0, "h": 3600.0, "min": 60.0, "s": 1.0}
_LONGEST = 366 * _UNITS["d"]
_PATTERN = re.compile("".join(rf"(?:(?P<{unit}>\d+(?:\.\d+)?) *{unit})? *" for unit in _UNITS))


def seconds(value: str | float) -> float:
    """A length of time in seconds.

    Args:
        value (`str` or `float`): Seconds, or numbers with the units d, h, min, s, in this order.

    Raises:
        ValueError: If it is none.
    """
    if is_number(value):
        return float(value)
    found = _PATTERN.fullmatch(value.strip()) if isinstance(value, str) else None
    parts = {unit: number for unit, number in (found.groupdict() if found else {}).items() if number is not None}
    if not parts:
        raise ValueError(f"{shown(value)} is no length of time")
    return sum(float(number) * _UNITS[unit] for unit, number in parts.items())


def duration() -> Rule:
    """A length of time above 0: seconds, or a string such as `"20min"` or `"1h30min"`."""

    wanted = 'a length of time above 0 and below a year, such as 90 (seconds), "20min" or "1h30min"'
    return quantity(seconds, _LONGEST, wanted, float)
