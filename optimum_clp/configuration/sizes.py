"""Sizes of memory as people write them: `"24GiB"`, `"500 MB"`, `1500000000`."""

import re

from ..errors import shown
from .rules import Rule, is_number, quantity

# as accelerate reads them
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_MOST = 2**50
_PATTERN = re.compile(r"(\d+(?:\.\d+)?) *([a-z]*)", re.IGNORECASE)


def size_in_bytes(value: str | int) -> int:
    """A size in bytes.

    Args:
        value (`str` or `int`): Bytes, or a number with a unit: KB, MB, GB, TB of a thousand, KiB, MiB, GiB, TiB of 1024.

    Raises:
        ValueError: If it is none.
    """
    if is_number(value):
        return int(value)
    found = _PATTERN.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"{shown(value)} is no size")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def memory_size() -> Rule:
    """A size above 0: bytes, or a string such as `"24GiB"`."""

    wanted = 'a size of memory above 0, such as "24GiB", "500MB" or a number of bytes'
    return quantity(size_in_bytes, _MOST, wanted, int)
