import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from optimum_clp.runtime.in_place import model_in_place
from optimum_clp.runtime.session import in_place_options, open_session


def written(folder, *, wide=64, name="model.onnx", **options):
    """Two products, a large and a small weight, and metadata behind the graph."""
    generator, value = np.random.default_rng(0), helper.make_tensor_value_info
    large, small = generator.standard_normal((wide, 32)), generator.standard_normal((32, 3))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "large"], ["y"]), helper.make_node("MatMul", ["y", "small"], ["z"])],
        "products",
        [value("x", onnx.TensorProto.FLOAT, ["rows", wide])],
        [value("z", onnx.TensorProto.FLOAT, ["rows", 3])],
        [numpy_helper.from_array(weight.astype(np.float32), n) for weight, n in ((large, "large"), (small, "small"))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10, doc_string="odd")
    helper.set_model_props(model, {"key": "value"})
    onnx.save(model, folder / name, **options)
    return folder / name, model


def answers(session, wide=64):
    x = np.random.default_rng(1).standard_normal((5, wide)).astype(np.float32)
    return session.run(None, {"x": x})[0]


def test_what_is_left_is_the_file_and_where_its_weights_lie(tmp_path):
    """By onnx's own reader of weights that lie beside a graph."""
    file, model = written(tmp_path)
    found = onnx.load_from_string(model_in_place(file))
    assert len(model_in_place(file)) < 2000 < file.stat().st_size
    large, small = found.graph.initializer
    assert small == model.graph.initializer[1]
    assert large.data_location == onnx.TensorProto.EXTERNAL and not large.HasField("raw_data")
    onnx.external_data_helper.load_external_data_for_model(found, str(tmp_path))
    for tensor in found.graph.initializer:
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")
    assert found == model


def test_a_session_gives_the_same_answers(tmp_path):
    file, _ = written(tmp_path)
    plain = answers(onnxruntime.InferenceSession(str(file)))
    np.testing.assert_array_equal(answers(open_session(file, mapped=True)), plain)
    np.testing.assert_allclose(answers(open_session(file, in_place_options())), plain, rtol=1e-5)


def test_a_file_without_large_weights_is_opened_as_it_is(tmp_path):
    file, _ = written(tmp_path, wide=4)
    assert model_in_place(file) is None
    assert answers(open_session(file, mapped=True), wide=4).shape == (5, 3)


def test_weights_that_lie_beside_the_graph_stay_there(tmp_path):
    beside = {"save_as_external_data": True, "size_threshold": 0, "location": "weights"}
    file, _ = written(tmp_path, **beside)
    assert model_in_place(file) is None
    assert answers(open_session(file, mapped=True)).shape == (5, 3)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x3a\xff", b"\x3f"])
def test_what_is_no_onnx_file_is_told_by_onnx_runtime(content, tmp_path):
    (tmp_path / "model.onnx").write_bytes(content)
    assert model_in_place(tmp_path / "model.onnx") is None
    with pytest.raises(Exception, match="(?i)model|protobuf"):
        open_session(tmp_path / "model.onnx", mapped=True)


MEMORY = """
import re, sys
from optimum_clp.runtime.session import in_place_options, open_session

def private():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

before = private()
session = open_session(sys.argv[1], in_place_options() if sys.argv[2] == "mapped" else None)
print(private() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_its_weights_are_no_memory_of_the_process(tmp_path):
    file, _ = written(tmp_path, wide=2**18)  # 32 MiB
    held = {}
    for how in ("mapped", "plain"):
        command = [sys.executable, "-c", MEMORY, str(file), how]
        held[how] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert held["mapped"] < 2**23 < 2**25 < held["plain"]
