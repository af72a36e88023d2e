"""What people hand over as a model."""

import copy
from pathlib import Path

import pytest
import torch
from tiny_models import random_tokens, tiny_config, tiny_model
from torch import nn
from transformers import (
    AutoModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedModel,
)

from optimum_clp import CLPPruner
from optimum_clp.checkpoint.in_memory import check_in_memory, model_or_name
from optimum_clp.checkpoint.loading import load_model
from optimum_clp.errors import ModelError


def doors():
    """Every way in: each takes what a user calls a model."""
    return [
        pytest.param(lambda given: load_model(given, quiet=True), id="load_model"),
        pytest.param(lambda given: CLPPruner.from_pretrained(given, quiet=True).model, id="from_pretrained"),
        pytest.param(lambda given: CLPPruner(given, quiet=True).model, id="CLPPruner"),
    ]


class Wrapper(nn.Module):
    """As TRL's models with a value head hold theirs."""

    def __init__(self, model):
        super().__init__()
        self.pretrained_model = model


def of_peft(cls, **attributes):
    """A class that says it comes from peft."""
    return type(cls.__name__, (cls,), {"__module__": "peft.tuners.lora.layer", **attributes})


def with_adapter():
    model = tiny_model()
    projection = model.model.layers[1].self_attn.q_proj
    projection.__class__ = of_peft(nn.Linear)
    return model


def compiled_layer():
    model = tiny_model()
    model.model.layers[2] = torch.compile(model.model.layers[2])
    return model


def integers():
    model = tiny_model()
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.data.to(torch.int8), requires_grad=False)
    return model


def fp8():
    model = tiny_model()
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    return model


class FP8Linear(nn.Linear):
    __module__ = "transformers.integrations.finegrained_fp8"


def fp8_layer():
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.__class__ = FP8Linear
    return model


REFUSED = {
    "an int": (lambda: 5, "a int is not a model. Give a PreTrainedModel, a local folder, or a Hub id"),
    "bytes": (lambda: b"x", "a bytes is not a model"),
    "None": (lambda: object(), "a object is not a model"),
    "a list": (lambda: [1], "a list is not a model"),
    "a class": (
        lambda: LlamaForCausalLM,
        r"it is a class, not a model. Make a model of it: LlamaForCausalLM.from_pre",
    ),
    "a config": (lambda: tiny_config(), "a LlamaConfig is not a model"),
    "another module": (lambda: nn.Linear(2, 2), "a Linear is not a model"),
    "a value head": (
        lambda: Wrapper(tiny_model()),
        "it is a Wrapper around a LlamaForCausalLM. Give what it wraps: its attribute pretrained_model",
    ),
    "a classifier": (
        lambda: LlamaForSequenceClassification(tiny_config()),
        "LlamaForSequenceClassification is not a causal language model. Give the causal language model that it was made",
    ),
    "a tagger": (lambda: LlamaForTokenClassification(tiny_config()), "LlamaForTokenClassification is not a causal"),
    "headless": (
        lambda: AutoModel.from_config(tiny_config()),
        "LlamaModel is not a causal language model. It has no head for the next token: load it with AutoModelForCausalLM",
    ),
    "peft": (
        lambda: of_peft(Wrapper)(tiny_model()),
        r"adapters of peft are attached to it \(Wrapper\).*Merge them first: give what its merge_and_unload\(\) returns",
    ),
    "an adapter inside": (with_adapter, "adapters of peft are attached.*PeftModel.from_pretrained"),
    "compiled layers": (
        compiled_layer,
        "1 of its modules were replaced by compiled ones, the first is model.layers.2",
    ),
    "integers": (integers, r"its weights are quantized \(model.layers.0.mlp.up_proj.weight holds int8\)"),
    "fp8": (fp8, r"holds float8_e4m3fn\). Give the dense model.*dequantize=True"),
    "fp8 layers": (fp8_layer, r"its weights are quantized \(model.layers.0.mlp.up_proj is a FP8Linear\)"),
}


@pytest.mark.parametrize("enter", doors())
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_at_once(make, message, enter):
    with pytest.raises(ModelError, match=message):
        enter(make())


WRAPPERS = {
    "torch.compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model)),
}


@pytest.mark.parametrize("enter", doors())
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_that_change_no_number_are_taken_off(wrap, enter):
    model = tiny_model()
    wrapped = wrap(model)
    before = {name: (id(module), dict(vars(module))) for name, module in wrapped.named_modules()}
    assert enter(wrapped) is model
    assert all((id(m), {**vars(m)}) == before[name] for name, m in wrapped.named_modules())


def test_a_model_that_is_compiled_in_place_is_cut_uncompiled_and_stays_compiled():
    from optimum_clp.segments import LayerSegment

    def never(*args, **kwargs):
        raise AssertionError("compiled code was run")

    model = tiny_model()
    plain = copy.deepcopy(model)
    for module in (model, *model.model.layers):
        module._compiled_call_impl = never
    smaller = CLPPruner(model, quiet=True).cut([LayerSegment(2, 4)])
    assert model._compiled_call_impl is never and model.model.layers[1]._compiled_call_impl is never
    expected = CLPPruner(plain, quiet=True).cut([LayerSegment(2, 4)])
    with torch.no_grad():
        assert torch.equal(smaller(random_tokens(1, 9)).logits, expected(random_tokens(1, 9)).logits)


@pytest.mark.parametrize("name", ["some/model", Path("some/model")])
def test_names_are_names(name):
    assert model_or_name(name) == "some/model"
    with pytest.raises(ModelError, match="it is the name of a model, not a model. Open it: CLPPruner.from_pretrained"):
        CLPPruner(name)


def test_a_quantizer_beside_plain_weights_says_nothing():
    """As transformers leaves it after it has dequantized fp8 or GGUF files."""
    model = tiny_model()
    model.hf_quantizer = object()
    model.config.quantization_config = {"quant_method": "fp8", "dequantize": True}
    assert isinstance(model, PreTrainedModel)
    check_in_memory(model)
