"""JSON schema (draft 2020-12) of the report's sections, made from the dataclasses that they are."""

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from ..segments import LayerSegment
from .section import Key, key_of, keys_of

SEGMENTS = {
    "description": "Half-open [start, stop] in the dense model's numbering, zero-based.",
    "type": "array",
    "minItems": 1,
    "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2},
}
"""What every list of segments refers to as `#/$defs/segments`."""
_SIMPLE = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string"}
_ADDED = "Not in reports of earlier versions."


def schema_of(annotation: Any, key: Key | None = None) -> dict[str, Any]:
    """The schema of a value.

    Args:
        annotation: Its type: of a scalar, list, tuple, dictionary, dataclass or `TypedDict`, `| None` where it may be
            missing; or `Annotated[type, Key(...)]`.
        key ([`Key`], *optional*): What holds of it, if the annotation does not say it.

    Raises:
        TypeError: If a report cannot hold such a type.
    """
    kind, own = key_of(annotation)
    key = key or own
    said = {"description": key.description, "$comment": _ADDED if key.added else ""}
    return {**{name: text for name, text in said.items() if text}, **_type(kind, key)}


def for_reading(schema: Any) -> Any:
    """A schema that also takes what a later version may add: keys that it does not know."""
    if isinstance(schema, list):
        return [for_reading(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: for_reading(part) for key, part in schema.items() if (key, part) != ("additionalProperties", False)}


def _type(kind: Any, key: Key) -> dict[str, Any]:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        (kind,) = [part for part in parts if part is not type(None)]
        return _nullable(_type(kind, key))
    if key.shape is not None:
        return _object(key.shape)
    if len(key.choices) == 1:
        return {"const": key.choices[0]}
    if key.choices:
        return {"enum": list(key.choices)}
    if kind in _SIMPLE:
        schema = {"type": _SIMPLE[kind], **_bounds(key)}
        return schema if key.finite or kind is not float else _nullable(schema)
    if kind == tuple[LayerSegment, ...]:
        return {"$ref": "#/$defs/segments"}
    if is_dataclass(kind) or typing.is_typeddict(kind):
        return _object(typing.cast(type, kind))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        least = {"minProperties": key.min_items} if key.min_items else {}
        return {"type": "object", "additionalProperties": schema_of(parts[1]), **least}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return {"type": "array", **_items(origin, parts, key)}
    raise TypeError(f"{kind} is no type of the report")


def _object(shape: type) -> dict[str, Any]:
    keys = keys_of(shape)
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, (_, key) in keys.items() if not (key.added or key.sparse)],
        "properties": {name: schema_of(kind, key) for name, (kind, key) in keys.items()},
    }


def _items(origin: type, parts: tuple[Any, ...], key: Key) -> dict[str, Any]:
    if issubclass(origin, tuple) and parts[-1] is not ...:
        return {"prefixItems": [schema_of(part) for part in parts], "items": False, "minItems": len(parts)}
    least: dict[str, Any] = {"minItems": key.min_items} if key.min_items else {}
    unique = {"uniqueItems": True} if key.unique else {}
    return {"items": schema_of(parts[0]), **least, **unique}


def _bounds(key: Key) -> dict[str, Any]:
    rules = {
        "minimum": key.minimum,
        "exclusiveMinimum": key.exclusive_minimum,
        "maximum": key.maximum,
        "pattern": key.pattern,
    }
    return {name: rule for name, rule in rules.items() if rule is not None}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    if "type" not in schema:
        raise TypeError(f"{schema} cannot be null as well")
    return schema if "null" in schema["type"] else {**schema, "type": [schema["type"], "null"]}
