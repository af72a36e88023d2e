"""Sections of the report from dataclasses, and their schema, on a stage that is made up."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import jsonschema
import numpy as np
import pytest

from optimum_clp.report.schema import SEGMENTS, schema_of
from optimum_clp.report.section import Key, json_ready, to_section
from optimum_clp.segments import LayerSegment


class Start(TypedDict):
    kept: bool
    why: Annotated[str, Key("The reason.", choices=("a", "b"))]


@dataclass(frozen=True)
class Step:
    loss: float
    place: tuple[Annotated[float, Key(finite=True)], int] = (0.5, 1)


@dataclass(frozen=True)
class Stage:
    folder: Path
    segments: tuple[LayerSegment, ...]
    steps: Annotated[tuple[Step, ...], Key("All of them.", min_items=1)]
    start: Start | None
    share: Annotated[float, Key("Of the whole.", minimum=0, maximum=1, finite=True)]
    weights: dict[str, Annotated[float, Key(exclusive_minimum=0)]]
    tensor: Annotated[Any, Key(reported=False)] = None
    given: Annotated[dict[str, Any] | None, Key("By others.", shape=Step, sparse=True)] = None
    tried: Annotated[tuple[int, ...], Key(sparse=True, unique=True)] = ()
    note: Annotated[str | None, Key(added=True)] = None

    @property
    def first(self) -> Annotated[int, Key("First layer.", minimum=0)]:
        return self.segments[0].start

    @property
    def other(self) -> int:
        raise AssertionError("a property that is not annotated as a key is not read")


def stage(**changes):
    values = {
        "folder": Path("/home/someone/out"),
        "segments": (LayerSegment(1, 3),),
        "steps": (Step(math.nan), Step(0.5, (2.0, 3))),
        "start": {"kept": True, "why": "a"},
        "share": np.float64(0.25),
        "weights": {"kd": math.inf},
        "tensor": object(),
    }
    return Stage(**{**values, **changes})


SECTION = {
    "first": 1,
    "folder": "out",
    "segments": [[1, 3]],
    "steps": [{"loss": None, "place": [0.5, 1]}, {"loss": 0.5, "place": [2.0, 3]}],
    "start": {"kept": True, "why": "a"},
    "share": 0.25,
    "weights": {"kd": None},
    "note": None,
}
STEP = {
    "type": "object",
    "additionalProperties": False,
    "required": ["loss", "place"],
    "properties": {
        "loss": {"type": ["number", "null"]},
        "place": {
            "type": "array",
            "prefixItems": [{"type": "number"}, {"type": "integer"}],
            "items": False,
            "minItems": 2,
        },
    },
}
VALIDATOR = jsonschema.Draft202012Validator({**schema_of(Stage), "$defs": {"segments": SEGMENTS}})


def test_a_section_is_what_json_can_hold():
    found = to_section(stage())
    assert found == SECTION
    assert to_section(stage(tried=(2, 3), start=None)) == {**SECTION, "tried": [2, 3], "start": None}
    found["steps"].append("a copy")
    assert len(stage().steps) == 2
    assert json_ready({1: np.int64(3), "a": (True, None)}) == {"1": 3, "a": [True, None]}


def test_the_schema_of_a_section_says_all_that_its_fields_say():
    schema = schema_of(Stage)
    assert schema["type"] == "object" and schema["additionalProperties"] is False
    assert schema["required"] == ["first", "folder", "segments", "steps", "start", "share", "weights"]
    assert schema["properties"] == {
        "first": {"description": "First layer.", "type": "integer", "minimum": 0},
        "folder": {"type": "string"},
        "segments": {"$ref": "#/$defs/segments"},
        "steps": {
            "description": "All of them.",
            "type": "array",
            "minItems": 1,
            "items": STEP,
        },
        "start": {
            "type": ["object", "null"],
            "additionalProperties": False,
            "required": ["kept", "why"],
            "properties": {"kept": {"type": "boolean"}, "why": {"description": "The reason.", "enum": ["a", "b"]}},
        },
        "share": {"description": "Of the whole.", "type": "number", "minimum": 0, "maximum": 1},
        "weights": {"type": "object", "additionalProperties": {"type": ["number", "null"], "exclusiveMinimum": 0}},
        "given": {**STEP, "description": "By others.", "type": ["object", "null"]},
        "tried": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
        "note": {"$comment": "Not in reports of earlier versions.", "type": ["string", "null"]},
    }


@pytest.mark.parametrize(
    "change",
    [
        {"share": None},
        {"share": 1.5},
        {"start": {"kept": True, "why": "c"}},
        {"start": {"kept": True}},
        {"steps": []},
        {"steps": [{"loss": 1.0, "place": [1.0, 2, 3]}]},
        {"segments": []},
        {"tried": [1, 1]},
        {"given": {"loss": 1.0}},
        {"weights": {"kd": 0}},
        {"tensor": 1},
    ],
    ids=str,
)
def test_the_schema_refuses_what_a_field_rules_out(change):
    VALIDATOR.validate(SECTION)
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate({**SECTION, **change})


def test_a_type_that_json_cannot_hold_has_no_schema():
    with pytest.raises(TypeError, match="no type of the report"):
        schema_of(object)
    with pytest.raises(TypeError, match="cannot be null as well"):
        schema_of(Annotated[str | None, Key(choices=("a", "b"))])
