"""Sizes of memory as people write them: `"24GiB"`, `"500 MB"`, `1500000000`."""

import re
from typing import Any

from ..errors import shown
from .rules import Rule, is_number, quantity

CPU = "cpu"
"""What `max_memory` calls main memory, as accelerate does."""


# as accelerate reads them
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_MOST = 2**50
_NUMBER = re.compile(r"[0-9]{1,3}")
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


def memory_bounds(value: Any) -> dict[str, int]:
    """Bounds on memory in bytes, for each device as accelerate names them.

    Args:
        value (`str`, `int`, `dict` or `None`): A size is the bound of main memory. A dictionary, or a string such as
            `"0=20GiB,cpu=64GiB"`, has one for each device: `cpu`, and numbers of accelerators.

    Returns:
        `dict[str, int]`: By `"cpu"` and the accelerators' numbers as strings; empty without a bound.

    Raises:
        ValueError: If it is none of these, or a device stands there twice.
    """
    if value is None:
        return {}
    if isinstance(value, str) and "=" in value:
        pairs = [part.partition("=")[::2] for part in value.split(",")]
    elif isinstance(value, dict):
        pairs = list(value.items())
    else:
        return {CPU: size_in_bytes(value)}
    found: dict[str, int] = {}
    for device, size in pairs:
        name = str(device).strip() if isinstance(device, (str, int)) and not isinstance(device, bool) else ""
        if name in found or (name != CPU and not _NUMBER.fullmatch(name)):
            raise ValueError(f"{shown(device)} is no device, or stands there twice")
        found[name] = size_in_bytes(size)
    if not found:
        raise ValueError("no device is named")
    return found


def main_memory(value: Any) -> int | None:
    """Of `max_memory`, the bound on what this process holds in main memory, in bytes; `None` without one."""
    return memory_bounds(value).get(CPU)


def accelerator_memory(value: Any) -> dict[int, int]:
    """Of `max_memory`, the bounds on accelerators in bytes, by their numbers."""
    return {int(name): size for name, size in memory_bounds(value).items() if name != CPU}


def with_names(value: Any) -> Any:
    """`max_memory` as a recipe keeps it: the keys of a dictionary are strings, as JSON has them."""
    return {str(key): size for key, size in value.items()} if isinstance(value, dict) else value


def memory_size() -> Rule:
    """Sizes above 0: bytes, or a string such as `"24GiB"`; of main memory, or for each device."""

    def smallest(value: Any) -> int:
        sizes = memory_bounds(value).values()
        if max(sizes, default=0) > _MOST:
            raise ValueError(f"{shown(value)} is more than there is")
        return min(sizes, default=0)

    wanted = 'a size of memory above 0, such as "24GiB", "500MB" or a number of bytes, or one for each device: "0=20GiB,cpu=64GiB"'
    return quantity(smallest, _MOST, wanted, int)
