"""YAML as recipes are written in it: what YAML 1.2's core schema reads, less what a recipe has no use for.

PyYAML reads YAML 1.1, in which `no` is false, `1e-4` a string, `1:30` the number 90 and `010` the number 8. Here they are
what they look like: a string, a number, a string, the number 10. Anchors and tags are refused (a file of a few lines could stand
for gigabytes, or for objects), and so is a key that stands twice.
"""

import re
from typing import Any

import yaml

MAX_BYTES = 2**20
"""Of a file: 1 MiB."""
MAX_VALUES = 2**14
"""Names, values, lists and mappings in a file; PyYAML reads about as many in a second."""
_CORE = "tag:yaml.org,2002:"


class YamlProblem(ValueError):
    """What is wrong with a text.

    Args:
        rule (`str`): A clause without final stop whose subject is the file: `"is not valid YAML (...)"`.
    """

    def __init__(self, rule: str):
        super().__init__(rule)
        self.rule = rule


def parse_yaml(text: bytes) -> Any:
    """The value that a text stands for: dictionaries, lists, strings, numbers, truth values and `None`.

    Args:
        text (`bytes`): One YAML document in UTF-8, with or without a byte order mark.

    Raises:
        YamlProblem: If it is no YAML, has more than `MAX_VALUES`, or an anchor, a tag, a key that is no string or that stands twice.
    """
    try:
        loader = _RecipeLoader(text.decode("utf-8-sig"))
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except RecursionError:
        raise YamlProblem("is nested too deep") from None
    except UnicodeDecodeError as error:
        raise YamlProblem(f"is not valid YAML (it is not UTF-8 text: {error.reason})") from error
    except yaml.MarkedYAMLError as error:
        raise YamlProblem(f"is not valid YAML ({_place(error.problem_mark)}: {_said(error)})") from error
    except yaml.YAMLError as error:  # a character that no YAML file may have
        raise YamlProblem(f"is not valid YAML ({' '.join(str(error).split())})") from error
    except YamlProblem:
        raise
    except (ValueError, OverflowError) as error:  # more digits than Python reads; an escape beyond the last character
        raise YamlProblem(f"is not valid YAML ({error})") from error


def _integer(loader: Any, node: Any) -> int:
    text = node.value
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


def _real(loader: Any, node: Any) -> float:
    return float(re.sub(r"\.(?=[iInN])", "", node.value))


# the core schema of YAML 1.2.2, section 10.3.2: a tag, what its scalars look like, how they begin, what they are
_SCALARS: tuple[tuple[str, str, list[str], Any], ...] = (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""], lambda loader, node: None),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"], lambda loader, node: node.value.lower() == "true"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"], _integer),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        [*"-+0123456789."],
        _real,
    ),
)


def _with_core_schema(loader: Any) -> Any:
    """Class decorator: plain scalars are what the core schema says, and not what YAML 1.1 did."""
    for name, pattern, first, construct in _SCALARS:
        loader.add_implicit_resolver(_CORE + name, re.compile(rf"(?:{pattern})\Z"), first)
        loader.add_constructor(_CORE + name, construct)
    return loader


@_with_core_schema
class _RecipeLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema's scalars, and nothing that is said elsewhere than where it stands."""

    yaml_implicit_resolvers: dict[str, list] = {}
    values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        place = _place(event.start_mark)
        self.values += 1
        if self.values > MAX_VALUES:
            raise YamlProblem(f"has more than {MAX_VALUES} names and values ({place}); JSON may have more")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise YamlProblem(f"has an anchor or an alias ({place}), which are not read: write the value out")
        if getattr(event, "tag", None) is not None:
            raise YamlProblem(f"has a tag ({place}), which are not read: put quotes around what is a string")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, place = self.construct_object(key_node, deep=True), _place(key_node.start_mark)
            if not isinstance(key, str):
                said = repr(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "of several values"
                raise YamlProblem(f"has the key {said}, and keys are names ({place})")
            if key in found:
                raise YamlProblem(f"has the key {key!r} twice ({place})")
            found[key] = self.construct_object(value_node, deep=deep)
        return found


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}" if mark is not None else "at its end"


def _said(error: yaml.MarkedYAMLError) -> str:
    if error.problem and r"'\t'" in error.problem:
        return "a tab, and YAML is indented with spaces"
    return ", ".join(filter(None, (error.context, error.problem)))
