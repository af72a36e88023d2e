"""The contract of a runtime, for every name in the registry: the built-in ones, and those of other packages that are installed."""

import json
from types import SimpleNamespace

import pytest
from tiny_onnx import exported_llama

from optimum_clp.doors import RUNTIMES
from optimum_clp.exporters import export as exporters
from optimum_clp.exporters.export import write_runtime_configs
from optimum_clp.exporters.result import ExportResult
from optimum_clp.registry import Registry, Row

NAMES = list(RUNTIMES)
every_runtime = pytest.mark.parametrize("name", NAMES)
OURS = {"model_type": "llama", "vocab_size": 97, "transformers.js_config": {"dtype": "of the dense model"}}


@pytest.fixture
def folder(tmp_path):
    """An exported folder, with empty files in place of the ONNX files."""
    (tmp_path / "onnx").mkdir()
    for file in exported_llama().result.files:
        (tmp_path / file.file).touch()
    (tmp_path / "config.json").write_text(json.dumps(OURS))
    (tmp_path / "generation_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def written(folder, before):
    """Names of new files, and the keys of `config.json` that are new or other than before; nothing else may differ."""
    after = contents(folder)
    assert all(after.get(name) == content for name, content in before.items() if name != "config.json")
    old, new = (json.loads(files["config.json"]) for files in (before, after))
    assert old.keys() <= new.keys()
    return {*(after.keys() - before.keys()), *(f"config.json:{key}" for key in new if new[key] != old.get(key))}


@every_runtime
def test_what_is_written_is_json_and_its_own_alone(name, folder):
    model, result, runtime = exported_llama().model, exported_llama().result, RUNTIMES.get(name)()
    assert runtime.obstacle(model, result) is None
    before = contents(folder)
    runtime.write(folder, model, result)
    own = written(folder, before)
    assert own
    for path in own:
        if not path.startswith("config.json:"):
            assert json.loads((folder / path).read_text(encoding="utf-8"))
    # twice is once, and the others have theirs
    once = contents(folder)
    runtime.write(folder, model, result)
    assert contents(folder) == once
    for other in NAMES:
        if other != name:
            now = contents(folder)
            RUNTIMES.get(other)().write(folder, model, result)
            assert not own & written(folder, now)


@every_runtime
def test_a_file_that_was_not_made_is_not_named(name, folder):
    model, result = exported_llama().model, exported_llama().result
    for count in (1, 2, 3):
        given = ExportResult(result.opset, result.files[:count], result.context, result.inputs)
        if RUNTIMES.get(name)().obstacle(model, given) is not None:
            assert RUNTIMES.row(name).package, "ours take any of the files"
            continue
        RUNTIMES.get(name)().write(folder, model, given)
        text = "".join(content.decode() for path, content in contents(folder).items() if path.endswith(".json"))
        for file in result.files[count:]:
            assert file.file not in text


def registry_of(name, runtime):
    registry = Registry("runtime", "optimum_clp.no_such_group")
    registry.register(name, runtime)
    return registry


@every_runtime
def test_with_an_obstacle_nothing_is_written(name, folder, monkeypatch):
    """Keys and values of different sizes, which some runtimes cannot run."""
    odd = {
        key: (*shape[:3], shape[3] + 8) if key.endswith(".value") else shape
        for key, shape in exported_llama().result.inputs.items()
    }
    model, result = exported_llama().model, ExportResult(21, exported_llama().result.files, {}, odd)
    obstacle = RUNTIMES.get(name)().obstacle(model, result)
    monkeypatch.setattr(exporters, "RUNTIMES", registry_of(name, RUNTIMES.get(name)))
    before = contents(folder)
    assert write_runtime_configs(folder, model, result) == {name: obstacle}
    assert (written(folder, before) == set()) == (obstacle is not None)


def test_a_runtime_of_another_package_is_asked_and_writes(folder, monkeypatch):
    class Foreign:
        def obstacle(self, model, result):
            return None if len(result.files) == 3 else "it wants all files"

        def write(self, folder, model, result):
            (folder / "foreign.json").write_text(json.dumps({"file": result.smallest.file}))

    monkeypatch.setattr(exporters, "RUNTIMES", registry_of("foreign", Foreign))
    model, result = SimpleNamespace(), exported_llama().result
    before = contents(folder)
    fewer = ExportResult(result.opset, result.files[:1], {})
    assert write_runtime_configs(folder, model, fewer) == {"foreign": "it wants all files"}
    assert contents(folder) == before
    assert write_runtime_configs(folder, model, result) == {"foreign": None}
    assert written(folder, before) == {"foreign.json"}
    assert json.loads((folder / "foreign.json").read_text()) == {"file": "onnx/model_q4.onnx"}


def test_a_package_that_cannot_be_imported_costs_its_own_files_alone(folder, monkeypatch):
    monkeypatch.setattr(RUNTIMES, "_added", {"broken": Row("no_such_module:thing", package="broken-package")})
    obstacles = write_runtime_configs(folder, exported_llama().model, exported_llama().result)
    assert "the package broken-package adds it as no_such_module:thing" in obstacles.pop("broken")
    assert set(obstacles.values()) == {None} and (folder / "genai_config.json").is_file()
