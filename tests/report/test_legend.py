"""Words for columns: every title that is explained is one that is shown, and the other way round where it needs words."""

from report_example import example_report

from optimum_clp.report.files import file_cells
from optimum_clp.report.generation import generation_cells
from optimum_clp.report.legend import GLOSSARY, WORDS, legend, meaning


def test_a_line_for_each_title_or_a_paragraph():
    titles = ["model", "loops", "KL to dense"]
    assert legend(titles).splitlines() == [f"  loops: {WORDS['loops']}", f"  KL to dense: {WORDS['KL to dense']}"]
    assert legend(titles, linked=True).splitlines()[-1] == f"  all words: {GLOSSARY}"
    assert legend(["loops"], markdown=True) == f"*loops*: {WORDS['loops']}."
    assert legend(["loops"], markdown=True, linked=True).endswith(f"All words: [glossary]({GLOSSARY}).")
    assert legend(["model", "size"]) == legend([]) == ""


def test_a_unit_does_not_hide_what_a_title_means():
    assert meaning("KL to dense (nats)") == WORDS["KL to dense"] and meaning("(nats)") == meaning("layers") == ""


def test_no_column_of_answers_goes_without_words():
    row = dict.fromkeys(
        ("loops", "ended", "length", "dense_loss", "kl", "agreement", "json_parses", "arithmetic_right"), 0.5
    )
    cells = generation_cells({"rows": [{"name": "dense", **row}]})
    assert len(cells[0]) == 9 and all(map(meaning, cells[0][1:]))


def test_what_rounding_costs_is_the_perplexity_beside_the_same_model_in_floats():
    report = example_report().to_dict()
    head, *rows = file_cells(report, None)
    shown = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert shown["onnx/model_q4.onnx"]["perplexity added"] == f"{9.1 / 8.9 - 1:+.1%}"
    assert shown["onnx/model_q4.onnx"]["worst logit"] == "0.09 (usual: 0.1 to 0.5)"
    assert shown["onnx/model.onnx"]["perplexity added"] == "" and shown["quanto-int8/"]["weights"] == "int8 (quanto)"
    report["evaluation"]["rows"][-1]["perplexity"] = 8.8999
    assert file_cells(report, None)[3][head.index("perplexity added")] == "+0.0%"
    report["evaluation"]["rows"][-1]["perplexity"] = 9.1
    # no float file was kept: beside the model that it was made from
    report["evaluation"]["rows"] = [
        row for row in report["evaluation"]["rows"] if row["name"] not in ("onnx", "tuned")
    ]
    assert file_cells(report, None)[3][head.index("perplexity added")] == f"{9.1 / 12.5 - 1:+.1%}"
    report["evaluation"] = None
    report["export"]["files"][0] |= {"weights": "of another version", "max_relative_error": None}
    head, first, *_ = file_cells(report, None)
    assert "perplexity added" not in head and first[head.index("worst logit")] == ""
    assert file_cells({"export": None, "quantization": None, "evaluation": None}, None) == []
