"""How the site is made of the pages; that it can be made as a whole is `make docs`. Needs the extra `docs`."""

import importlib
import inspect
import json
import sys
from pathlib import Path

import pytest

from optimum_clp.commands.clp import COMMANDS, build_parser
from optimum_clp.pruner import CLPPruner

pytest.importorskip("mkdocs")
griffe = pytest.importorskip("griffe")
ROOT = Path(__file__).parents[1]
REPOSITORY = "https://example.org/ours"


def module(name):
    sys.path.insert(0, str(ROOT / "docs" / "_site"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def hooks():
    return module("hooks")


@pytest.fixture(scope="module")
def docstrings():
    return module("docstrings")


@pytest.mark.parametrize(
    ("source", "page", "link", "led"),
    [
        ("docs/search.md", "search.md", "[a](method.md#the-gate)", "[a](method.md#the-gate)"),
        ("docs/search.md", "search.md", "[a](../benchmarks/search/README.md)", "[a](measurements/search.md)"),
        ("docs/contribute/loss.md", "contribute/loss.md", "[a](../recovery.md#text)", "[a](../recovery.md#text)"),
        ("CONTRIBUTING.md", "contribute/index.md", "[a](docs/glossary.md)", "[a](../glossary.md)"),
        ("CONTRIBUTING.md", "contribute/index.md", "[a](docs/contribute/loss.md)", "[a](loss.md)"),
        ("benchmarks/README.md", "measurements/index.md", "[a](edge/README.md#speed)", "[a](edge.md#speed)"),
        ("docs/report.md", "report.md", "[a](clp_report.schema.json)", f"[a]({REPOSITORY}/blob/main/docs/clp_report.schema.json)"),
        ("docs/tutorial.md", "tutorial.md", "[a](../examples/first_cut.ipynb)", "[a](notebooks/first_cut.md)"),
        ("examples/first_cut.ipynb", "notebooks/first_cut.md", "[a](../docs/search.md#x)", "[a](../search.md#x)"),
        ("docs/cli.md", "cli.md", "[a](../optimum_clp/doors.py)", f"[a]({REPOSITORY}/blob/main/optimum_clp/doors.py)"),
        ("docs/cli.md", "cli.md", "[a](../tests)", f"[a]({REPOSITORY}/tree/main/tests)"),
        ("docs/cli.md", "cli.md", "[glossary.md](glossary.md)", "[Glossary](glossary.md)"),
        ("docs/cli.md", "cli.md", "[a](https://x.org/y.md) [b](#here)", "[a](https://x.org/y.md) [b](#here)"),
        ("docs/cli.md", "cli.md", "```\n[a](method.md)\n```\n", "```\n[a](method.md)\n```\n"),
    ],
)  # fmt: skip
def test_links_lead_to_the_site_or_the_repository(hooks, source, page, link, led):
    assert hooks.with_links(link, source, page, REPOSITORY) == led


def test_every_notebook_is_a_page_with_its_texts_and_code(hooks):
    notebooks = {f"examples/{path.name}" for path in ROOT.glob("examples/*.ipynb")}
    assert notebooks == {source for source in hooks.ELSEWHERE if source.endswith(".ipynb")}
    for source in notebooks:
        page = hooks.notebook_page(source, "https://github.com/optimum-clp/optimum-clp")
        cells = json.loads((ROOT / source).read_text(encoding="utf-8"))["cells"]
        assert page.startswith("# ") and page.count("```python\n") == sum(c["cell_type"] == "code" for c in cells)
        assert "](../docs/" in page and "blob/main/docs" not in page
        assert f"(https://colab.research.google.com/github/optimum-clp/optimum-clp/blob/main/{source})" in page


def test_every_option_is_on_the_page_of_options(hooks):
    page = hooks.options_page()
    for name in COMMANDS:
        _, _, part = page.partition(f"\n## {name}\n")
        part = part.partition("\n## ")[0]
        (choices,) = (
            action.choices for action in build_parser()._actions if action.choices and name in action.choices
        )
        options = {option for action in choices[name]._actions for option in action.option_strings} - {
            "-h",
            "--help",
            "--help-all",
        }
        shown = {option for option in options if f"`{option}`" in part or f"`{option} " in part}
        hidden = {o for a in choices[name]._actions if a.help == "==SUPPRESS==" for o in a.option_strings}
        assert len(options) > 5 and options - shown == hidden, name


def test_every_diagram_has_its_picture(hooks):
    found = [d for page in ROOT.glob("docs/**/*.md") for d in hooks.diagrams(page.read_text(encoding="utf-8"))]
    pictures = {path.name for path in (ROOT / "docs" / hooks.DIAGRAMS).glob("*.svg")}
    assert found and {hooks.drawn(diagram) for diagram in found} == pictures


def test_a_diagram_without_a_picture_ends_the_build(hooks):
    with pytest.raises(Exception, match="page.md: a diagram was changed; draw it with"):
        hooks.with_diagrams("```mermaid\nflowchart LR\n    a --> b\n```\n", "page.md")


def test_what_a_page_fetches_is_found(hooks):
    harmless = '<a href="https://x.org">x</a><img src="assets/a.svg"><link rel="icon" href="a.svg"><script src="a.js">'
    assert hooks.fetched(harmless) == []
    for tag in (
        '<script src="https://x.org/a.js">',
        "<img alt=a src=//x.org/a.png>",
        '<link rel=stylesheet href="http://x.org">',
    ):
        assert len(hooks.fetched(harmless + tag)) == 1


def test_docstrings_are_read_as_they_are_meant(docstrings):
    text = inspect.cleandoc(CLPPruner.evaluate.__doc__)
    parsed = griffe.parse_google(
        griffe.Docstring(docstrings.rewritten(text)),
        warnings=False,
        returns_multiple_items=False,
        returns_named_value=False,
    )
    sections = {section.kind.value: section.value for section in parsed}
    arguments = {argument.name: argument for argument in sections["parameters"]}
    assert set(arguments) == set(inspect.signature(CLPPruner.evaluate).parameters) - {"self"}
    assert (
        arguments["task_limit"].annotation == "int" and arguments["text"].annotation == "str | os.PathLike | list[str]"
    )
    assert arguments["tasks"].annotation == "Mapping[str, str | os.PathLike | list[dict]] | list"
    assert {str(raised.annotation) for raised in sections["raises"]} == {"CalibrationError", "ConfigurationError"}
    assert sections["returns"][0].annotation == "dict"


def test_references_lead_to_objects_that_exist(docstrings):
    assert (
        docstrings.rewritten("See [`~CLPPruner.cut`].") == "See [`CLPPruner.cut`][optimum_clp.pruner.CLPPruner.cut]."
    )
    assert docstrings.rewritten("See [`Elsewhere`].") == "See `Elsewhere`."
    for place in docstrings.PLACES.values():
        assert docstrings.imported(place) is not None
