"""The contract of a rounding method, for every name in the registry: the built-in ones, and those of other packages that are installed."""

import functools
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tiny_models import random_tokens
from tiny_onnx import onnx_test_model, state_of

from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.configuration.stages import ExportConfig, QuantizationConfig
from optimum_clp.doors import ROUNDINGS
from optimum_clp.errors import ConfigurationError
from optimum_clp.exporters import export as exporters
from optimum_clp.exporters.export import export_onnx
from optimum_clp.exporters.float32_copy import float32_copy
from optimum_clp.exporters.graph.float_graph import export_float_graph
from optimum_clp.exporters.graph.quantize import graph_matrices
from optimum_clp.exporters.rounding.nearest import round_to_nearest
from optimum_clp.exporters.rounding.weights import needs_calibration, round_weights
from optimum_clp.planning.footprint import onnx_weight_bytes
from optimum_clp.precisions import INT4, PRECISIONS, QUANTIZED

METHODS = list(ROUNDINGS)
TEXTS = {"a text": random_tokens(6, 20, seed=1), "another": random_tokens(6, 20, seed=2), "none": None}
# a tied weight is in the graph under one of its names
EMBEDDING = "lm_head.weight"
every_method = pytest.mark.parametrize("name", METHODS)
every_precision = pytest.mark.parametrize("weights", QUANTIZED)


@functools.cache
def tied_llama():
    """One layer with a tied head, traced once."""
    sizes = {"hidden_size": 128, "intermediate_size": 64, "initializer_range": 0.06}
    model = onnx_test_model("llama", tied=True, num_layers=1, **sizes)
    return SimpleNamespace(model=model, graph=export_float_graph(float32_copy(model), opset=21))


@functools.cache
def rounded(name, bits, text="a text", again=False, **settings):
    """What the method makes of [`tied_llama`], and every matrix of its graph with the weight that it stands for."""
    model, method = tied_llama().model, ROUNDINGS.get(name)
    matrices = graph_matrices(tied_llama().graph, not method.keeps_embedding)
    config = QuantizationConfig(method=name, **settings)
    made = round_weights(model, bits, matrices, config, TEXTS[text], quiet=True)
    pairs = {}
    for key in matrices:
        weight = model.get_parameter(key).detach().numpy()
        rounding = round_to_nearest if key == EMBEDDING else made.rounding or round_to_nearest
        pairs[key] = weight, made.matrices.get(key) or rounding(weight, bits, config.group_size)
    return made, pairs


@every_method
@every_precision
def test_matrices_have_the_shapes_and_ranges_that_are_stored(name, weights):
    bits, method = PRECISIONS[weights].bits, ROUNDINGS.get(name)
    made, pairs = rounded(name, bits)
    assert len(pairs) == 8 - method.keeps_embedding and set(made.matrices) <= set(pairs)
    for key, (weight, matrix) in pairs.items():
        assert (matrix.bits, matrix.columns) == (bits, weight.shape[1])
        blocks = -(-weight.shape[1] // matrix.block_size)
        assert matrix.integers.dtype == np.uint8 and matrix.scales.dtype == np.float32
        assert matrix.integers.shape == (len(weight), blocks * matrix.block_size * bits // 8)
        assert matrix.scales.shape == (len(weight), blocks) and np.isfinite(matrix.scales).all()
        assert matrix.codes().shape == weight.shape and matrix.codes().max() < 2**bits
        # a look-up's operator takes none
        has_zero_points = bits in method.zero_points and key != EMBEDDING
        assert (matrix.zero_points is not None) == has_zero_points
        if has_zero_points:
            assert matrix.zero_points.shape == matrix.scales.shape and matrix.zero_points.dtype == np.float32
            assert np.isfinite(matrix.zero_points).all()


@every_method
@every_precision
def test_errors_are_no_larger_than_the_steps_allow(name, weights):
    """To nearest they are a twelfth of the step in the mean square; a third is what moving up or down at random makes."""
    for weight, matrix in rounded(name, PRECISIONS[weights].bits)[1].values():
        steps = np.repeat(np.abs(matrix.scales), matrix.block_size, axis=1)[:, : matrix.columns]
        error = matrix.dequantize() - weight
        assert np.square(error).sum() <= np.square(steps).sum() / 3
        assert not error[steps == 0].any()


@every_method
@every_precision
def test_the_model_is_left_as_it_was_and_the_integers_are_the_same_twice(name, weights):
    before = state_of(tied_llama().model)
    first, second = (rounded(name, PRECISIONS[weights].bits, again=again)[1] for again in (False, True))
    assert state_of(tied_llama().model) == before
    for key, (_, matrix) in first.items():
        for part in ("integers", "scales", "zero_points"):
            np.testing.assert_array_equal(getattr(matrix, part), getattr(second[key][1], part))


@every_method
@every_precision
def test_text_is_looked_at_where_the_method_says_so(name, weights, tmp_path):
    bits, method = PRECISIONS[weights].bits, ROUNDINGS.get(name)
    reads = bits in method.text_bits
    config = QuantizationConfig(method=name, weights=[weights])
    assert needs_calibration(config) == reads
    texts = ["a text", "another"]
    if reads and method.needs_text:
        with pytest.raises(ConfigurationError, match=rf"quantization\.method is '{name}': .*none was given"):
            export_onnx(tied_llama().model, tmp_path, quantization=config)
        assert list(tmp_path.iterdir()) == []
    else:
        texts.append("none")
    integers = [
        {key: matrix.integers.tobytes() for key, (_, matrix) in rounded(name, bits, text)[1].items()} for text in texts
    ]
    assert all((found != integers[0]) == reads for found in integers[1:])


@every_method
def test_a_budget_is_planned_or_refused_with_the_methods_reason(name):
    obstacle = ROUNDINGS.get(name).budget_obstacle
    if obstacle is not None:
        with pytest.raises(ConfigurationError) as caught:
            CLPConfig(quantization={"method": name, "bits_per_weight": 6})
        assert f"quantization.bits_per_weight is 6: {obstacle}" in str(caught.value)
        return
    assert CLPConfig(quantization={"method": name, "bits_per_weight": 6}).quantization.bits_per_weight == 6
    made, _ = rounded(name, INT4.bits, bits_per_weight=6)
    assert {form.bits for form in made.planned.values()} == {8}
    for key, matrix in made.matrices.items():
        assert matrix.bits == (8 if key in made.planned else 4)


@every_method
@pytest.mark.parametrize("format", ["contrib", "qdq"])
def test_files_pass_the_check_and_are_what_the_method_says(name, format, monkeypatch, tmp_path):
    monkeypatch.setattr(exporters, "export_float_graph", lambda *args, **options: tied_llama().graph.clone())
    model, method = tied_llama().model, ROUNDINGS.get(name)
    config = QuantizationConfig(method=name, accuracy_level=4)
    result = export_onnx(model, tmp_path, ExportConfig(format=format), config, calibration=TEXTS["a text"], quiet=True)
    level = 4 if method.accuracy_level is None else method.accuracy_level
    assert set(result.session_entries.values()) == ({str(level)} if format == "qdq" else set())
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    for file in result.files[1:]:
        assert file.max_relative_error < (0.1 if file.weights == "int8" else 1)
        assert file.num_quantized_embeddings == (0 if method.keeps_embedding else 1)
        assert file.num_quantized_matmuls == len(linear) - method.keeps_embedding
        graph = ir.load(tmp_path / file.file).graph
        assert (EMBEDDING in graph.initializers) == method.keeps_embedding
        levels = {node.attributes.get_int("accuracy_level") for node in graph if node.op_type == "MatMulNBits"}
        assert levels == ({level} if format == "contrib" else set())
        # what is told before any work, up to a twentieth and the graph
        predicted = onnx_weight_bytes(model, file.weights, config)
        assert abs(file.bytes - predicted) < 0.05 * predicted + 3 * 12_000
