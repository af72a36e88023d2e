"""The last positions alone get logits, if that is asked for: the same ones, in every form of a head."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from tiny_models import random_tokens
from tiny_onnx import onnx_test_model, small_zoo_model, traced_qwen3
from zoo import ZOO

from optimum_clp.configuration.stages import ExportConfig, QuantizationConfig
from optimum_clp.errors import ExportError
from optimum_clp.exporters.check import FileCheck
from optimum_clp.exporters.export import export_onnx
from optimum_clp.exporters.float32_copy import float32_copy
from optimum_clp.exporters.graph.file import save_graph
from optimum_clp.exporters.graph.float_graph import export_float_graph, fold_weight_transposes
from optimum_clp.exporters.graph.logits import choose_positions
from optimum_clp.runtime.names import LOGITS_TO_KEEP

IDS = random_tokens(2, 6, seed=3)
FILES = ("model.onnx", "model_quantized.onnx", "model_q4.onnx")


def session(file):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def logits(opened, **chosen):
    """Of a prompt without a past, by what a stock runtime knows of the file's inputs and `chosen`."""
    rows, length = IDS.shape
    feeds = {"input_ids": IDS.numpy(), "attention_mask": np.ones((rows, length), np.int64)}
    feeds["position_ids"] = np.tile(np.arange(length), (rows, 1))
    inputs = {value.name: value.shape for value in opened.get_inputs()}
    feeds = {name: array for name, array in feeds.items() if name in inputs}
    for name, shape in inputs.items():
        if name not in feeds:
            feeds[name] = np.zeros((rows, shape[1], 0, shape[3]), np.float32)
    return opened.run(["logits"], feeds | {name: np.array(count) for name, count in chosen.items()})[0]


def zoo_member(name):
    return small_zoo_model(next(tiny for tiny in ZOO if tiny.name == name), num_layers=1)


# a tied head, one of its own, one with a bias, a scale, a soft cap, and an input that was a matrix
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi", "cohere", "gemma2", "opt"])
def test_kept_logits_are_the_last_of_all(name, tmp_path):
    if name in ("llama", "qwen3"):
        model = onnx_test_model(name, tied=name == "llama", num_layers=1)
    else:
        model = zoo_member(name)
    export_onnx(model, tmp_path, quantization=QuantizationConfig(method="rtn"), quiet=True)
    for file in FILES:
        opened = session(tmp_path / "onnx" / file)
        assert LOGITS_TO_KEEP not in [value.name for value in opened.get_inputs()]
        every = logits(opened)
        assert every.shape[:2] == IDS.shape
        for count in (1, 2, 5, 6, 50):
            kept = logits(opened, num_logits_to_keep=count)
            assert kept.shape == (2, min(count, 6), every.shape[2])
            # products of other sizes add in another order
            np.testing.assert_allclose(kept, every[:, -count:], atol=2e-5 * np.abs(every).max())
        np.testing.assert_array_equal(logits(opened, num_logits_to_keep=0), every)


@pytest.mark.parametrize("format", ["contrib", "qdq"])
def test_the_default_is_the_exports(format, tmp_path):
    model = onnx_test_model("llama", tied=True, num_layers=1)
    quantization = QuantizationConfig(method="rtn")
    export_onnx(model, tmp_path, ExportConfig(format=format, logits_to_keep=1), quantization, quiet=True)
    for file in FILES:
        opened = session(tmp_path / "onnx" / file)
        # onnxruntime-genai sets memory aside by the declared size
        assert opened.get_outputs()[0].shape[1] == 1
        last, every = logits(opened), logits(opened, num_logits_to_keep=0)
        assert last.shape[1] == 1 and every.shape[1] == 6
        np.testing.assert_allclose(last, every[:, -1:], atol=2e-5 * np.abs(every).max())


def test_a_head_of_another_kind_is_left_alone():
    graph = traced_qwen3().graph.clone()
    output = graph.graph.outputs[0]
    node = ir.node("Softmax", [output], {"axis": 1})
    node.outputs[0].name, output.name = "logits", "before"
    graph.graph.append(node)
    graph.graph.outputs[0] = node.outputs[0]
    inputs = list(graph.graph.inputs)
    assert not choose_positions(graph, 0)
    assert list(graph.graph.inputs) == inputs


@pytest.mark.parametrize("fault", ["values", "positions"])
def test_the_check_sees_a_wrong_choice(fault, tmp_path):
    model = float32_copy(onnx_test_model("llama", tied=True, num_layers=1))
    graph = export_float_graph(model, 21)
    assert choose_positions(graph, 0)
    (kept,) = [node for node in graph.graph if node.name == f"{LOGITS_TO_KEEP}_slice"]
    if fault == "positions":
        kept.outputs[0].replace_all_uses_with(kept.inputs[0])
    else:
        # twice the logits, where one position is asked for
        count, one = (graph.graph.initializers[f"{LOGITS_TO_KEEP}{end}"] for end in ("", "_axis"))
        is_one = ir.node("Equal", [count, one])
        number = ir.node("Cast", [is_one.outputs[0]], {"to": ir.DataType.FLOAT})
        larger = ir.node("Mul", [kept.outputs[0], number.outputs[0]])
        total = ir.node("Add", [kept.outputs[0], larger.outputs[0]])
        graph.graph.insert_after(kept, [is_one, number, larger, total])
        next(n for n in kept.outputs[0].consumers() if n not in (larger, total)).replace_input_with(
            0, total.outputs[0]
        )
    fold_weight_transposes(graph)
    (file,) = save_graph(graph, tmp_path / "model.onnx")
    check = FileCheck(model, tmp_path)
    if fault == "values":
        assert 0.5 < check.error(file) <= 1
    else:
        with pytest.raises(ExportError, match=r"logits is \(3, 16, 97\): .* the last 1 of 16 positions"):
            check.error(file)
