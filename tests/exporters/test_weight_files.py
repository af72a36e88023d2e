"""Files beside the float32 one: which are made, from what, and what happens where float16 is too narrow."""

import collections
from unittest import mock

import onnx
import pytest
import torch
from quantized_files import read_file
from tiny_models import random_tokens
from tiny_onnx import exported_halves, onnx_test_model

from optimum_clp import CLPConfig
from optimum_clp.attempts import Attempts
from optimum_clp.configuration.stages import ExportConfig, QuantizationConfig
from optimum_clp.errors import ExportError
from optimum_clp.exporters import weight_files
from optimum_clp.exporters.export import export_onnx


def operators(file):
    return collections.Counter(node.op_type for node in onnx.load(file, load_external_data=False).graph.node)


def test_files_of_16_bits_pass_every_check():
    made = exported_halves()
    found = {file.weights: file for file in made.result.files}
    # those of the same integers follow one another, whatever the order that was asked for
    assert list(found) == ["float32", "int4", "int4_float16", "float16"]
    names = sorted(path.name for path in (made.folder / "onnx").iterdir())
    assert names == ["model.onnx", "model_fp16.onnx", "model_q4.onnx", "model_q4f16.onnx"]
    for name in names:
        onnx.checker.check_model(str(made.folder / "onnx" / name), full_check=True)
    assert 1e-5 < found["float16"].max_relative_error < 0.03
    assert found["float16"].bits_per_weight == 16 and found["float16"].num_quantized_matmuls == 0
    for key in ("num_quantized_matmuls", "num_quantized_embeddings", "bits_per_weight", "rounding"):
        assert getattr(found["int4"], key) == getattr(found["int4_float16"], key)
    assert found["int4_float16"].max_relative_error == pytest.approx(found["int4"].max_relative_error, abs=0.02)


def test_both_int4_files_have_the_same_integers_rounded_once():
    made = exported_halves()
    first, second = (read_file(made.folder / "onnx" / f"model_{name}.onnx") for name in ("q4", "q4f16"))
    assert first.keys() == second.keys() and len(first) > 10
    assert all((first[name] == second[name]).all() for name in first)
    assert made.rounded == [4]


def test_files_for_browsers_hold_floats_for_the_processor_and_integers_for_the_graphics(tmp_path):
    model = onnx_test_model("llama", tied=True, num_layers=1, initializer_range=0.3)
    config = CLPConfig(target="web", quantization={"method": "rtn"})
    result = export_onnx(model, tmp_path, config.export, config.quantization, quiet=True)
    # the float32 file was made and checked, and is not kept
    assert [file.weights for file in result.files] == ["int4", "int4_float16"]
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["model_q4.onnx", "model_q4f16.onnx"]
    plain, half = (operators(tmp_path / file.file) for file in result.files)
    assert plain["MatMulNBits"] == plain["GatherBlockQuantized"] == 0 and plain["GroupQueryAttention"] == 1
    assert half["MatMulNBits"] and half["GatherBlockQuantized"] and half["GroupQueryAttention"] == 1
    assert result.smallest.weights == "int4"


def test_the_float32_file_stays_if_no_other_could_be_made(tmp_path):
    model = onnx_test_model("llama", tied=True, num_layers=1)
    attempts = Attempts(strict=False)
    with mock.patch.object(weight_files, "to_float16", side_effect=ExportError.of("a", 1, "b", "c")):
        export, quantization = ExportConfig(float_file=False), QuantizationConfig(weights=["float16"])
        result = export_onnx(model, tmp_path, export, quantization, attempts=attempts, quiet=True)
    assert [file.weights for file in result.files] == ["float32"]
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["model.onnx"]


def test_sums_are_kept_in_float32_where_hidden_states_leave_float16(tmp_path):
    model = onnx_test_model("llama", tied=False, num_layers=3)
    ids = random_tokens(3, 20)
    with torch.no_grad():
        for layer in model.model.layers:
            seen = []
            hook = layer.mlp.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out.abs().max()))
            model(input_ids=ids)
            hook.remove()
            # each product fits, their sum does not
            layer.mlp.down_proj.weight.mul_(50_000 / seen[0])
        largest = max(s.abs().max() for s in model(input_ids=ids, output_hidden_states=True).hidden_states[:-1])
    assert largest > 65504
    result = export_onnx(model, tmp_path, ExportConfig(), QuantizationConfig(weights=["float16"]), quiet=True)
    assert result.files[1].max_relative_error < 0.03
    casts = operators(tmp_path / result.files[1].file)["Cast"]
    # four borders in each layer and more, where a file without need of them has but those of positions and logits
    assert casts > 20 > operators(exported_halves().folder / "onnx/model_fp16.onnx")["Cast"]


def test_what_float16_cannot_hold_is_an_error_that_says_so(tmp_path):
    model = onnx_test_model("llama", tied=True, num_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = 1e5
    with pytest.raises(ExportError, match="up_proj.weight is 100000.0: .*float16, which ends at 65504. Leave float16"):
        export_onnx(model, tmp_path, ExportConfig(), QuantizationConfig(weights=["float16"]), quiet=True)
    assert not (tmp_path / "onnx").exists()
