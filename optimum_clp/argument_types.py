"""The kinds of arguments that public functions take, checked at the door by their own annotations.

Without it `prune(5)` ends in an `AttributeError` somewhere below, some calls after minutes. A model's kind is not judged here:
the door for models (`checkpoint.in_memory`) unwraps some objects, and says what to call on others.
"""

import collections.abc
import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from .errors import ConfigurationError

_Checked = TypeVar("_Checked", bound=Callable[..., Any])
_Class = TypeVar("_Class", bound=type)
# in bytes, on Linux
_LONGEST_PATH, _LONGEST_NAME = 4096, 255


def check_arguments(function: _Checked) -> _Checked:
    """Decorator: an argument whose kind its annotation does not name is refused before the function begins.

    Raises:
        ConfigurationError: Of the decorated function: names the argument, its value and the kinds that there are.
    """
    signature, found = inspect.signature(function), dict[str, Any]()

    @functools.wraps(function)
    def door(*args: Any, **kwargs: Any) -> Any:
        if not found:  # annotations may name what is imported later
            found.update(typing.get_type_hints(function))
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            kind = signature.parameters[name].kind
            if name in found and kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
                check_argument(name, value, found[name])
        return function(*args, **kwargs)

    return typing.cast(_Checked, door)


def check_methods(cls: _Class) -> _Class:
    """Class decorator: [`check_arguments`] for `__init__` and every public method that the class itself defines."""
    for name, member in list(vars(cls).items()):
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(member, classmethod):
            setattr(cls, name, classmethod(check_arguments(member.__func__)))
        elif inspect.isfunction(member):
            setattr(cls, name, check_arguments(member))
    return cls


def check_argument(name: str, value: Any, hint: Any) -> None:
    """Check one argument.

    Args:
        name (`str`): As the caller knows it.
        value (`Any`): What was given.
        hint: Its annotation.

    Raises:
        ConfigurationError: If the annotation does not name its kind, or it is a path that no file can have.
    """
    kinds = _kinds(hint)
    if not any(_is(value, kind) for kind in kinds):
        wanted = " or ".join(dict.fromkeys(map(_said, kinds)))
        rule = f"it is of the type {type(value).__name__}, and must be {wanted}"
        raise ConfigurationError.of(name, value, rule, f"Give {wanted}")
    if isinstance(value, (str, os.PathLike)) and os.PathLike in kinds:
        _check_path(name, os.fspath(value))


def _check_path(name: str, path: str | bytes) -> None:
    try:
        # not `os.fsencode`: safetensors, tokenizers and ONNX Runtime open no file whose name is not UTF-8
        found = path if isinstance(path, bytes) else path.encode()
        sound = 0 < len(found) <= _LONGEST_PATH and b"\0" not in found
    except UnicodeEncodeError:  # a lone surrogate
        sound = False
    if not sound or max(map(len, found.split(os.fsencode(os.sep)))) > _LONGEST_NAME:
        rule = (
            "no file can have this name: it is empty, too long, or has NUL, half a character or what is no UTF-8 in it"
        )
        raise ConfigurationError.of(name, path, rule, "Give another path")


def _kinds(hint: Any) -> list[Any]:
    """The parts of a union, or the one kind there is."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return [kind for part in typing.get_args(hint) for kind in _kinds(part)]
    return [typing.get_origin(hint) or hint]


def _is(value: Any, kind: Any) -> bool:
    if kind is Any or not isinstance(kind, type):
        return True
    if kind is types.NoneType or value is None:
        return kind is types.NoneType and value is None
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, (int, float))
    if kind in (collections.abc.Iterable, collections.abc.Sequence):
        return isinstance(value, kind) and not isinstance(value, (str, bytes, Mapping))
    return kind.__name__ == "PreTrainedModel" or isinstance(value, kind)


def _said(kind: Any) -> str:
    shown: dict[Any, str] = {
        types.NoneType: "None",
        str: "a string",
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        list: "a list",
        os.PathLike: "a path",
        Mapping: "a dictionary",
        Iterable: "a list",
        Sequence: "a list",
    }
    name = getattr(kind, "__name__", str(kind))
    return shown.get(kind) or f"{'an' if name[:1] in 'AEIO' else 'a'} {name}"
