"""Notebooks are clean, and their code and links hold; `make test-examples` runs them."""

import json
from pathlib import Path

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
    names = {"first_cut.ipynb", "chat_model_own_data.ipynb", "compare_and_read_the_report.ipynb"}
    assert names <= {path.name for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
@pytest.mark.parametrize("is_checkout", [True, False])
def test_a_notebook_takes_the_small_model_in_a_checkout_and_one_of_the_hub_elsewhere(
    path, is_checkout, tmp_path, monkeypatch
):
    for name in ("CLP_MODEL", "CLP_BUDGET", "CLP_OUTPUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(path.parent if is_checkout else tmp_path)
    chosen = {}
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    (settings,) = (text for cell in cells if "\nMODEL = " in (text := "".join(cell["source"])))
    exec(compile(settings, path.name, "exec"), chosen)
    if is_checkout:
        assert Path(chosen["MODEL"], "config.json").is_file()
    else:
        assert chosen["MODEL"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert not Path(chosen["OUTPUT"]).exists()
