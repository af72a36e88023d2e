import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from optimum.quantization_base import OptimumQuantizer
from tiny_models import make_identity, random_tokens, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_clp import CLPConfig, CLPPruner, LayerSegment
from optimum_clp.doors import LOSSES, ROUNDINGS, STARTS, STRATEGIES
from optimum_clp.errors import ConfigurationError, ModelError, OutputError, TuningError
from optimum_clp.exporters.result import ExportResult
from optimum_clp.registry import Row
from optimum_clp.report.report import CLPReport


def recipe(tmp_path, **overrides):
    values = {
        "pruning_ratio": 0.33,
        "calibration": {
            "sequence_length": 24,
            "train_sequences": 12,
            "validation_sequences": 4,
            "test_sequences": 4,
            "cache_dir": str(tmp_path / "cache"),
        },
        "search": {"num_sequences": 8},
        "tuning": {"epochs": 1, "batch_size": 4, "learning_rate": 3e-3},
        "export": {"enabled": False},
        "evaluation": {"max_new_tokens": 4},
    }
    for key, value in overrides.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return CLPConfig(**values)


@pytest.fixture(autouse=True, scope="module")
def _few_repeats():
    # self-written text of a random model repeats nothing; the speed rounds only cost time here
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optimum_clp.evaluation.outcome.NEW_TOKENS", 3)
        yield


def write_dense(folder, **settings):
    tiny_model(tie_word_embeddings=True, **settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def dense_folder(tmp_path):
    return write_dense(tmp_path / "dense")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """What one call of `prune` made of a dense folder, without ONNX files; to be looked at, not changed."""
    place = tmp_path_factory.mktemp("pruned")
    pruner = CLPPruner.from_pretrained(write_dense(place / "dense"), quiet=True)
    model = pruner.prune(recipe(place), save_directory=place / "out")
    return SimpleNamespace(pruner=pruner, model=model, place=place, dense=place / "dense", out=place / "out")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The same with all ONNX files; `graph` is what torch traced, before anything was done to it."""
    place = tmp_path_factory.mktemp("exported")
    pruner = CLPPruner.from_pretrained(write_dense(place / "dense", num_layers=3), quiet=True)
    programs = []

    def export(*args, **options):
        program = trace(*args, **options)
        programs.append(program.model.clone())
        return program

    trace = torch.onnx.export
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", export)
        pruner.prune(recipe(place, export={"enabled": True}, quantization={"group_size": 16}), place / "out")
    return SimpleNamespace(pruner=pruner, out=place / "out", graph=programs[-1])


def test_it_is_an_optimum_quantizer():
    assert issubclass(CLPPruner, OptimumQuantizer)


def test_one_call_from_a_folder_to_a_folder(pruned, tmp_path):
    model, out = pruned.model, pruned.out
    assert model.config.num_hidden_layers == 4
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "clp_config.json",
        "clp_report.json",
        "README.md",
        "report.html",
    }
    ids = random_tokens(2, 16)
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        f"logits = model(torch.tensor({ids.tolist()})).logits\n"
        "torch.save(logits.detach(), sys.argv[2]); AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert 'optimum_clp' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(out), str(tmp_path / "logits.pt")], check=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(ids).logits, atol=1e-5, rtol=1e-5)


def test_the_report_holds_what_was_measured(pruned):
    import jsonschema

    pruner, model = pruned.pruner, pruned.model
    report = json.loads((pruned.out / "clp_report.json").read_text())
    schema = json.loads((Path(__file__).parents[1] / "docs" / "clp_report.schema.json").read_text())
    jsonschema.validate(report, schema)
    rows = {row["name"]: row for row in report["evaluation"]["rows"]}
    assert list(rows) == ["dense", "cut", "tuned"]
    test = pruner._session.calibration().test
    with torch.no_grad():
        logits = model(test).logits.double().log_softmax(-1)
    loss = -logits[:, :-1].gather(-1, test[:, 1:, None]).mean().item()
    assert rows["tuned"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert rows["dense"]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows["tuned"]["kl"] < rows["cut"]["kl"]
    assert rows["cut"]["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert all(row["decode_tokens_per_second"] > 0 for row in rows.values())
    assert report["cut"]["num_layers_before"] == 6 and len(report["cut"]["removed_layers"]) == 2
    for name in ("README.md", "report.html"):
        assert str(pruned.place) not in (pruned.out / name).read_text()


def test_a_written_folder_restores_everything(pruned):
    pruner = pruned.pruner
    again = CLPPruner.from_pretrained(pruned.out, quiet=True)
    assert again.config == pruner.config
    assert again.segments == pruner.segments
    assert again.report.to_dict() == pruner.report.to_dict()
    assert again.model is None
    measured = again.evaluate()
    tuned = next(r for r in pruner.report.evaluation["rows"] if r["name"] == "tuned")
    assert measured["perplexity"] == pytest.approx(tuned["perplexity"], rel=1e-5)
    result = again.tune()  # finds the dense model through the report
    assert result.initial_validation_loss == pytest.approx(pruner.report.tuning["best_validation_loss"], rel=1e-4)
    assert again.model.config.num_hidden_layers == 6


def test_a_restored_folder_whose_dense_model_is_gone_says_so(pruned):
    pruned.dense.rename(pruned.place / "elsewhere")
    try:
        again = CLPPruner.from_pretrained(pruned.out, quiet=True)
        with pytest.raises(
            ModelError, match="base_model is .*this step needs the dense model, and it could not be loaded"
        ):
            again.tune()
        again.model = AutoModelForCausalLM.from_pretrained(pruned.place / "elsewhere").eval()
        assert again.tune().steps > 0
    finally:
        (pruned.place / "elsewhere").rename(pruned.dense)


def test_the_steps_can_be_called_alone(tmp_path):
    dense = make_identity(tiny_model(), [2, 3])
    before = {n: t.clone() for n, t in dense.state_dict().items()}
    pruner = CLPPruner.from_pretrained(dense, tokenizer=tiny_tokenizer(), quiet=True)
    assert pruner.search(recipe(tmp_path)).segments == (LayerSegment(2, 4),)
    cut = pruner.cut()
    assert pruner.report.search["segments"] == [[2, 4]]
    ids = random_tokens(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(cut(ids).logits, dense(ids).logits)
    pruner.cut([(1, 3)])
    assert pruner.report.search is None
    assert pruner.report.cut["removed_layers"] == [1, 2] and pruner.report.tuning is None
    assert pruner.tune().layers == (0, 1)
    pruner.save_pretrained(tmp_path / "out")
    assert [r["name"] for r in pruner.report.evaluation["rows"]] == ["dense", "cut", "tuned"]
    assert all(torch.equal(t, before[n]) for n, t in dense.state_dict().items())


def test_a_new_search_forgets_the_old_cut(tmp_path):
    pruner = CLPPruner.from_pretrained(make_identity(tiny_model(), [2, 3]), quiet=True)
    pruner.cut([(0, 2)])
    pruner.search(recipe(tmp_path))
    assert pruner.pruned_model is None and pruner.report.cut is None
    with pytest.raises(ConfigurationError, match="nothing has been cut yet"):
        pruner.tune()


def test_a_model_without_tokenizer_writes_its_own_text(tmp_path):
    pruner = CLPPruner.from_pretrained(tiny_model(), quiet=True)
    pruner.prune(recipe(tmp_path), save_directory=tmp_path / "out")
    assert pruner.report.calibration["source"] == "self-written"
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_copy_can_be_trained_as_a_whole(tmp_path):
    dense = tiny_model(tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    smaller = CLPPruner.from_pretrained(dense, quiet=True).prune(recipe(tmp_path), copy=True)
    assert smaller.lm_head.weight is smaller.model.embed_tokens.weight
    with torch.no_grad():
        for tensor in (*smaller.parameters(), *smaller.buffers()):
            tensor.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_given_text_is_used(dense_folder, tmp_path):
    words = " ".join(f"w{i}" for i in random_tokens(1, 800)[0].tolist())
    (tmp_path / "text.txt").write_text(words)
    pruner = CLPPruner.from_pretrained(dense_folder, quiet=True)
    pruner.search(recipe(tmp_path, calibration={"dataset": str(tmp_path / "text.txt")}))
    assert "text.txt" in pruner.report.calibration["source"]
    assert pruner.report.calibration["source"].endswith("text.txt and self-written")
    result = pruner.evaluate([words], reference=pruner.model)
    assert result["kl"] == pytest.approx(0, abs=1e-6) and result["num_tokens"] > 500
    length = pruner.config.calibration.sequence_length
    assert pruner.evaluate([words], num_sequences=3)["num_tokens"] == 3 * (length - 1)
    with pytest.raises(ConfigurationError, match="num_sequences is 0: it must be at least 1. Leave it out to measure"):
        pruner.evaluate([words], num_sequences=0)


def test_nothing_is_cut_before_there_is_a_segment(tmp_path):
    pruner = CLPPruner.from_pretrained(tiny_model(), quiet=True)
    with pytest.raises(ConfigurationError, match="there is nothing to cut yet. Call search\\(\\) first"):
        pruner.cut()
    for call in (pruner.tune, lambda: pruner.save_pretrained(tmp_path / "o"), lambda: pruner.export(tmp_path / "o")):
        with pytest.raises(ConfigurationError, match="nothing has been cut yet. Call prune"):
            call()
    assert not (tmp_path / "o").exists()


def test_a_full_output_folder_is_refused_before_any_work(dense_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    pruner = CLPPruner.from_pretrained(dense_folder, quiet=True)
    with pytest.raises(OutputError, match="it is not empty"):
        pruner.prune(recipe(tmp_path), save_directory=tmp_path / "out")
    assert pruner.report.search is None
    assert (tmp_path / "out" / "precious").read_text() == "x"
    pruner.prune(recipe(tmp_path), save_directory=tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "precious").exists()


def test_a_failed_check_leaves_nothing_behind(dense_folder, tmp_path):
    pruner = CLPPruner.from_pretrained(dense_folder, quiet=True)
    with mock.patch("optimum_clp.output_folder.verify_checkpoint", side_effect=RuntimeError("planted")):
        with pytest.raises(RuntimeError, match="planted"):
            pruner.prune(recipe(tmp_path), save_directory=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "dense"]


def test_after_a_loss_that_is_not_finite_the_last_good_weights_are_saved(dense_folder, tmp_path, monkeypatch):
    calls = []

    def planted(teacher, student, *args):
        calls.append(1)
        return original(teacher, student) * (math.nan if len(calls) == 5 else 1.0)

    from optimum_clp.tuning import losses

    original = losses.kl_divergence
    monkeypatch.setattr("optimum_clp.tuning.losses.kl_divergence", planted)
    pruner = CLPPruner.from_pretrained(dense_folder, quiet=True)
    with pytest.raises(TuningError, match="it must stay finite"):
        pruner.prune(recipe(tmp_path, tuning={"epochs": 3}), save_directory=tmp_path / "out")
    assert CLPReport.load(tmp_path / "out").tuning["stopped"] == "nan"
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_ratio_that_removes_nothing_is_refused(tmp_path):
    pruner = CLPPruner.from_pretrained(tiny_model(), quiet=True)
    with pytest.raises(ConfigurationError, match="it removes none of the model's 6 layers. The nearest valid ratio"):
        pruner.prune(recipe(tmp_path, pruning_ratio=0.05))


def test_a_file_of_a_model_in_memory_is_refused():
    with pytest.raises(
        ConfigurationError, match="file_name is 'onnx/model.onnx': it names a file of a folder, and a model"
    ):
        CLPPruner.from_pretrained(tiny_model(), "onnx/model.onnx")


def test_an_unsupported_architecture_is_refused(tmp_path):
    from transformers import RwkvConfig

    model = AutoModelForCausalLM.from_config(RwkvConfig(num_hidden_layers=2, hidden_size=8, vocab_size=50))
    with pytest.raises(ModelError, match="model_type is 'rwkv': it divides its weights in place while it runs"):
        CLPPruner.from_pretrained(model)


def test_quantize_writes_a_quanto_folder(exported, tmp_path, monkeypatch):
    from optimum_clp.quantization import load_quantized

    # the same weights were traced before, which is most of an export; the files are made, and checked, anew
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: SimpleNamespace(model=exported.graph.clone()))
    pruner = CLPPruner.from_pretrained(exported.out, quiet=True)
    folder = pruner.quantize(tmp_path / "q", weights="int8")
    assert load_quantized(folder).config.num_hidden_layers == 2
    assert pruner.report.quantization[0]["weights"] == "int8"
    # also a cut that was never saved
    unsaved = CLPPruner(tiny_model(), quiet=True)
    unsaved.cut([(2, 4)])
    assert load_quantized(unsaved.quantize(tmp_path / "unsaved", weights="int8")).config.num_hidden_layers == 4
    with pytest.raises(ConfigurationError, match="file_prefix is 'x': quanto checkpoints have fixed file names"):
        pruner.quantize(tmp_path / "q2", "x")
    exported = CLPReport.load(pruner.export(tmp_path / "onnx"))
    assert exported.quantization is None and len(exported.export["files"]) == 3
    assert exported.export["genai_obstacle"] is None
    genai = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    assert genai["model"]["decoder"]["filename"] == "onnx/model_q4.onnx"
    assert json.loads((tmp_path / "onnx" / "config.json").read_text())["transformers.js_config"] == {"dtype": "q4"}


def test_rounding_looks_at_train_rows_if_the_method_does(dense_folder, tmp_path, monkeypatch):
    given = []

    def export(model, folder, export, quantization, *, calibration, **options):
        given.append(calibration)
        return ExportResult(21, (), {"length": None, "checked": "none"})

    monkeypatch.setattr("optimum_clp.output_folder.export_onnx", export)
    monkeypatch.setattr("optimum_clp.output_folder.write_runtime_configs", lambda *args: {"genai": None})
    pruner = CLPPruner.from_pretrained(dense_folder, quiet=True)
    pruner.cut([(2, 4)])
    for index, values in enumerate(
        ({}, {"weights": ["int8"]}, {"method": "rtn"}, {"method": "rtn", "bits_per_weight": 6}, {"method": "quanto"})
    ):
        pruner.config = recipe(tmp_path, quantization={"calibration_sequences": 5, **values})
        pruner.export(tmp_path / f"onnx-{index}")
    assert [rows is not None for rows in given] == [True, False, False, True, False]
    assert torch.equal(given[0], pruner._session.calibration().train[:5]) and torch.equal(given[3], given[0])
    # a cut folder: the dense model, which may be gone, is not asked
    pruner.config = recipe(tmp_path)
    cut = CLPPruner.from_pretrained(pruner.save_pretrained(tmp_path / "cut"), quiet=True)
    cut.config.quantization.calibration_sequences = 3
    cut.export(tmp_path / "again")
    assert cut.model is None and given[-1].shape == (3, 24)


def test_recipe_and_report_are_read_from_the_hub_too(pruned, monkeypatch):
    asked = []

    def cached_file(path, name, **options):
        asked.append((path, name, options["revision"]))
        return str(pruned.out / name)

    monkeypatch.setattr("optimum_clp.report.hub.cached_file", cached_file)
    cut = AutoModelForCausalLM.from_pretrained(pruned.out).eval()
    monkeypatch.setattr("optimum_clp.session.load_model", lambda path, **options: cut)
    monkeypatch.setattr("optimum_clp.session.load_tokenizer", lambda path, **options: tiny_tokenizer())
    pruner = CLPPruner.from_pretrained("me/name", revision="v1", quiet=True)
    assert asked == [("me/name", "clp_config.json", "v1"), ("me/name", "clp_report.json", "v1")]
    assert pruner.pruned_model is cut and pruner.segments is not None


class TestUpload:
    def upload(self, pruner, repo="me/name", **kwargs):
        seen = {}

        def record(self, *, repo_id, folder_path, **options):
            files = {
                str(p.relative_to(folder_path)): p.read_bytes() for p in Path(folder_path).rglob("*") if p.is_file()
            }
            seen.update(repo_id=repo_id, files=files, options=options)
            return "https://hub/commit"

        with (
            mock.patch("huggingface_hub.HfApi.create_repo", return_value=mock.Mock(repo_id=repo)) as create,
            mock.patch("huggingface_hub.HfApi.upload_folder", record),
        ):
            seen["url"] = pruner.push_to_hub(repo, **kwargs)
        seen["create"] = create.call_args
        return seen

    def test_the_folder_goes_up_with_its_subfolders_and_without_local_paths(self, dense_folder, tmp_path):
        pruner = CLPPruner.from_pretrained(dense_folder, quiet=True)
        pruner.prune(recipe(tmp_path, quantization={"quanto": True, "weights": ["int8"]}), tmp_path / "out")
        seen = self.upload(pruner, private=True, commit_message="hello")
        assert seen["url"] == "https://hub/commit"
        assert seen["create"].kwargs == {"private": True, "token": None, "exist_ok": True}
        assert seen["options"]["commit_message"] == "hello"
        assert {"model.safetensors", "README.md"} <= set(seen["files"])
        assert any(name.startswith("quanto-int8/") for name in seen["files"])
        for name, content in seen["files"].items():
            assert str(tmp_path).encode() not in content, name
        assert b"me/name" in seen["files"]["README.md"] and b"<h1>me/name</h1>" in seen["files"]["report.html"]
        # the folder itself keeps what a later stage needs
        assert CLPReport.load(tmp_path / "out").base_model["name_or_path"] == str(dense_folder)
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".upload")]

    def test_a_model_that_was_not_saved_is_saved_first(self, dense_folder, tmp_path):
        pruner = CLPPruner.from_pretrained(dense_folder, quiet=True)
        pruner.prune(recipe(tmp_path))
        assert "model.safetensors" in self.upload(pruner)["files"]

    def test_the_users_own_strings_are_not_published(self, tmp_path):
        words = " ".join(f"w{i}" for i in random_tokens(1, 800)[0].tolist())
        pruner = CLPPruner.from_pretrained(tiny_model(), tokenizer=tiny_tokenizer(), quiet=True)
        pruner.prune(recipe(tmp_path, calibration={"dataset": [words]}), tmp_path / "out")
        seen = self.upload(pruner)
        assert all(words[:40].encode() not in content for content in seen["files"].values())


def test_onnx_files_are_written_measured_and_evaluated_by_the_same_code(exported, tmp_path):
    rows = {row["name"]: row for row in exported.pruner.report.evaluation["rows"]}
    assert list(rows) == ["dense", "cut", "tuned", "onnx", "onnx int8", "onnx int4"]
    assert rows["onnx"]["perplexity"] == pytest.approx(rows["tuned"]["perplexity"], rel=1e-4)
    assert rows["onnx int8"]["kl"] < rows["onnx int4"]["kl"]
    assert rows["onnx int4"]["bytes"] < rows["onnx int8"]["bytes"] < rows["onnx"]["bytes"]
    again = CLPPruner.from_pretrained(exported.out, quiet=True)
    again.config.export.enabled = False
    again.save_pretrained(tmp_path / "without")
    assert again.report.export is None and "onnx/" not in (tmp_path / "without" / "README.md").read_text()
    found = CLPPruner.from_pretrained(exported.out, "onnx/model_q4.onnx", quiet=True)
    words = " ".join(f"w{i}" for i in random_tokens(1, 300)[0].tolist())
    assert found.evaluate([words])["perplexity"] > 1
    with pytest.raises(Exception, match="an ONNX file alone has no test rows"):
        found.evaluate()
    assert AutoTokenizer.from_pretrained(exported.out)("w5 w6")["input_ids"] == [5, 6]


@pytest.mark.parametrize(
    ("registry", "settings"),
    [
        (STRATEGIES, {"search": {"strategy": "broken"}}),
        (LOSSES, {"tuning": {"loss": {"kd": 0.5, "broken": 0.5}}}),
        (STARTS, {"tuning": {"init": "broken"}}),
        (ROUNDINGS, {"quantization": {"method": "broken"}}),
    ],
    ids=lambda value: value.kind if hasattr(value, "kind") else "",
)
def test_a_package_that_cannot_be_imported_is_told_before_any_work(registry, settings, monkeypatch):
    monkeypatch.setattr(registry, "_added", {"broken": Row("no_such_module:thing", package="broken-package")})
    monkeypatch.setattr("optimum_clp.session.load_calibration", lambda *args, **options: pytest.fail("work was done"))
    with pytest.raises(ConfigurationError, match="the package broken-package adds it as no_such_module:thing"):
        CLPPruner(tiny_model(), quiet=True).prune(CLPConfig(0.34, **settings))


def test_a_copy_has_a_session_of_its_own():
    pruner = CLPPruner(tiny_model(), quiet=True)
    other = copy.copy(pruner)
    other.config, other.segments = CLPConfig(0.5), (LayerSegment(1, 2),)
    assert (pruner.config.pruning_ratio, pruner.segments) == (0.2, None)
    assert other.model is pruner.model
