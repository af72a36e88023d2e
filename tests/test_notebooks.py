"""Notebooks are clean, and their code and links hold; `make test-examples` runs them."""

import json

import pytest
from page_blocks import ROOT
from test_docs import broken_links

NOTEBOOKS = sorted(ROOT.glob("examples/*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_clean(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert cells[0]["cell_type"] == "markdown" and cells[0]["source"][0].startswith("# ")
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            compile(text, path.name, "exec")
        else:
            assert broken_links(path, text) == []


def test_notebooks_are_found():
    assert {"first_cut.ipynb"} <= {path.name for path in NOTEBOOKS}
