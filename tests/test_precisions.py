import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from optimum.quanto import qtypes
from quantized_files import read_file
from tiny_onnx import exported_llama

from optimum_clp.precisions import BESIDE_FLOAT32, FLOAT32, PRECISIONS, QUANTIZED

SCHEMA = Path(__file__).parents[1] / "docs" / "clp_report.schema.json"


def test_names_are_those_that_the_report_knows():
    known = json.dumps(json.loads(SCHEMA.read_text(encoding="utf-8")))
    for name, precision in PRECISIONS.items():
        assert precision.name == name and f'"{name}"' in known and f'"{precision.row_name}"' in known


@pytest.mark.parametrize("name", QUANTIZED)
def test_bits_are_those_of_quanto_and_of_the_file(name):
    precision = PRECISIONS[name]
    assert qtypes[precision.quanto].bits == precision.bits
    assert precision.quanto_folder == f"quanto-{name}"
    file = exported_llama().folder / "onnx" / precision.onnx_file
    # no weight of a block takes more different values than its bits allow, and some take more than half of them
    block = torch.from_numpy(read_file(file)["model.layers.0.mlp.up_proj.weight"])[:, :32]
    most = max(len(row.unique()) for row in block)
    assert most <= 2**precision.bits
    assert (most > 8) if precision.bits == 4 else (most > 16)


def test_what_is_no_quanto_kind_is_a_float_file_or_computes_in_16_bits():
    others = {name: PRECISIONS[name] for name in PRECISIONS if name not in QUANTIZED}
    assert set(others) == {"float32", "float16", "int4_float16"}
    assert not any(precision.quanto for precision in others.values())
    assert {name for name, precision in PRECISIONS.items() if precision.is_rounded} == {"int8", "int4", "int4_float16"}
    assert {name for name, precision in PRECISIONS.items() if precision.floats == 16} == {"float16", "int4_float16"}
    assert set(BESIDE_FLOAT32) == set(PRECISIONS) - {FLOAT32.name}
    file = exported_llama().folder / "onnx" / FLOAT32.onnx_file
    assert (
        onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).get_outputs()[0].name == "logits"
    )
