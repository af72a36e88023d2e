"""The peak memory of an export, by the benchmark that measures it, and its files in a process without PyTorch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# a stock session, from numpy and onnxruntime alone: the largest difference of a prompt's logits, relative to the largest
STOCK_SESSION = """
import sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
reference = np.load(sys.argv[2])
feeds = {name: reference[f"0.{name}"] for name in ("input_ids", "attention_mask", "position_ids")}
for value in session.get_inputs()[3:]:
    feeds[value.name] = np.zeros((len(feeds["input_ids"]), value.shape[1], 0, value.shape[3]), np.float32)
(logits,) = session.run(["logits"], feeds)
real = feeds["attention_mask"] == 1
print(np.abs(logits - reference["0.logits"])[real].max() / np.abs(reference["0.logits"]).max())
"""


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("heads", "dtype", "method", "quantized"),
    [
        ("untied", "float32", "rtn", ("int8", "int4")),
        ("tied", "float32", "rtn", ("int8", "int4")),
        ("untied", "bfloat16", "rtn", ("int8", "int4")),
        ("untied", "float32", "gptq", ("int4",)),
    ],
)
def test_a_model_over_2_gb_takes_at_most_2_2_times_its_float_size(heads, dtype, method, quantized, tmp_path):
    options = ["--heads", heads, "--dtype", dtype, "--method", method, "--weights", *quantized]
    found = json.loads(run("-m", "benchmarks.edge.export_memory", tmp_path, *options))
    assert found["float_bytes"] > 2.4e9
    assert found["export"] < 2.2
    assert found["context"] == {"length": 4096, "checked": "last positions"}
    assert found["errors"]["float32"] < 1e-5 and set(found["errors"]) == {"float32", *quantized}
    file = tmp_path / "onnx/model.onnx"
    # what is not a weight, under 2 GiB, beside the weights in their own file
    assert file.stat().st_size < 1e6 and (tmp_path / "onnx/model.onnx_data").stat().st_size > 2.4e9
    assert float(run("-c", STOCK_SESSION, file, tmp_path / "reference.npz")) < 1e-5


def run(*arguments):
    """The last line that another Python process prints."""
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout.strip().splitlines()[-1]
