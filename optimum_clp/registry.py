"""Names that stand for objects: imported when they are first asked for, and open to other installed packages.

A registry holds what a setting may be called and where the code for it is (`"module:object"`). Asking for names or for what
they say imports nothing, so that `--help` and the check of a configuration stay light, and so that what is low in the
house may name what is high in it. Another package adds a row through an entry point of the registry's group:

    [project.entry-points."optimum_clp.strategies"]
    my_strategy = "my_package.search:my_strategy"
"""

import importlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from .errors import ConfigurationError


@dataclass(frozen=True)
class Row:
    """One name of a registry.

    Args:
        target (`Any`): `"module:object"`, or the object itself.
        says (`str`): What it is, in a few words, for `--help` and the docs.
        package (`str` or `None`): The installed package that adds it; `None` for this one.
    """

    target: Any
    says: str = ""
    package: str | None = None


class Registry:
    """Names of one kind, in the order in which they were registered; those of other packages follow, by name.

    Args:
        kind (`str`): What is named, for messages: `"strategy"`.
        group (`str`): Entry-point group in which other packages add names: `"optimum_clp.strategies"`.
    """

    def __init__(self, kind: str, group: str):
        self.kind, self.group = kind, group
        self._rows: dict[str, Row] = {}
        self._added: dict[str, Row] | None = None

    def register(self, name: str, target: Any, *, says: str = "") -> None:
        """Add a name.

        Args:
            name (`str`): As it stands in a configuration.
            target (`Any`): The object, or where it is: `"module:object"`.
            says (`str`): What it is, in a few words.

        Raises:
            ConfigurationError: If there is such a name already.
        """
        if name in self._rows:
            raise ConfigurationError.of(
                self.kind, name, "there is one of that name already", "Register it under another name"
            )
        self._rows[name] = Row(target, says)

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._all()

    def __len__(self) -> int:
        return len(self._all())

    @property
    def names(self) -> tuple[str, ...]:
        """All names; nothing is imported for them."""
        return tuple(self._all())

    def row(self, name: str) -> Row:
        """Where a name leads, and what it says.

        Raises:
            ConfigurationError: If there is no such name; lists those that there are.
        """
        rows = self._all()
        if name not in rows:
            shown = ", ".join(map(repr, rows))
            raise ConfigurationError.of(self.kind, name, f"it must be one of {shown}", f"Choose one of {shown}")
        return rows[name]

    def says(self, name: str) -> str:
        """What a name stands for, in a few words; for another package's name, whose it is."""
        row = self.row(name)
        return row.says or (f"of the package {row.package}" if row.package else "")

    def get(self, name: str) -> Any:
        """The object that a name stands for, imported if it has not been asked for before.

        Raises:
            ConfigurationError: If there is no such name, or the module of another package does not give the object.
        """
        row = self.row(name)
        if not isinstance(row.target, str):
            return row.target
        module, _, attribute = row.target.partition(":")
        if row.package is None:
            return getattr(importlib.import_module(module), attribute)
        try:
            return getattr(importlib.import_module(module), attribute)
        # whatever another package does while it is imported, the user hears which one it is
        except Exception as error:
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise ConfigurationError.of(
                self.kind,
                name,
                f"the package {row.package} adds it as {row.target}, and that cannot be imported ({said})",
                f"Repair or remove {row.package}, or choose another {self.kind}",
            ) from error

    def _all(self) -> dict[str, Row]:
        if self._added is None:
            self._added = {}
            for point in sorted(metadata.entry_points(group=self.group), key=lambda point: point.name):
                package = point.dist.name if point.dist is not None else point.value.partition(".")[0]
                if point.name in self._rows or point.name in self._added:
                    warnings.warn(
                        f"{package} adds the {self.kind} {point.name!r}, and there is one of that name already: it is "
                        "left out",
                        stacklevel=3,
                    )
                    continue
                self._added[point.name] = Row(point.value, package=package)
        return {**self._rows, **self._added}
