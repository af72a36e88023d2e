"""`docs/configuration.md`, made from the settings: `python -m optimum_clp.configuration.docs_table > docs/configuration.md`."""

from collections.abc import Sequence
from typing import Any

from ..registry import Registry
from .settings import Setting, settings_of
from .stages import STAGES, PlainSettings

_HEAD = """\
# Settings

Every setting: `tuning.epochs` is `CLPConfig(tuning={"epochs": 4})` in Python, `{"tuning": {"epochs": 4}}` in `clp_config.json`
and `--epochs 4` on the [command line](cli.md). All are checked before any work is done, and all that is wrong is told at once.
Names that have a table of their own are open: what an installed package adds is valid too, and `--help-all` shows it.

This page is made from the fields in `optimum_clp/configuration/stages.py`; to change it, change them and run
`python -m optimum_clp.configuration.docs_table > docs/configuration.md`.
"""


def configuration_page() -> str:
    """The page as Markdown; it lists what this package has, whatever else is installed."""
    parts = [_HEAD, _section("Plain settings", PlainSettings, "")]
    parts += [_section(f"`{stage}`", cls, stage) for stage, cls in STAGES.items()]
    return "\n".join(parts)


def _section(title: str, cls: type, stage: str) -> str:
    settings = settings_of(cls, stage)
    rows = [(f"`{s.name}`", _flags(s), _default(s), _allowed(s), s.in_sentences()) for s in settings]
    lines = [f"## {title}", "", (cls.__doc__ or "").partition("\n")[0], ""]
    lines += _table(("setting", "flag", "default", "must be", "what it is"), rows)
    for setting in settings:
        registry = setting.rule.choices
        if isinstance(registry, Registry):
            lines += ["", f"Names of `{setting.name}` (entry points of others: `{registry.group}`):", ""]
            own = [name for name in registry if registry.row(name).package is None]
            lines += _table(("name", "what it is"), [(f"`{name}`", registry.says(name)) for name in own])
    return "\n".join([*lines, ""])


def _flags(setting: Setting) -> str:
    if setting.rule.parse is bool:
        return ", ".join(f"`{flag}`" for flag in setting.flags)
    return f"`{setting.flag} {setting.metavar}`"


def _default(setting: Setting) -> str:
    return f"`{setting.default!r}`" + (f": {setting.unset}" if setting.unset else "")


def _allowed(setting: Setting) -> str:
    choices: Any = setting.rule.choices
    names = "the names below" if isinstance(choices, Registry) else ", ".join(f"`{choice!r}`" for choice in choices)
    return setting.rule.text.removeprefix("it must be ").replace("{names}", names)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


if __name__ == "__main__":
    print(configuration_page(), end="")
