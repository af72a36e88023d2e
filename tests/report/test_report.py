import dataclasses
import json
import math
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from report_example import example_report, older_report
from tiny_models import tiny_model

from optimum_clp.calibration.rows import CalibrationData
from optimum_clp.closed_form.solver import ClosedFormResult, ClosedFormStep
from optimum_clp.errors import ConfigurationError
from optimum_clp.evaluation.outcome import MeasuredRow, Outcome
from optimum_clp.evaluation.tokens import Evaluation
from optimum_clp.exporters.result import ExportedFile, ExportResult
from optimum_clp.quantization import QuantoResult
from optimum_clp.report.environment import environment_info
from optimum_clp.report.report import SCHEMA_VERSION, CLPReport
from optimum_clp.report.section import to_section
from optimum_clp.report_schema import report_schema
from optimum_clp.search.result import GateStep, ScoredCut, SearchResult, TriedLength
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model
from optimum_clp.surgery.description import describe_cut, describe_dense
from optimum_clp.tuning.result import TuningResult, TuningStep
from optimum_clp.tuning.schedule import StageRecord

SCHEMA_FILE = Path(__file__).parents[2] / "docs" / "clp_report.schema.json"
SCHEMA = json.loads(SCHEMA_FILE.read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def test_schema_is_itself_valid():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_schema_is_the_one_that_the_stages_dataclasses_give():
    hint = "make it again: python -m optimum_clp.report_schema > docs/clp_report.schema.json"
    assert report_schema() == SCHEMA, hint
    assert json.dumps(report_schema(), indent=2, ensure_ascii=False) + "\n" == SCHEMA_FILE.read_text(), hint


def test_schema_says_which_keys_older_reports_lack():
    written, older = example_report().to_dict(), older_report().to_dict()
    cut = SCHEMA["properties"]["search"]["properties"]["scored"]["items"]
    added = {name for name, rules in cut["properties"].items() if "earlier versions" in rules.get("$comment", "")}
    assert added == written["search"]["scored"][0].keys() - older["search"]["scored"][0].keys()
    assert cut["required"] == ["start", "stop", "kl", "standard_error"]


def test_schema_knows_every_section_and_no_other():
    assert set(SCHEMA["properties"]) == {field.name for field in dataclasses.fields(CLPReport)}
    assert SCHEMA["properties"]["schema_version"]["const"] == SCHEMA_VERSION


@pytest.mark.parametrize("report", [CLPReport(), example_report(), older_report()], ids=["empty", "full", "older"])
def test_saved_report_fits_the_schema_and_comes_back_equal(report, tmp_path):
    path = report.save(tmp_path / "new" / "folder")
    assert path.name == "clp_report.json"
    values = json.loads(path.read_text())
    VALIDATOR.validate(values)
    assert list(values) == sorted(values)
    assert CLPReport.load(path.parent) == report
    assert CLPReport.load(path) == report


def _violations():
    yield "negative size", lambda r: r["export"]["files"][0].update(bytes=-1)
    yield "unknown key", lambda r: r["tuning"].update(loss_name="kd")
    yield "missing key", lambda r: r["cut"].pop("removed_layers")
    yield "unknown row", lambda r: r["evaluation"]["rows"][0].update(name="dense int8")
    yield "share above 1", lambda r: r["calibration"]["statistics"].update(distinct_4gram_share=1.5)
    yield "one bound", lambda r: r["search"]["segments"].append([3])
    yield "unknown key of a cut", lambda r: r["search"]["scored"][0].update(rank=1)
    yield "negative error", lambda r: r["search"]["scored"][0].update(behind_error=-0.1)
    yield "no rows", lambda r: r["search"]["scored"][0].update(num_rows=0)
    yield "valley without length", lambda r: r["search"]["trajectory"][0].update(valleys=[[3.0]])
    yield "layer score that is text", lambda r: r["search"].update(layer_scores=["high"])
    yield "length without a verdict", lambda r: r["search"].update(lengths=[{"num_removed": 3, "segments": [[7, 10]]}])
    yield "local time", lambda r: r.update(created="2026-01-02T03:04:05")
    yield "other version", lambda r: r.update(schema_version=2)


@pytest.mark.parametrize("change", [c for _, c in _violations()], ids=[n for n, _ in _violations()])
def test_schema_refuses_a_planted_violation(change):
    values = example_report().to_dict()
    VALIDATOR.validate(values)
    change(values)
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(values)


def test_sections_that_the_stages_write_fit_the_schema(tmp_path):
    segment, pair = LayerSegment(1, 3), (LayerSegment(0, 1), LayerSegment(2, 3))
    rows = torch.zeros(2, 8, dtype=torch.int64)
    search = SearchResult(
        strategy="auto",
        used_strategy="gate",
        segments=(segment,),
        score=0.5,
        scored=(ScoredCut(pair, 0.7, 0.1, 2.7, 2, 0.2, 0.01), ScoredCut((segment,), 0.5, math.nan, 2.5, 1)),
        trajectory=(GateStep(0, 1.2, 0.5, 0.7, ((1.2, 2.0),)), GateStep(1, 0.3, 0.5, 0.7)),
        layer_scores=(0.9, 0.2, math.nan, 0.5),
        num_layers=4,
        num_removed=2,
        num_tokens=16,
        dense_loss=2.0,
        forward_equivalents=4.2,
        layer_passes=9.5,
        seconds=0.1,
        lengths=(TriedLength(2, (segment,), 0.08, True), TriedLength(3, (LayerSegment(0, 3),), math.inf, False)),
    )
    step = ClosedFormStep(0, "mlp.down_proj", 0.5, 0.4, 1e-3, 1e5, "float64")
    solved = ClosedFormResult("fold", (step, ClosedFormStep(1, skipped="no linear module")), 0.1)
    tuning = TuningResult(
        layers=(0, 1),
        modules=("model.norm",),
        loss={"kd": 1.0},
        init={**solved.to_dict(), "kept": True, "loss_before": 0.5, "loss_after": 0.45},
        num_trainable=10,
        learning_rate=1e-3,
        stages=(StageRecord({"kd": 1.0}, 3, 1e-3, 48),),
        steps=3,
        best_step=3,
        initial_validation_loss=0.5,
        best_validation_loss=0.4,
        improved=True,
        history=(TuningStep(0, None, 0.5, 0.0), TuningStep(3, 0.6, 0.4, 1e-3)),
        stopped="finished",
        num_tokens=48,
        num_processes=2,
        seconds=0.2,
        cache_seconds=0.1,
    )
    row = {
        **example_report().evaluation["rows"][0],
        **Evaluation(perplexity=8.0, loss=2.08, num_tokens=14, kl=0.1, top1_agreement=0.9, retention=0.95).to_dict(),
    }
    measured = MeasuredRow("cut", "PyTorch", 2, 10, 40, math.inf, None, None, 14, decode_tokens_per_second=3.5)
    dense = tiny_model(num_layers=4)
    report = CLPReport(
        base_model=to_section(describe_dense(dense, dense.name_or_path, None)),
        cut=to_section(describe_cut(dense, cut_model(dense, [segment]), [segment])),
        calibration=CalibrationData(rows, rows, rows, "corpus.txt").to_dict(),
        search=search.to_dict(),
        tuning=tuning.to_dict(),
        quantization=[QuantoResult(tmp_path / "quanto-int8", "int8", 9, 100).to_dict()],
        export=ExportResult(
            21,
            (ExportedFile("onnx/model.onnx", "float32", 100, 0, 0, 32.0, 1e-7, 0.3),),
            {"length": 128, "checked": "whole"},
        ).to_dict(),
        evaluation={"text": "corpus.txt", "rows": [row, *to_section(Outcome("corpus.txt", (measured,)))["rows"]]},
    )
    values = json.loads(report.save(tmp_path).read_text())
    VALIDATOR.validate(values)
    assert values["tuning"]["history"][0]["train_loss"] is None
    assert [entry["segments"] for entry in values["search"]["scored"]] == [[[0, 1], [2, 3]], [[1, 3]]]
    assert [entry["standard_error"] for entry in values["search"]["scored"]] == [0.1, None]
    assert values["search"]["layer_scores"] == [0.9, 0.2, None, 0.5]
    assert [entry["perplexity_increase"] for entry in values["search"]["lengths"]] == [0.08, None]
    assert values["quantization"][0]["folder"] == "quanto-int8"
    assert values["evaluation"]["rows"][1] == {
        **dict.fromkeys(("perplexity", "kl", "top1_agreement", "prefill_tokens_per_second")),
        "name": "cut",
        "runtime": "PyTorch",
        "num_layers": 2,
        "num_parameters": 10,
        "bytes": 40,
        "num_tokens": 14,
        "decode_tokens_per_second": 3.5,
    }
    assert values["base_model"] == {
        "name_or_path": None,
        "revision": None,
        "model_type": "llama",
        "dtype": "float32",
        "num_layers": 4,
        "num_parameters": sum(p.numel() for p in dense.parameters()),
    }, "a model that was made in memory has no name"
    layer = sum(p.numel() for p in dense.model.layers[1].parameters())
    assert values["cut"] == {
        "segments": [[1, 3]],
        "removed_layers": [1, 2],
        "num_layers_before": 4,
        "num_layers_after": 2,
        "num_parameters_before": values["base_model"]["num_parameters"],
        "num_parameters_after": values["base_model"]["num_parameters"] - 2 * layer,
    }


def test_values_that_are_not_json_are_written_as_json(tmp_path):
    report = example_report()
    report.evaluation["rows"][1].update(perplexity=math.inf, kl=math.nan, num_tokens=np.int64(7))
    report.cut["segments"] = (LayerSegment(7, 10),)
    text = report.save(tmp_path).read_text()
    values = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    row = values["evaluation"]["rows"][1]
    assert row["perplexity"] is None and row["kl"] is None and row["num_tokens"] == 7
    assert values["cut"]["segments"] == [[7, 10]]
    VALIDATOR.validate(values)
    assert math.isinf(report.evaluation["rows"][1]["perplexity"]), "the report in memory was changed"


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/home/someone/texts/corpus.txt", "corpus.txt"),
        ("file /home/someone/corpus.txt (rows 0 to 9)", "file corpus.txt (rows 0 to 9)"),
        ("C:\\Users\\someone\\corpus.txt", "corpus.txt"),
        ("~/corpus.txt", "corpus.txt"),
        ("roneneldan/TinyStories:default:train", "roneneldan/TinyStories:default:train"),
        ("https://example.org/corpus.txt", "https://example.org/corpus.txt"),
        ("self-written text, KL / CE", "self-written text, KL / CE"),
    ],
)
def test_local_folders_do_not_get_into_the_file(source, shown, tmp_path):
    report = example_report()
    report.calibration["source"] = report.evaluation["text"] = source
    report.base_model["name_or_path"] = "/home/someone/model"
    values = json.loads(report.save(tmp_path).read_text())
    assert values["calibration"]["source"] == values["evaluation"]["text"] == shown
    assert values["base_model"]["name_or_path"] == "/home/someone/model", (
        "a later stage loads the dense model from here"
    )
    assert shown in report.to_table() and "someone" not in report.to_table()


def test_newer_report_is_refused_with_the_advice_to_upgrade():
    values = {**example_report().to_dict(), "schema_version": SCHEMA_VERSION + 1, "clp_version": "9.1"}
    with pytest.raises(ConfigurationError, match=r"schema_version is 2: .*written by optimum-clp 9\.1: upgrade"):
        CLPReport.from_dict(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": None}, "schema_version is None: a report has a whole number here"),
        ({"schema_version": True}, "schema_version is True"),
        ({"tuned": {}}, "tuned is {}: a report has no such section, only environment, base_model"),
        ({"search": []}, r"search is \[\]: it must be of type dict"),
        ({"quantization": {}}, "quantization is {}: it must be of type list"),
        ({"created": 7}, "created is 7: it must be of type str"),
        ({"cut": {"segments": [[4]]}}, r"cut\.segments is \[\[4\]\]: it must be a list of \[start, stop\]"),
        ({"cut": {"segments": [[8, 4]]}}, r"cut\.segments is \[\[8, 4\]\]"),
        ({"cut": {}}, "cut.segments is None"),
    ],
)
def test_malformed_report_is_refused(change, message):
    with pytest.raises(ConfigurationError, match=message):
        CLPReport.from_dict({**example_report().to_dict(), **change})


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"clp_report\.json is '.*': there is no such file"):
        CLPReport.load(tmp_path)
    (tmp_path / "clp_report.json").write_text('{"schema_version": 1,')
    with pytest.raises(ConfigurationError, match="it is not valid JSON"):
        CLPReport.load(tmp_path)
    (tmp_path / "clp_report.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="it is not valid JSON"):
        CLPReport.load(tmp_path)
    (tmp_path / "clp_report.json").write_text("[]")
    with pytest.raises(ConfigurationError, match=r"clp_report.json is .*: it holds no JSON object"):
        CLPReport.load(tmp_path)


def test_reading_copies_the_values():
    values = example_report().to_dict()
    CLPReport.from_dict(values).cut["segments"].append([1, 2])
    assert values["cut"]["segments"] == [[7, 10]]


def test_table_is_aligned_and_says_what_was_measured():
    lines = example_report().to_table().splitlines()
    assert (
        lines[0].split()
        == "model layers parameters size perplexity KL to dense prefill tok/s decode tok/s RAM".split()
    )
    table, below = lines[:8], lines[8:]
    assert len({len(line) for line in table}) == 1, "columns are not aligned"
    assert [line.split("  ")[0] for line in table[2:]] == ["dense", "cut", "tuned", "onnx", "onnx int8", "onnx int4"]
    assert table[-1].split() == "onnx int4 13 3.18 M 2.10 MB 9.100 0.1200 14,000 720 52.10 MB".split()
    assert below[-2:] == [
        "Measured on self-written text (seed 1, temperature 1.0), 6,120 tokens, on cpu (Example Processor) with 2 threads.",
        "The onnx int4 file needs 52.10 MB of RAM to run with 512 tokens of context, alone in a process (40.00 MB of it Python "
        "and ONNX Runtime), and 8.00 MB for 1,000 tokens more.",
    ]
    assert [line.split(":")[0].strip() for line in below[:-2]] == [
        "perplexity",
        "KL to dense",
        "prefill tok/s",
        "decode tok/s",
        "RAM",
        "all words",
    ]


def test_table_in_markdown_has_the_same_cells():
    report = example_report()
    report.evaluation["rows"][1].update(perplexity=math.nan, decode_tokens_per_second=None)
    table = report.to_table(markdown=True).split("\n\n")[0].splitlines()
    assert {line.count("|") for line in table} == {10}
    assert table[3] == "| cut | 13 | 3.18 M | 12.72 MB | - | 0.4100 | 6,100 | - | - |"


def test_table_leaves_out_what_was_not_measured():
    report = example_report()
    for row in report.evaluation["rows"]:
        row.update(decode_tokens_per_second=None, kl=None)
    assert "tok/s" in report.to_table() and "decode" not in report.to_table() and "KL" not in report.to_table()
    assert CLPReport().to_table() == ""


def test_environment_info_names_versions_and_fits_the_schema():
    import transformers

    info = environment_info()
    assert info["torch"] == torch.__version__ and info["transformers"] == transformers.__version__
    assert info["num_threads"] == torch.get_num_threads() and info["device"].startswith("cpu")
    VALIDATOR.validate(CLPReport(environment=info).to_dict())


def test_a_name_that_is_no_utf_8_is_an_escape(tmp_path):
    """A folder of an old system has such a name; in Python it has half characters, which UTF-8 cannot say."""
    report = example_report()
    report.base_model["name_or_path"] = "mod\udce9le"
    text = report.save(tmp_path).read_text(encoding="utf-8")
    assert '"name_or_path": "mod\\udce9le"' in text
    assert CLPReport.load(tmp_path).base_model["name_or_path"] == "mod\udce9le"
