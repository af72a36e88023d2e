"""One place for each setting: a dataclass field that carries its rule, its help and its flag.

Validation, the command line, the docstrings and `docs/configuration.md` read them here.
"""

import dataclasses
import textwrap
import types
import typing
from typing import Any, TypeVar

from ..registry import Registry
from .rules import Rule

_Class = TypeVar("_Class", bound=type)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting, as its field says it.

    Args:
        name (`str`): As errors and the command line call it: `"tuning.learning_rate"`, or `"seed"`.
        kind (`str`): The types of its values: "`float` or `None`".
        default (`Any`): Its value if none is given.
        rule ([`Rule`]): What its value may be.
        help (`str`): What it is: a clause, for the command line.
        more (`str`): What else there is to know: sentences, for docstrings and docs; may be empty.
        flag (`str`): Of the command line: `"--learning-rate"`. A switch has `"--no-..."` besides.
        metavar (`str`): What stands for the value in the help.
        unset (`str`): What a default of `None` or an empty list comes to, in words; may be empty.
    """

    name: str
    kind: str
    default: Any
    rule: Rule
    help: str
    more: str
    flag: str
    metavar: str
    unset: str

    @property
    def key(self) -> str:
        """Name of the field."""
        return self.name.rpartition(".")[2]

    @property
    def flags(self) -> tuple[str, ...]:
        """All flags of the command line: one, or the two of a switch."""
        return (self.flag, f"--no-{self.flag[2:]}") if self.rule.parse is bool else (self.flag,)

    @property
    def default_in_words(self) -> str:
        """The default as the help shows it; empty if there is none to speak of."""
        if isinstance(self.default, bool):
            return "yes" if self.default else "no"
        if isinstance(self.default, float):
            return f"{self.default:g}"
        if isinstance(self.default, list):
            return ", ".join(self.default) or self.unset
        return self.unset if self.default is None else str(self.default)

    def in_sentences(self) -> str:
        """What it is, for docstrings and docs. A registry's names are not read for it: other packages add some."""
        said = self.help if isinstance(self.rule.choices, Registry) else self.rule.with_choices(self.help)
        return " ".join(filter(None, (f"{said[0].upper()}{said[1:]}.", self.more)))


def setting(
    default: Any,
    rule: Rule,
    help: str,
    *,
    more: str = "",
    flag: str | None = None,
    metavar: str | None = None,
    unset: str = "",
) -> Any:
    """A dataclass field that is a setting.

    Args:
        default, rule, help, more, unset: As in [`Setting`].
        flag (`str`, *optional*): Defaults to `"--"` and the field's name.
        metavar (`str`, *optional*): Defaults to `"N"` for numbers, else to the field's name.
    """
    metadata = {"rule": rule, "help": help, "more": more, "flag": flag, "metavar": metavar, "unset": unset}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(cls: type, stage: str = "") -> tuple[Setting, ...]:
    """The settings that the fields of a dataclass are, in their order.

    Args:
        cls (`type`): The dataclass.
        stage (`str`): Key of [`CLPConfig`] that holds it; empty for settings that are keys themselves.
    """
    return tuple(_setting(field, stage) for field in dataclasses.fields(cls))


def _setting(field: dataclasses.Field, stage: str) -> Setting:
    said = dict(field.metadata)
    said["flag"] = said["flag"] or f"--{field.name.replace('_', '-')}"
    said["metavar"] = said["metavar"] or ("N" if said["rule"].parse in (int, float) else field.name.upper())
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return Setting(f"{stage}.{field.name}" if stage else field.name, _kind(field.type), default, **said)


def documented(cls: _Class, settings: type | None = None) -> _Class:
    """Class decorator: `{settings}` in the docstring becomes a line for each setting.

    Args:
        cls (`type`): The class.
        settings (`type`, *optional*): Dataclass that has the settings; defaults to `cls`.
    """
    if cls.__doc__:  # python -OO has none
        lines = (_documentation(setting) for setting in settings_of(settings or cls))
        cls.__doc__ = cls.__doc__.replace("{settings}", "\n        ".join(lines))
    return cls


def _documentation(setting: Setting) -> str:
    """A line of a docstring's `Args`."""
    unset = f" `{setting.default}`: {setting.unset}." if setting.unset else ""
    line = f"{setting.key} ({setting.kind}, defaults to `{setting.default!r}`): {setting.in_sentences()}{unset}"
    return textwrap.fill(line, 111, subsequent_indent=" " * 12, break_on_hyphens=False)


def _kind(annotation: Any) -> str:
    """A field's annotation as docstrings have it: "`str`, `list[str]` or `None`"."""
    union = isinstance(annotation, types.UnionType)
    *others, last = (_type_name(kind) for kind in (typing.get_args(annotation) if union else (annotation,)))
    return f"{', '.join(others)} or {last}" if others else last


def _type_name(kind: Any) -> str:
    name = "None" if kind is types.NoneType else kind.__name__ if type(kind) is type else str(kind)
    return f"`{name}`"
