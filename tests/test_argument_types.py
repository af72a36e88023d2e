import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from optimum_clp.argument_types import check_arguments, check_methods
from optimum_clp.errors import ConfigurationError


@check_methods
class Door:
    def __init__(self, count: int = 1):
        self.count = count

    @classmethod
    def made(cls, path: str | os.PathLike) -> "Door":
        return cls()

    def takes(
        self,
        number: float | None = None,
        names: list[str] | None = None,
        parts: Iterable[int] | None = None,
        table: Mapping[str, int] | None = None,
        *,
        switch: bool = False,
        anything=None,
        **more: int,
    ) -> str:
        """Its docstring."""
        return "in"


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("number", "1", "it is of the type str, and must be a number or None. Give a number or None."),
        ("number", True, "it is of the type bool, and must be a number"),
        ("names", "abc", "it is of the type str, and must be a list or None"),
        ("names", ("a",), "it is of the type tuple, and must be a list"),
        ("parts", "abc", "it is of the type str, and must be a list or None"),
        ("parts", {"a": 1}, "it is of the type dict, and must be a list or None"),
        ("table", [1], "it is of the type list, and must be a dictionary or None"),
        ("switch", 1, "it is of the type int, and must be True or False"),
        ("switch", None, "it is of the type NoneType, and must be True or False"),
    ],
)
def test_kinds_that_no_annotation_names_are_refused(name, value, rule):
    with pytest.raises(ConfigurationError) as caught:
        Door().takes(**{name: value})
    assert str(caught.value).startswith(f"{name} is {value!r}: {rule}")


@pytest.mark.parametrize(
    "path", [5, None, b"x", "", "\0", "a\0b", "x" * 5000, "x" * 256, "a/" + "\u00e9" * 200, "\ud800"]
)
def test_paths_that_no_file_can_have_are_refused(path):
    with pytest.raises(ConfigurationError, match="^path is .{,400}$"):
        Door.made(path)


def test_what_the_annotations_name_goes_through():
    door = Door(2)
    assert door.count == 2 and Door.made("x" * 255) and Door.made(Path("a/b"))
    assert door.takes(1, ["a"], (n for n in (1, 2)), {"a": 1}, switch=True, anything=object(), other="x") == "in"
    assert door.takes(0.5, None, [LayerLike()]) == "in"
    assert Door.takes.__doc__ == "Its docstring."


class LayerLike:
    pass


def test_models_are_judged_by_their_own_door():
    from transformers import PreTrainedModel

    @check_arguments
    def run(model: PreTrainedModel | str):
        return model

    for given in ("a/b", LayerLike(), 5, b"x"):
        assert run(given) is given


def test_pythons_own_errors_of_arguments_stay():
    with pytest.raises(TypeError, match="missing a required argument"):
        Door.made()
