"""The memory that a file needs to run, in a process of its own."""

import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_models import random_tokens
from tiny_onnx import exported_llama

from optimum_clp.architecture.lookup import context_limit
from optimum_clp.errors import ExportError
from optimum_clp.evaluation.memory import FileMemory, measure_memory, memory_is_told
from optimum_clp.evaluation.outcome import Measurements
from optimum_clp.runtime.causal_lm import OnnxCausalLM
from optimum_clp.runtime.memory_use import resident

MIB = 2**20


def test_the_cache_is_what_the_config_says_and_a_process_holds_more_with_a_file_than_without():
    exported = exported_llama()
    config = exported.model.config
    found = measure_memory(exported.folder / "onnx" / "model_q4.onnx", 33)
    width = config.num_key_value_heads * config.head_dim
    assert found.cache_per_token == 2 * config.num_hidden_layers * width * 4 and found.num_tokens == 33
    assert 10 * MIB < found.before < found.loaded <= found.peak < 2000 * MIB
    assert found == FileMemory(**json.loads(json.dumps(asdict(found))))


def big_file(path, mib):
    """A graph like an exported one whose one weight has so many MiB."""
    columns = mib * MIB // 4 // 64
    weight = numpy_helper.from_array(np.ones((64, columns), np.float32), "w")
    logits = helper.make_node("Gather", ["w", "input_ids"], ["logits"])
    tokens = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", columns])
    graph = helper.make_graph([logits], "g", [tokens], [out], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_weights_are_counted(tmp_path):
    """A hundred MiB of weights are a hundred MiB of memory, however much this process holds itself."""
    held = np.ones(300 * MIB, np.uint8)
    small, large = (measure_memory(big_file(tmp_path / f"{mib}.onnx", mib), 2) for mib in (1, 101))
    assert (
        95 * MIB < large.loaded - small.loaded < 330 * MIB
    )  # ONNX Runtime holds the file while it makes its own copy
    assert small.peak < held.nbytes and large.peak >= large.loaded and small.cache_per_token == 0


def test_this_process_is_read_too():
    now, most = resident()
    block = np.ones(64 * MIB, np.uint8)
    assert resident()[1] >= most and resident()[0] > now + 32 * MIB and block.any()


def test_a_file_that_does_not_run_is_named(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError) as told:
        measure_memory(tmp_path / "model.onnx", 2)
    said = str(told.value)
    assert "model.onnx is 'exit status 1': the process that measures its memory ended without a result" in said
    assert "or lower evaluation.memory_context" in said


def test_it_needs_neither_torch_nor_transformers():
    code = "import sys, optimum_clp.runtime.memory_use; print({'torch', 'transformers', 'onnx_ir'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


@pytest.mark.memory
def test_rows_of_files_say_what_they_need_with_as_much_context_as_the_model_takes(monkeypatch):
    exported, model = exported_llama(), exported_llama().model
    monkeypatch.setattr("optimum_clp.evaluation.outcome.NEW_TOKENS", 3)
    rows = random_tokens(2, 16)
    measurements = Measurements(rows, "text", None, context=context_limit(model.config), quiet=True)
    measurements.add_model("cut", model)
    file = exported.folder / "onnx" / "model_q4.onnx"
    measurements.add_file("onnx int4", OnnxCausalLM.from_pretrained(exported.folder, "onnx/model_q4.onnx"), 100, model)
    measurements.add_memory({"onnx int4": file}, 2**20)
    cut, int4 = measurements.to_dict()["rows"]
    assert "memory" not in cut and int4["memory"]["num_tokens"] == context_limit(model.config) < 2**20
    assert int4["memory"]["peak"] > 10 * MIB


def test_a_system_that_does_not_say_it_is_no_failure(monkeypatch):
    measurements = Measurements(random_tokens(1, 8), "text", None, quiet=True)
    measurements.add_model("cut", exported_llama().model)
    monkeypatch.setattr("optimum_clp.evaluation.outcome.memory_is_told", lambda: False)
    measurements.add_memory({"cut": "no file"}, 8)
    assert "memory" not in measurements.to_dict()["rows"][0] and memory_is_told()
