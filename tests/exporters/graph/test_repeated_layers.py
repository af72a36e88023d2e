"""The graph of a model whose layers are repeated is that of a whole trace, byte for byte; over every architecture in the slow tier."""

from types import SimpleNamespace
from unittest import mock

import onnx_ir as ir
import pytest
import torch
from tiny_onnx import onnx_test_model
from zoo import ZOO, zoo_model

from optimum_clp.exporters.float32_copy import float32_copy
from optimum_clp.exporters.graph import float_graph
from optimum_clp.exporters.graph.float_graph import export_float_graph
from optimum_clp.exporters.graph.fused import fused_obstacle
from optimum_clp.exporters.graph.repeated_layers import NotRepeatable
from optimum_clp.exporters.layer_kinds import short_model
from optimum_clp.exporters.obstacle import onnx_obstacle

# why all layers of a type are traced: their graph is another's in more than weights
WHOLE: dict[str, str] = {}


def both(model, monkeypatch):
    """The files of the graph with layers repeated and of the whole trace; and why layers were not repeated, if they were not."""
    model, told = float32_copy(model), []
    fuse = fused_obstacle(model) is None
    monkeypatch.setattr(float_graph.logger, "debug", told.append)
    with float_graph.quiet_exporter():
        graphs = [export_float_graph(model, 21, fuse=fuse, repeat=repeat) for repeat in (True, False)]
    return [ir.to_proto(graph).SerializeToString(deterministic=True) for graph in graphs], told


@pytest.fixture(scope="module")
def llama():
    """Five layers, of which three are traced: both graphs, and how many layers each of torch's traces had."""
    model, traced, export = float32_copy(onnx_test_model("llama", tied=False, num_layers=5)), [], torch.onnx.export

    def counted(whole, *args, **options):
        traced.append(len(whole.causal_lm.model.layers))
        return export(whole, *args, **options)

    with mock.patch.object(torch.onnx, "export", counted), float_graph.quiet_exporter():
        repeated, whole = (export_float_graph(model, 21, fuse=True, repeat=repeat) for repeat in (True, False))
    return SimpleNamespace(model=model, repeated=repeated, whole=whole, traced=traced)


def test_repeated_layers_are_those_of_a_whole_trace(llama):
    assert llama.traced == [3, 5]
    files = [ir.to_proto(graph).SerializeToString(deterministic=True) for graph in (llama.repeated, llama.whole)]
    assert files[0] == files[1]


def test_what_was_not_traced_is_over_the_models_own_weights(llama):
    for name, parameter in llama.model.named_parameters():
        stored = llama.repeated.graph.initializers[name].const_value
        assert stored.raw.data_ptr() == parameter.data_ptr(), name


@pytest.mark.slow
def test_operators_that_are_not_fused_are_repeated_too(monkeypatch):
    monkeypatch.setattr(f"{__name__}.fused_obstacle", lambda model: "not asked for")
    (repeated, whole), told = both(onnx_test_model("llama", tied=True, num_layers=4), monkeypatch)
    assert not told and repeated == whole


@pytest.mark.slow
def test_layers_of_two_kinds_are_repeated_in_their_places(monkeypatch):
    # sliding and full attention in no order: 0, 2, 3, 5 and 1, 4, 6, 7
    (tiny,) = [tiny for tiny in ZOO if tiny.name == "cohere2"]
    model = zoo_model(tiny)
    assert short_model(model).traced == (0, 1, 2, 4, 5, 7)
    (repeated, whole), told = both(model, monkeypatch)
    assert not told and repeated == whole


@pytest.mark.slow
@pytest.mark.parametrize("tiny", [pytest.param(tiny, id=tiny.name) for tiny in ZOO])
def test_graph_of_every_architecture(tiny, monkeypatch):
    model = zoo_model(tiny)
    if onnx_obstacle(model) is not None:
        pytest.skip("has no ONNX file")
    if short_model(float32_copy(model)) is None:
        pytest.skip("every layer is traced")
    (repeated, whole), told = both(model, monkeypatch)
    assert repeated == whole
    assert not told or WHOLE.get(tiny.name, "no reason is known") in told[0]


def test_names_do_not_depend_on_the_trace(llama):
    graph = llama.repeated.graph
    nodes, values = list(graph), [value for node in graph for value in node.outputs]
    first = next(node for node in nodes if node.op_type == "MatMul")
    assert first.name == "MatMul_0" and first.outputs[0].name == "MatMul_0_output_0"
    assert len({node.name for node in nodes}) == len(nodes)
    names = [*graph.initializers, *[value.name for value in graph.inputs], *[value.name for value in values]]
    assert len(set(names)) == len(names)
    weights = [name for name in graph.initializers if not name.startswith("constant_")]
    order = {value.name: i for i, node in reversed([*enumerate(nodes)]) for value in node.inputs if value is not None}
    assert [order[name] for name in graph.initializers] == sorted(order[name] for name in graph.initializers)
    assert "model.layers.3.input_layernorm.weight" in weights and weights[0] == "model.embed_tokens.weight"


def test_where_layers_are_not_alike_all_are_traced(monkeypatch):
    def refuse(*args):
        raise NotRepeatable("layer 1 hands on 2 values")

    model, told = float32_copy(onnx_test_model("llama", tied=True, num_layers=4)), []
    traced = []
    monkeypatch.setattr(float_graph, "repeat_layers", refuse)
    monkeypatch.setattr(
        float_graph,
        "_traced",
        lambda model, *args: traced.append(model) or ir.Model(ir.Graph([], [], nodes=[]), ir_version=10),
    )
    monkeypatch.setattr(float_graph.logger, "debug", told.append)
    export_float_graph(model, 21)
    assert told == ["export: all layers are traced, since layer 1 hands on 2 values"]
    assert [len(model.model.layers) for model in traced] == [3, 4] and traced[1] is model
