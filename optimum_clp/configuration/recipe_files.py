"""A recipe's file as a dictionary: `clp_config.json`, or YAML, which may have comments; without torch and transformers."""

import os
from pathlib import Path
from typing import Any

from ..argument_types import check_argument
from ..errors import ConfigurationError
from ..json_files import JsonProblem, is_deep, parse, read_bytes

RECIPE_NAME = "clp_config.json"
"""Of the recipe in an output folder."""
_YAML = (".yaml", ".yml")


def read_recipe(path: str | os.PathLike, name: str = RECIPE_NAME) -> dict[str, Any]:
    """The keys and values of a recipe, which are not looked at yet.

    Args:
        path (`str` or `os.PathLike`): A file, or a folder that holds a `clp_config.json`. `.yaml` and `.yml` are YAML and `.json`
            is JSON; what is called otherwise is JSON if it begins with a brace.
        name (`str`): What errors call it: `"--config"`.

    Raises:
        ConfigurationError: If it is no path, cannot be read, is neither JSON nor YAML, has a key twice, or is not a mapping of names to
            values.
    """
    check_argument(name, path, str | os.PathLike)
    file = Path(path) / RECIPE_NAME if os.path.isdir(path) else Path(path)
    try:
        values = _parsed(file)
        if not isinstance(values, dict):
            raise JsonProblem("holds no settings: a recipe has a name and a value in each line, or is a JSON object")
    except ValueError as problem:
        rule = f"it {getattr(problem, 'rule', problem)}"
        remedy = f"Give a {RECIPE_NAME}, a recipe in YAML, or the folder of a run"
        raise ConfigurationError.of(name, str(file), rule, remedy) from problem
    return values


def _parsed(file: Path) -> Any:
    text = read_bytes(file)
    begins_as_json = text.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"
    if file.suffix.lower() == ".json" or (begins_as_json and file.suffix.lower() not in _YAML):
        return parse(text, unique_keys=True)
    from .yaml_text import MAX_BYTES, parse_yaml

    if len(text) > MAX_BYTES:
        raise JsonProblem(f"has {len(text)} bytes, and at most {MAX_BYTES} are read as YAML; JSON may have more")
    values = parse_yaml(text)
    if is_deep(values):
        raise JsonProblem("is nested too deep")
    return values
