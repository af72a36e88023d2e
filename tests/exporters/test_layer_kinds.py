import torch
from tiny_onnx import onnx_test_model
from torch import nn
from zoo import ZOO, zoo_model

from optimum_clp.exporters.layer_kinds import layer_kinds, short_model, traced_layers


def test_kinds_are_told_by_anything_but_weights_and_the_layers_number():
    model = onnx_test_model("llama", tied=True, num_layers=6)
    assert layer_kinds(model) == (0,) * 6
    layers = model.model.layers
    layers[1].self_attn.scaling *= 2
    layers[2].mlp.act_fn = nn.GELU()
    layers[3].mlp.down_proj = nn.Linear(7, 5)
    layers[4].self_attn.own = torch.zeros(3)
    kinds = layer_kinds(model)
    assert kinds[0] == kinds[5] == 0 and len({*kinds[:5]}) == 5


def test_one_layer_of_a_kind_among_others_is_traced_and_so_are_three_in_all():
    assert short_model(onnx_test_model("llama", tied=True, num_layers=3)) is None
    short = short_model(onnx_test_model("llama", tied=True, num_layers=6))
    assert short.traced == (0, 1, 5) and short.model.config.num_hidden_layers == 3
    assert short.model.model.layers[2].mlp.up_proj.weight.shape[0] > 0
    assert traced_layers(onnx_test_model("llama", tied=True, num_layers=6)) == 3


def test_what_the_config_says_of_single_layers_makes_kinds():
    (tiny,) = [tiny for tiny in ZOO if tiny.name == "cohere2"]
    model = zoo_model(tiny)
    assert layer_kinds(model) == tuple(map(model.config.layer_types.index, model.config.layer_types))
    assert short_model(model).traced == (0, 1, 2, 4, 5, 7) and traced_layers(model) == 6


def test_where_no_config_describes_the_short_model_all_layers_are_traced():
    # each layer divides by its number
    (tiny,) = [tiny for tiny in ZOO if tiny.name == "gpt2-inverse_index"]
    model = zoo_model(tiny)
    assert short_model(model) is None and traced_layers(model) == 8
