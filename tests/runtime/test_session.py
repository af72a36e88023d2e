import functools
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from optimum_clp.runtime.names import ACCURACY_LEVEL
from optimum_clp.runtime.session import open_session


@functools.cache
def product(level):
    """A product with int8 weights in standard operators, as bytes; with a level in its metadata or without."""
    generator = np.random.default_rng(0)
    integers = generator.integers(-128, 128, (64, 32)).astype(np.int8)
    scales = generator.random((2, 32), dtype=np.float32)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["integers", "scales"], ["weight"], axis=0, block_size=32),
            helper.make_node("MatMul", ["x", "weight"], ["y"]),
        ],
        "product",
        [value("x", onnx.TensorProto.FLOAT, [1, 64])],
        [value("y", onnx.TensorProto.FLOAT, [1, 32])],
        [numpy_helper.from_array(integers, "integers"), numpy_helper.from_array(scales, "scales")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    if level is not None:
        helper.set_model_props(model, {ACCURACY_LEVEL: level})
    return model.SerializeToString(), integers * np.repeat(scales, 32, axis=0)


def relative_error(file, level, **options):
    content, weight = product(level)
    file.write_bytes(content)
    x = np.random.default_rng(1).standard_normal((1, 64)).astype(np.float32)
    expected = x @ weight
    found = open_session(file, **options).run(None, {"x": x})[0]
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("level", ["0", "1"])
def test_a_file_is_run_at_its_level(level, tmp_path):
    assert relative_error(tmp_path / "model.onnx", level) < 1e-5


@pytest.mark.parametrize("level", [None, "4"])
def test_onnx_runtimes_own_level_rounds_the_inputs(level, tmp_path):
    assert 1e-4 < relative_error(tmp_path / "model.onnx", level) < 0.1


def test_options_are_left_alone_if_asked(tmp_path):
    options = onnxruntime.SessionOptions()
    assert relative_error(tmp_path / "model.onnx", "1", options=options, as_exported=False) > 1e-4
    assert relative_error(tmp_path / "model.onnx", "1", options=options) < 1e-5


@pytest.mark.skipif(sys.platform != "linux", reason="the system tells what memory is a process's own")
def test_weights_beside_a_graph_stay_in_their_file(tmp_path):
    """64 MB of them: packed anew they are a process's own, left where they lie they are not."""
    value = helper.make_tensor_value_info
    weight = np.random.default_rng(0).standard_normal((4096, 4096), dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "product",
        [value("x", onnx.TensorProto.FLOAT, [1, 4096])],
        [value("y", onnx.TensorProto.FLOAT, [1, 4096])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx_data")
    code = (
        "import re, sys, numpy as np; from optimum_clp.runtime.session import in_place_options, open_session\n"
        "own = lambda: int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        "before = own(); session = open_session(sys.argv[1], in_place_options() if sys.argv[2:] else None)\n"
        "y = session.run(None, {'x': np.ones((1, 4096), np.float32)})[0]; print(own() - before, y.sum())"
    )
    found = {}
    for how in ([], ["in place"]):
        command = [sys.executable, "-c", code, str(tmp_path / "model.onnx"), *how]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        found[bool(how)] = [float(word) for word in answer.stdout.split()]
    assert found[True][0] < 25 < 60 < found[False][0]
    assert found[True][1] == pytest.approx(found[False][1], rel=1e-4) == pytest.approx(weight.sum(), rel=1e-2)
