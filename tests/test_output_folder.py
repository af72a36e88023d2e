import inspect
import json
from pathlib import Path

import jsonschema
import pytest
import torch
from notices import notice
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from zoo import ZOO, zoo_model

from optimum_clp import CLPConfig, LayerSegment
from optimum_clp.commands.running import exit_status
from optimum_clp.errors import ConfigurationError, ExportError, OutputError, QuantizationError
from optimum_clp.evaluation.outcome import Measurements
from optimum_clp.exporters.export import ExportResult
from optimum_clp.exporters.weight_files import WeightFiles
from optimum_clp.output_folder import check_writable, finish_run, write_export, write_run
from optimum_clp.report.report import CLPReport
from optimum_clp.session import Session
from optimum_clp.surgery.cut import cut_model

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "clp_report.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
SEGMENTS = (LayerSegment(2, 4),)


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A cut model that nothing was written of yet; reports of earlier files are in its report."""
    monkeypatch.setattr("optimum_clp.evaluation.outcome.NEW_TOKENS", 3)
    sizes = {"train_sequences": 4, "validation_sequences": 2, "test_sequences": 2, "sequence_length": 8}
    config = CLPConfig(calibration={**sizes, "cache_dir": str(tmp_path / "cache")}, export={"enabled": False})
    config.evaluation.max_new_tokens = 4
    dense = tiny_model()
    session = Session(dense, tiny_tokenizer(), config, quiet=True)
    session.set_cut(cut_model(dense, SEGMENTS), SEGMENTS)
    session.report.quantization, session.report.export = [{"path": "elsewhere"}], {"files": []}
    return session


def test_a_folder_speaks_of_its_own_files_alone(session, tmp_path):
    assert write_run(session, tmp_path / "out") == session.folder == tmp_path / "out"
    written = CLPReport.load(tmp_path / "out")
    assert written.quantization is None and written.export is None
    assert [row["name"] for row in written.evaluation["rows"]] == ["dense", "cut"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 4
    assert {"clp_config.json", "README.md"} <= {file.name for file in (tmp_path / "out").iterdir()}


def test_the_text_that_was_measured_on_is_named(session, tmp_path):
    write_run(session, tmp_path / "own")
    assert "text that the dense model wrote (seed 1;" in session.report.measured_on()
    # half of the train rows are still written by the dense model, but no test row
    session.config.calibration.dataset = [" ".join(f"w{3 + i % 90}" for i in range(400))]
    write_run(session, tmp_path / "given")
    assert "Measured on the test split of list of 1 strings, 14 tokens" in session.report.measured_on()


def test_an_export_has_no_weights_of_pytorch(session, tmp_path, monkeypatch):
    result = ExportResult(21, (), {"length": None, "checked": "none"})
    monkeypatch.setattr("optimum_clp.output_folder.export_onnx", lambda *args, **options: result)
    monkeypatch.setattr("optimum_clp.output_folder.write_runtime_configs", lambda *args: {"genai": "its cache is odd"})
    write_export(session, tmp_path / "out")
    written = CLPReport.load(tmp_path / "out")
    assert written.quantization is None and written.export["genai_obstacle"] == "its cache is odd"
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "clp_report.json"} <= names
    assert not any(name.endswith(".safetensors") for name in names)


def failing(*args, **options):
    raise ExportError.of("file", "model.onnx", "planted", "None")


def test_an_export_that_fails_leaves_nothing_behind(session, tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_clp.output_folder.export_onnx", failing)
    session.config.export.enabled = True
    with pytest.raises(ExportError, match="planted"):
        write_export(session, tmp_path / "out")
    assert session.folder is None and [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


@pytest.mark.parametrize("write", [write_run, write_export])
def test_a_folder_that_is_not_empty_is_not_written_to(session, tmp_path, write):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(OutputError, match="it is not empty"):
        write(session, tmp_path / "out")


STAGES = {
    "ONNX export": "output_folder.export_onnx",
    "evaluation": "output_folder.measure_outcome",
    "evaluation of cut": "evaluation.outcome.Measurements.add_model",
    "speeds": "evaluation.outcome.Measurements.add_speed",
    "memory": "evaluation.outcome.Measurements.add_memory",
    "generation": "evaluation.deployment.measure_generation",
    "plots": "output_folder.write_plots",
    "model card": "output_folder.write_model_card",
    "report page": "output_folder.write_report_page",
    "recipe": "configuration.clp_config.CLPConfig.save_pretrained",
    "environment": "output_folder.environment_info",
    "fingerprints": "output_folder.record_origin",
    "report": "report.report.CLPReport.save",
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [RuntimeError("Failed to find font DejaVu Sans"), MemoryError()])
def test_nothing_after_the_weights_loses_them(session, tmp_path, monkeypatch, stage, error):
    def fail(*args, **options):
        raise error

    session.config.export.enabled = stage == "ONNX export"
    session.config.quantization.method = "rtn"
    with monkeypatch.context() as patch:
        patch.setattr(f"optimum_clp.{STAGES[stage]}", fail)
        write_run(session, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 4
    if stage == "report":
        assert not (tmp_path / "out" / "clp_report.json").exists()
        return
    written = CLPReport.load(tmp_path / "out")
    failures = {entry["stage"]: entry for entry in written.failures}
    assert stage in failures and all(name == stage or name.startswith("evaluation of") for name in failures)
    assert failures[stage]["error"].startswith(f"{type(error).__name__}: ")
    assert failures[stage]["command"] == "optimum-clp finish --model out"
    assert VALIDATOR.is_valid(json.loads((tmp_path / "out" / "clp_report.json").read_text()))


@pytest.mark.parametrize("stage", ["speeds", "memory", "plots", "report page"])
def test_what_failed_is_done_again(session, tmp_path, monkeypatch, stage):
    weights = None
    with monkeypatch.context() as patch:
        patch.setattr(f"optimum_clp.{STAGES[stage]}", failing)
        write_run(session, tmp_path / "out")
        weights = (tmp_path / "out" / "model.safetensors").read_bytes()
        finish_run(session)
        assert [entry["stage"] for entry in CLPReport.load(tmp_path / "out").failures] == [stage]
    finish_run(session)
    written = CLPReport.load(tmp_path / "out")
    assert written.failures is None and written.evaluation["rows"][1]["decode_tokens_per_second"] > 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    assert {path.name for path in tmp_path.iterdir()} == {"out", "cache"}
    with pytest.raises(ConfigurationError, match="model is .*out': nothing in it has failed that could be done again"):
        finish_run(session)


@pytest.mark.parametrize("stage", ["_export_into", "_measure"])
def test_an_interruption_loses_nothing_that_is_there(session, tmp_path, monkeypatch, stage):
    session.config.export.enabled = True
    session.config.quantization.method, session.config.quantization.group_size = "rtn", 16
    with monkeypatch.context() as patch:
        patch.setattr(f"optimum_clp.output_folder.{stage}", interrupting)
        with pytest.raises(KeyboardInterrupt):
            write_run(session, tmp_path / "out")
    written = CLPReport.load(tmp_path / "out")
    left = ["ONNX export", "evaluation"] if stage == "_export_into" else ["evaluation"]
    assert [(entry["stage"], entry["error"]) for entry in written.failures] == [(name, "interrupted") for name in left]
    assert (tmp_path / "out" / "onnx").is_dir() == (stage == "_measure") and (tmp_path / "out" / "README.md").is_file()
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"out"}
    finish_run(session)
    written = CLPReport.load(tmp_path / "out")
    assert written.failures is None and written.evaluation and len(written.export["files"]) == 3


def interrupting(*args, **options):
    raise KeyboardInterrupt


def test_a_file_that_cannot_be_made_leaves_the_others(session, tmp_path, monkeypatch):
    add = WeightFiles.add

    def fail(files, precision, *args, **options):
        if precision.name == "int4":
            raise QuantizationError.of("file", "model_q4.onnx", "planted", "None")
        add(files, precision, *args, **options)

    monkeypatch.setattr(WeightFiles, "add", fail)
    session.config.export.enabled = True
    session.config.quantization.method, session.config.quantization.group_size = "rtn", 16
    write_run(session, tmp_path / "out")
    written = CLPReport.load(tmp_path / "out")
    assert [entry["stage"] for entry in written.failures] == ["onnx int4 file"]
    assert [entry["weights"] for entry in written.export["files"]] == ["float32", "int8"]
    names = {file.name for file in (tmp_path / "out" / "onnx").iterdir()}
    assert not any("q4" in name for name in names) and "model.onnx" in names


@pytest.mark.parametrize("context", [8, 16, 40, 100, 158, 159])
def test_speed_is_measured_within_a_short_context(context, tmp_path):
    dense = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=97, n_positions=context)).eval()
    measured = Measurements(torch.zeros(1, context, dtype=torch.int64), "zeros", None, context=context, quiet=True)
    measured.add_model("cut", dense)
    measured.add_speed({"cut": lambda: dense})
    assert measured.rows[0].decode_tokens_per_second > 0


def test_what_an_architecture_does_not_have_is_said_before_any_work():
    models = {tiny.name: tiny for tiny in ZOO}
    session = Session(zoo_model(models["gpt2"]), config=CLPConfig(quantization={"quanto": True}))
    with pytest.raises(QuantizationError, match="model is 'GPT2LMHeadModel': .*Conv1D"):
        check_writable(session)
    session.config.quantization.quanto = False
    check_writable(session)
    session = Session(zoo_model(models["mamba2"]))
    # transformers 5.24 calls its states a cache too
    named = "cache" in inspect.signature(session.model.forward).parameters
    reason = "its cache holds more than the keys and values" if named else "it gives no key-value cache"
    with pytest.raises(ExportError, match=f"model is .*Mamba2ForCausalLM.*{reason}"):
        check_writable(session)
    session.config.export.enabled = False
    check_writable(session)


def test_terms_and_origin_of_the_dense_model_go_along(session, tmp_path):
    base = tmp_path / "models--acme--chat" / "snapshots" / "0"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: acme\nlicense_link: LICENSE.md\n---\n")
    (base / "LICENSE.md").write_text("terms")
    session.report.base_model["name_or_path"] = str(base)
    write_run(session, tmp_path / "out")
    assert (tmp_path / "out/LICENSE.md").read_text() == "terms"
    card = (tmp_path / "out/README.md").read_text()
    for line in ("license: other", "license_name: acme", "license_link: LICENSE.md", "base_model: acme/chat"):
        assert f"{line}\n" in card
    assert CLPReport.load(tmp_path / "out").base_model["origin"]["license_name"] == "acme"


def test_a_licence_that_nobody_knows_is_said(session, tmp_path):
    session.report.base_model["name_or_path"] = "acme/no-such-model"
    with notice("licence: the card of acme/no-such-model is not in the cache, and the Hugging Face Hub"):
        write_run(session, tmp_path / "out")
    assert "license:" not in (tmp_path / "out/README.md").read_text()


def test_a_report_that_cannot_be_written_has_failed_too(session, tmp_path, monkeypatch):
    """Nothing reads that from the folder, so the command's status must say it."""

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CLPReport, "save", full)
    write_run(session, tmp_path / "out")
    assert [entry["stage"] for entry in session.report.failures] == ["report"]
    assert exit_status(session.report) == 3 and (tmp_path / "out" / "model.safetensors").is_file()
