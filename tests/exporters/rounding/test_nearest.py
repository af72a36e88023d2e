import numpy as np
import onnx
import pytest
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from optimum_clp.exporters.rounding.matrices import dequantize_blocks
from optimum_clp.exporters.rounding.nearest import quantize_blocks


def weight_of(rows, columns, seed=0):
    weight = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    weight[0] = 0
    weight[1, : columns // 2] *= 1e-3
    return weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(8, 64), (5, 172), (3, 20)])
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_rounding_error_is_within_the_step(bits, shape, block_size):
    weight = weight_of(*shape)
    integers, scales = quantize_blocks(weight, bits, block_size)
    blocks = -(-shape[1] // block_size)
    assert integers.shape == (shape[0], blocks * block_size * bits // 8) and integers.dtype == np.uint8
    assert scales.shape == (shape[0], blocks) and scales.dtype == np.float32
    restored = dequantize_blocks(integers, scales, bits, shape[1])
    step = np.repeat(np.abs(scales), block_size, axis=1)[:, : shape[1]]
    largest = np.array(
        [[np.abs(row[i : i + block_size]).max() for i in range(0, shape[1], block_size)] for row in weight]
    )
    # what float16 moves a number by: half of its last place, of which the smallest are 2**-24 apart
    moved = np.maximum(largest / 2 ** (bits - 1) * 2.0**-11, 2.0**-25)
    if bits == 8:
        assert (np.abs(np.abs(scales) - largest / 128) <= moved * 1.001).all()
        assert (np.abs(restored - weight) <= 0.5001 * step + (np.abs(weight) > 127.49 * step) * 0.5 * step).all()
    assert (np.abs(scales) <= largest / 2 ** (bits - 1) + moved * 1.001).all()
    assert (restored[0] == 0).all()


def test_int4_packs_the_lower_half_first():
    weight = np.zeros((1, 16), np.float32)
    weight[0, :4] = [-8.0, 1.0, 2.0, 3.0]
    integers, scales = quantize_blocks(weight, 4, 16)
    # the largest weight is code 0, zero is code 8
    assert scales.tolist() == [[1.0]]
    assert integers[0].tolist() == [0x90, 0xBA] + [0x88] * 6


def test_int8_codes():
    integers, scales = quantize_blocks(np.array([[2.0, -1.0, 0.0, 0.25]], np.float32), 8, 16)
    assert scales.tolist() == [[-2.0 / 128]]
    assert integers[0, :5].tolist() == [0, 192, 128, 112, 128]


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_at_least_as_good_as_onnx_runtimes(bits):
    weight = weight_of(24, 96, seed=1)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [value("x", onnx.TensorProto.FLOAT, [1, 96])],
        [value("y", onnx.TensorProto.FLOAT, [1, 24])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    quantizer = MatMulNBitsQuantizer(model, bits=bits, block_size=32, is_symmetric=True)
    quantizer.process()
    stored = [onnx.numpy_helper.to_array(t) for t in quantizer.model.model.graph.initializer]
    codes = next(t for t in stored if t.dtype == np.uint8).reshape(24, -1)
    scales = next(t for t in stored if t.dtype == np.float32).reshape(24, -1)
    theirs = np.square(dequantize_blocks(codes, scales, bits, 96) - weight).reshape(24, 3, 32).sum(-1)
    ours = (
        np.square(dequantize_blocks(*quantize_blocks(weight, bits, 32), bits, 96) - weight).reshape(24, 3, 32).sum(-1)
    )
    # theirs are scales in 32 bits; with those of float16 the same integers are off by as much as the scale is
    moved = np.maximum(2.0**-11, 2.0**-25 / np.maximum(np.abs(scales), 1e-30)) * (scales != 0)
    size = np.sqrt(np.square(weight).reshape(24, 3, 32).sum(-1))
    assert (np.sqrt(ours) <= np.sqrt(theirs) + moved * size * (1 + 1e-5)).all()
    assert ours.sum() < (1.01 if bits == 8 else 0.97) * theirs.sum()


def test_errors_count_by_the_importance_of_their_columns():
    """The scale is the one that a search over all that may be taken finds best, and not the one without importance."""
    weight = weight_of(12, 32, seed=3)[2:]
    importance = np.exp(np.random.default_rng(4).standard_normal(32) * 2).astype(np.float32)

    def cost(restored):
        return (np.square(restored - weight) * importance).reshape(10, 2, 16).sum(-1)

    def restored(*importances):
        return dequantize_blocks(*quantize_blocks(weight, 4, 16, *importances), 4, 32)

    blocks = weight.reshape(10, 2, 16)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    least = np.full((10, 2), np.inf)
    for share in (1.05, 1, *(1 - step / 40 for step in range(1, 13))):
        scale = (largest * np.float32(-share / 8)).astype(np.float16).astype(np.float32)
        tried = np.clip(np.rint(blocks / scale), -8, 7) * scale
        least = np.minimum(least, cost(tried.reshape(10, 32)))
    np.testing.assert_allclose(cost(restored(importance)), least, rtol=1e-5)
    assert least.sum() < 0.9 * cost(restored()).sum()
