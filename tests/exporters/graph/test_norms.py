import collections

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tiny_models import tiny_model

from optimum_clp.configuration.stages import ExportConfig, QuantizationConfig
from optimum_clp.exporters.export import export_onnx
from optimum_clp.exporters.graph.norms import spell_out_norms


def norm_graph(epsilon=1e-5):
    states = ir.Value(name="states", shape=ir.Shape(["rows", 8]), type=ir.TensorType(ir.DataType.FLOAT))
    weight = np.linspace(0.5, 2, 8, dtype=np.float32)
    stored = ir.Value(name="weight", const_value=ir.tensor(weight), shape=ir.Shape([8]),
                      type=ir.TensorType(ir.DataType.FLOAT))  # fmt: skip
    nodes = [
        ir.node("SimplifiedLayerNormalization", [states, stored], {"axis": -1, "epsilon": epsilon, "stash_type": 1})
    ]
    nodes.append(ir.node("SimplifiedLayerNormalization", [nodes[0].outputs[0], stored], {"epsilon": epsilon}))
    output = nodes[-1].outputs[0]
    output.name, output.shape, output.type = "out", states.shape, states.type
    graph = ir.Graph([states], [output], nodes=nodes, initializers=[stored], opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10), torch.from_numpy(weight)


def test_the_result_is_pytorchs_and_of_the_standard():
    graph, weight = norm_graph()
    spell_out_norms(graph)
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    states = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 3
    (found,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"states": states.numpy()})
    expected = states
    for _ in range(2):
        expected = torch.nn.functional.rms_norm(expected, (8,), weight, 1e-5)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-6)
    # one constant for all norms
    assert sorted(t.name for t in proto.graph.initializer) == ["norm_axes", "norm_epsilon_1e-05", "norm_two", "weight"]


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_every_file_passes_the_standards_checker_and_loads_with_fused_norms(model_type, tmp_path):
    model = tiny_model(model_type, num_layers=2)
    export_onnx(model, tmp_path, ExportConfig(), QuantizationConfig(method="rtn"), quiet=True)
    files = sorted((tmp_path / "onnx").glob("*.onnx"))
    assert len(files) == 3
    for file in files:
        onnx.checker.check_model(str(file), full_check=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        found = collections.Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
        assert not {"Pow", "ReduceMean", "Sqrt"} & set(found)
        # before the first layer, and of queries and keys
        assert found["SimplifiedLayerNormalization"] == (5 if model_type == "qwen3" else 1)
