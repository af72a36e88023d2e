import dataclasses

import pytest

from optimum_clp.configuration.rules import boolean, integer, or_none, some_names, text
from optimum_clp.configuration.settings import documented, setting, settings_of


@documented
@dataclasses.dataclass
class Example:
    """An example.

    Args:
        {settings}
    """

    num_rows: int = setting(4, integer(1), "rows of it", more="At least one.", flag="--rows")
    where: str | None = setting(None, or_none(text()), "where it lies", metavar="FOLDER", unset="at home")
    tags: list[str] = setting(["a", "b"], some_names("tags", "a"), "tags of it")
    kept: bool = setting(True, boolean(), "keep it")


def test_a_field_is_a_setting():
    rows, where, tags, kept = settings_of(Example, "stage")
    assert [s.name for s in (rows, where, tags, kept)] == ["stage.num_rows", "stage.where", "stage.tags", "stage.kept"]
    assert (rows.key, rows.kind, rows.default, rows.help, rows.more) == ("num_rows", "`int`", 4, "rows of it", "At least one.")  # fmt: skip
    assert [(s.flags, s.metavar) for s in (rows, where, tags)] == [
        (("--rows",), "N"),
        (("--where",), "FOLDER"),
        (("--tags",), "TAGS"),
    ]
    assert kept.flags == ("--kept", "--no-kept")
    assert (where.kind, tags.kind) == ("`str` or `None`", "`list[str]`")
    assert [s.default_in_words for s in (rows, where, tags, kept)] == ["4", "at home", "a, b", "yes"]
    assert [s.name for s in settings_of(Example)] == ["num_rows", "where", "tags", "kept"]


def test_the_dataclass_is_one_like_any_other():
    assert Example(5, "x") == Example(num_rows=5, where="x", tags=["a", "b"], kept=True)
    first, second = Example(), Example()
    first.tags.append("c")
    assert second.tags == ["a", "b"] == settings_of(Example)[2].default


def test_a_numbers_default_is_short():
    @dataclasses.dataclass
    class Numbers:
        one: float = setting(16.0, text(), "one")
        small: float = setting(1e-4, text(), "small")

    assert [s.default_in_words for s in settings_of(Numbers)] == ["16", "0.0001"]


def test_the_docstring_is_made_from_the_settings():
    assert Example.__doc__.splitlines()[2:] == [
        "    Args:",
        "        num_rows (`int`, defaults to `4`): Rows of it. At least one.",
        "        where (`str` or `None`, defaults to `None`): Where it lies. `None`: at home.",
        "        tags (`list[str]`, defaults to `['a', 'b']`): Tags of it.",
        "        kept (`bool`, defaults to `True`): Keep it.",
        "    ",
    ]


def test_a_setting_needs_rule_and_help():
    with pytest.raises(TypeError):
        setting(4)
