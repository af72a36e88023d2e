"""A section of the report is a dataclass of the stage that fills it: its fields are the keys, and say what they mean.

`to_section` makes the JSON-ready section of such a dataclass, [`~report.schema.schema_of`] its JSON schema. A field is a
key as it stands; `Annotated[type, Key(...)]` says more. A property is a key if its type is annotated so. A dictionary
with fixed keys is a `TypedDict`.
"""

import functools
import inspect
import math
from dataclasses import dataclass, fields, is_dataclass
from pathlib import PurePath
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from ..segments import LayerSegment


@dataclass(frozen=True)
class Key:
    """What a key of the report means, and what holds of its value.

    A float may be NaN or infinite, which is `null` in JSON; where it never is, say `finite`.

    Args:
        description (`str`): A sentence, with its unit.
        minimum, exclusive_minimum, maximum (`float`, *optional*): Bounds of a number.
        choices (`tuple`): The only values; any if empty.
        pattern (`str`, *optional*): Regular expression that a string matches.
        min_items (`int`): Least length of a list or a dictionary.
        unique (`bool`): No value of a list comes twice.
        finite (`bool`): Of a float: neither NaN nor infinite.
        added (`bool`): Reports of earlier versions do not have it.
        shape (`type`, *optional*): Dataclass or `TypedDict` that says the keys of a dictionary which a door hands over.
        sparse (`bool`): Left out where it is `None` or an empty tuple.
        reported (`bool`): `False` for a field that is not in the report.
    """

    description: str = ""
    minimum: float | None = None
    exclusive_minimum: float | None = None
    maximum: float | None = None
    choices: tuple[Any, ...] = ()
    pattern: str | None = None
    min_items: int = 0
    unique: bool = False
    finite: bool = False
    added: bool = False
    shape: type | None = None
    sparse: bool = False
    reported: bool = True


def to_section(stage: Any) -> dict[str, Any]:
    """What a stage did, as the JSON-ready section of the report.

    Args:
        stage (`dataclass`): The stage's result.

    Returns:
        `dict`: NaN and infinities are `None`, segments `[start, stop]`, paths the last part of their name.
    """
    shape: Any = type(stage)
    section = {}
    for name, (_, key) in keys_of(shape).items():
        value = getattr(stage, name)
        if not (key.sparse and (value is None or value == ())):
            section[name] = json_ready(value)
    return section


def json_ready(value: Any) -> Any:
    """A value as JSON can hold it, made anew; see [`to_section`]."""
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, LayerSegment):
        return value.to_list()
    if is_dataclass(value) and not isinstance(value, type):
        return to_section(value)
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return value.name  # the folders above it are nobody's business
    if hasattr(value, "item"):  # a scalar of NumPy or PyTorch
        return json_ready(value.item())
    return str(value)


@functools.cache
def keys_of(shape: type) -> dict[str, tuple[Any, Key]]:
    """The keys of a section: type and meaning of each.

    Args:
        shape (`type`): A dataclass, or a `TypedDict`.
    """
    found = {}
    for name, member in inspect.getmembers_static(shape, lambda member: isinstance(member, property)):
        annotation = get_type_hints(member.fget, include_extras=True).get("return")
        if any(isinstance(part, Key) for part in getattr(annotation, "__metadata__", ())):
            found[name] = key_of(annotation)
    hints = get_type_hints(shape, include_extras=True)
    names = [field.name for field in fields(shape)] if is_dataclass(shape) else hints
    found |= {name: key_of(hints[name]) for name in names}
    return {name: (kind, key) for name, (kind, key) in found.items() if key.reported}


def key_of(annotation: Any) -> tuple[Any, Key]:
    """The type that an annotation is about, and its meaning."""
    if get_origin(annotation) is not Annotated:
        return annotation, Key()
    kind, *parts = get_args(annotation)
    return kind, next((part for part in parts if isinstance(part, Key)), Key())
