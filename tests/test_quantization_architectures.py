"""quanto checkpoints of every architecture, against quanto's own quantization in memory."""

import copy

import pytest
import torch
from optimum.quanto import QLinear, freeze, quantize
from tiny_models import random_tokens
from tiny_onnx import short_reason
from torch import nn
from zoo import ZOO, zoo_model

from optimum_clp.errors import QuantizationError
from optimum_clp.quantization import load_quantized, quanto_obstacle, save_quantized, without_compiler


def members():
    return [pytest.param(tiny, id=tiny.name) for tiny in ZOO]


def quantized_by_quanto(model, weights):
    """quanto's own in-place quantization of a copy.

    Not of a tied head, convolutions (in vision towers) and routers that are linear layers with more than a product.
    """
    own = copy.deepcopy(model)
    head = own.get_output_embeddings()
    tied = head is not None and head.weight is own.get_input_embeddings().weight

    def is_left(module):
        own_forward = (
            isinstance(module, nn.Linear) and type(module) is not nn.Linear and "forward" in vars(type(module))
        )
        return (tied and module is head) or isinstance(module, nn.Conv2d) or own_forward

    left = [name for name, module in own.named_modules() if is_left(module)]
    quantize(own, weights=f"q{weights}", exclude=left or None)
    freeze(own)
    return own


def dequantized(model):
    return {
        n: p.dequantize() if type(p) is not nn.Parameter else p
        for n, p in model.named_parameters(remove_duplicate=False)
    }


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("tiny", members())
def test_reloaded_model_is_quantos_own_or_there_is_an_obstacle(tiny, weights, tmp_path, architecture_result):
    model, ids = zoo_model(tiny), random_tokens(2, 12)
    obstacle = quanto_obstacle(model)
    if obstacle is not None:
        with pytest.raises(QuantizationError) as caught:
            save_quantized(model, None, tmp_path / "q", weights, quiet=True)
        assert caught.value.problems == (obstacle,)
        assert list(tmp_path.iterdir()) == []
        architecture_result(tiny.name, f"quanto_{weights}", f"refused: {short_reason(obstacle)}")
        return
    own = quantized_by_quanto(model, weights)
    result = save_quantized(model, None, tmp_path / "q", weights, quiet=True)
    reloaded = load_quantized(tmp_path / "q")
    assert result.num_quantized == sum(isinstance(module, QLinear) for module in own.modules())
    expected, found = dequantized(own), dequantized(reloaded)
    assert expected.keys() <= found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    with torch.no_grad(), without_compiler():
        dense, theirs, ours = (m(input_ids=ids, use_cache=False).logits for m in (model, own, reloaded))
    assert torch.isfinite(ours).all()
    assert not torch.equal(ours, dense)
    # with equal weights; the product of a transposed input with unpacked weights is not always rounded alike (Mamba)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    architecture_result(tiny.name, f"quanto_{weights}", "exact")
