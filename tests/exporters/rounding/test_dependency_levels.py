import pytest
import torch
from tiny_models import random_tokens
from tiny_onnx import small_zoo_model
from torch import nn
from zoo import ZOO

from optimum_clp.exporters.experts import unrolled_experts
from optimum_clp.exporters.rounding.dependency_levels import dependency_levels

TOKENS = random_tokens(2, 9)


def levels_of(name):
    """The linear layers of a layer by level, by their paths in the layer."""
    (tiny,) = [tiny for tiny in ZOO if tiny.name == name]
    model = small_zoo_model(tiny, num_layers=1)
    with torch.no_grad(), unrolled_experts(model):
        layer = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0]
        names = {module: path for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
        levels = dependency_levels(layer, list(names), lambda: model(input_ids=TOKENS))
        return [[names[module] for module in level] for level in levels]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        # attention and MLP read the same input
        ("phi", [["q_proj", "k_proj", "v_proj", "fc1"], ["dense", "fc2"]]),
        ("gpt_neox", [["query_key_value", "dense_h_to_4h"], ["dense", "dense_4h_to_h"]]),
    ],
)
def test_levels_follow_the_data(name, expected):
    levels = [sorted(path.rpartition(".")[2] for path in level) for level in levels_of(name)]
    assert levels == [sorted(level) for level in expected]


def test_experts_are_side_by_side():
    attention, output, first, last = levels_of("mixtral")
    assert len(attention) == 3 and len(output) == 1
    # four experts; transformers 4 has the gate's matrix apart (`w1`, `w3`), and its router is a linear layer
    experts = [sum(".experts." in path for path in level) for level in (first, last)]
    assert experts in ([4, 4], [8, 4]) and len(last) == 4


def test_a_module_that_is_not_called_is_in_no_level():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, hidden_states):
            hidden_states += self.second(torch.relu(self.first(hidden_states)))
            return hidden_states

    layer = Layer().requires_grad_(False)
    hidden = torch.randn(1, 3, 4)
    levels = dependency_levels(layer, [layer.unused, layer.second, layer.first], lambda: layer(hidden_states=hidden))
    assert levels == [[layer.first], [layer.second]]
    assert not layer.first.weight.requires_grad and not hidden.requires_grad
