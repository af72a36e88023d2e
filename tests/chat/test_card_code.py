"""The code of a model card runs as it stands, on the folder that the card lies in."""

import contextlib
import io
import re
import shutil

import pytest

from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.report.model_card import write_model_card
from optimum_clp.report.report import CLPReport


@pytest.mark.parametrize("kind", ["chat", "base"])
def test_the_python_of_a_card_runs(kind, written, tmp_path, monkeypatch):
    place = tmp_path / "out"
    shutil.copytree(written.folder if kind == "chat" else written.base, place)
    report = CLPReport.load(place)
    report.quantization = None
    monkeypatch.chdir(tmp_path)
    text = write_model_card(report, CLPConfig(), place, model_name="out").read_text(encoding="utf-8")
    # words that the small vocabulary has
    text = text.replace("What is the capital of Japan?", "w7 w8").replace("Once upon a time", "w7 w8")
    text = re.sub(r"max_new_tokens=\d+", "max_new_tokens=20", text)  # its context has 128 tokens
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2 and all(("apply_chat_template" in block) == (kind == "chat") for block in blocks)
    for block in blocks:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(block, "card", "exec"), {})
        assert re.search(r"w\d+", said.getvalue())
