"""The graph of a model whose layers are repeated is that of a whole trace, byte for byte; over every architecture in the slow tier."""

from types import SimpleNamespace
from unittest import mock

import onnx_ir as ir
import pytest
import torch
from tiny_onnx import onnx_test_model
from zoo import ZOO, zoo_model

from optimum_clp.exporters.float32_copy import float32_copy
from optimum_clp.exporters.graph import float_graph, repeated_layers
from optimum_clp.exporters.graph.float_graph import export_float_graph
from optimum_clp.exporters.graph.fused import fused_obstacle
from optimum_clp.exporters.graph.repeated_layers import NotRepeatable, repeat_layers
from optimum_clp.exporters.layer_kinds import short_model
from optimum_clp.exporters.obstacle import onnx_obstacle

# why all layers of a type are traced: their graph is another's in more than weights
WHOLE: dict[str, str] = {}
# torch simplifies the sizes in a trace of all eight layers for longer than anybody waits, repeated or not
ENDLESS = ("gpt_neo",)


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
    """Five layers, of which three are traced: both graphs, how many layers each of torch's traces had, and the graph of the three."""
    model, traced, export = float32_copy(onnx_test_model("llama", tied=False, num_layers=5)), [], torch.onnx.export

    def counted(whole, *args, **options):
        traced.append(len(whole.causal_lm.model.layers))
        return export(whole, *args, **options)

    short = []

    def kept(graph, *args):
        short.append((graph.clone(), args[0]))
        repeat_layers(graph, *args)

    with (
        mock.patch.object(torch.onnx, "export", counted),
        mock.patch.object(float_graph, "repeat_layers", kept),
        float_graph.quiet_exporter(),
    ):
        repeated, whole = (export_float_graph(model, 21, fuse=True, repeat=repeat) for repeat in (True, False))
    return SimpleNamespace(model=model, repeated=repeated, whole=whole, traced=traced, short=short[0])


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
    if tiny.name in ENDLESS:
        pytest.skip("torch does not come to an end with eight layers")
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


@pytest.fixture
def traced(monkeypatch):
    """The models that are traced, the whole ones of them to an empty graph; and why layers were not repeated."""
    models, told, trace = [], [], float_graph._traced

    def short_ones(model, *args):
        models.append(model)
        return trace(model, *args) if len(models) == 1 else ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)

    monkeypatch.setattr(float_graph, "_traced", short_ones)
    monkeypatch.setattr(float_graph.logger, "debug", told.append)
    return SimpleNamespace(models=models, told=told)


def test_layers_that_were_thought_alike_and_are_not_are_all_traced(traced, monkeypatch):
    (tiny,) = [tiny for tiny in ZOO if tiny.name == "cohere2"]
    layers = ["sliding_attention", "full_attention", *["sliding_attention"] * 2]
    model = float32_copy(zoo_model(tiny, num_hidden_layers=4, layer_types=layers))
    # kinds that do not look at the config
    monkeypatch.setattr("optimum_clp.exporters.layer_kinds.layer_kinds", lambda model: (0,) * 4)
    export_float_graph(model, 21)
    assert len(traced.told) == 1 and traced.told[0].startswith("export: all layers are traced, since layers 1 and 2 ")
    assert [len(model.model.layers) for model in traced.models] == [3, 4] and traced.models[1] is model


def test_what_goes_further_than_to_the_next_layer_is_not_repeated(llama):
    graph, short = llama.short
    blocks = repeated_layers._blocks(graph.graph, "causal_lm.model.layers", 3)[0]
    handed_on = blocks[1].handed_on()
    graph.graph.append(ir.node("Identity", [handed_on]))
    with pytest.raises(NotRepeatable, match="what layer 1 hands on goes further than to the next one"):
        repeat_layers(graph, short, llama.model, "causal_lm.")
    inner = next(value for node in blocks[1].nodes for value in node.outputs if value is not handed_on)
    graph.graph.append(ir.node("Identity", [inner]))
    with pytest.raises(NotRepeatable, match="layer 1 hands on 2 values"):
        repeat_layers(graph, short, llama.model, "causal_lm.")
    for node in graph.graph:
        node.metadata_props.clear()
    with pytest.raises(NotRepeatable, match="torch does not say which nodes are a layer's"):
        repeat_layers(graph, short, llama.model, "causal_lm.")
