import re
from importlib import metadata
from pathlib import Path

from optimum_clp.configuration.docs_table import configuration_page
from optimum_clp.configuration.stages import all_settings
from optimum_clp.doors import LOSSES, STRATEGIES

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_made_from_the_settings():
    command = "python -m optimum_clp.configuration.docs_table > docs/configuration.md"
    assert PAGE.read_text(encoding="utf-8") == configuration_page(), f"make the page again: {command}"


def test_every_setting_has_a_row_with_its_flag_and_its_default():
    rows = re.findall(r"^\| `([\w.]+)` \| `(--[a-z-]+)[^|]*\| `([^`]*)`", PAGE.read_text(encoding="utf-8"), re.M)
    assert rows == [(s.name, s.flag, repr(s.default)) for s in all_settings().values()]
    assert ("calibration.dataset", "--dataset", "None") in rows and ("search.budget", "--search-budget", "4.0") in rows


def test_every_name_has_a_row():
    text = PAGE.read_text(encoding="utf-8")
    for registry in (STRATEGIES, LOSSES):
        for name in registry:
            if registry.row(name).package is None:
                assert f"| `{name}` | {registry.says(name)} |" in text


def test_the_page_does_not_depend_on_what_else_is_installed(monkeypatch):
    def entry_points(*, group):
        return [metadata.EntryPoint("mine", "their_package.module:object", group)]

    before = configuration_page()
    monkeypatch.setattr("optimum_clp.registry.metadata.entry_points", entry_points)
    monkeypatch.setattr(STRATEGIES, "_added", None)
    assert "mine" in STRATEGIES
    assert configuration_page() == before


def test_rows_have_as_many_cells_as_the_head():
    for table in re.findall(r"(?:^\|.*\n)+", configuration_page(), re.M):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(counts) == 1, table
