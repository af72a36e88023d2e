"""Folders with LoRA adapters."""

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from byte_tokenizer import tiny_tokenizer
from tiny_models import random_tokens, tiny_model

from optimum_clp import CLPPruner
from optimum_clp.checkpoint.loading import load_config, load_model
from optimum_clp.errors import ModelError

SPEC = importlib.util.find_spec


@pytest.fixture
def folders(tmp_path):
    """A model, and an adapter that was trained for it."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_model().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    adapter.mkdir()
    content = {"base_model_name_or_path": str(base), "peft_type": "LORA"}
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    return base, adapter


def pretend(monkeypatch, present):
    def spec(name, *rest):
        if name != "peft":
            return SPEC(name, *rest)
        return SimpleNamespace() if present else None

    monkeypatch.setattr("optimum_clp.checkpoint.adapters.importlib.util.find_spec", spec)


@pytest.mark.parametrize("read", [load_model, load_config, CLPPruner.from_pretrained])
def test_said_at_once_without_peft(folders, read, monkeypatch):
    pretend(monkeypatch, False)
    with pytest.raises(
        ModelError, match="it holds an adapter for .*base, not a model, and peft is not installed. Inst"
    ):
        read(folders[1])


def test_an_adapter_that_names_no_model(folders, monkeypatch):
    pretend(monkeypatch, True)
    (folders[1] / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="does not name the model that it is for. Merge it with peft first"):
        load_model(folders[1])


def test_an_adapter_beside_a_whole_model_may_be_in_it_already(folders, monkeypatch):
    pretend(monkeypatch, True)
    tiny_model().save_pretrained(folders[1])
    with pytest.raises(ModelError, match="it holds a model and an adapter, and the adapter may be merged .* already"):
        load_model(folders[1])


class Whole:
    """Stands for a PeftModel: what is asked of peft, without peft."""

    peft_type = "LORA"

    def __init__(self, base):
        self.base = base

    def merge_and_unload(self):
        with torch.no_grad():
            self.base.model.layers[0].self_attn.q_proj.weight.add_(1)
        return self.base


class Prompts:
    peft_type = SimpleNamespace(value="PROMPT_TUNING")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda base, folder: Whole(base), None),
        (lambda base, folder: Prompts(), r"its adapter \(PROMPT_TUNING\) cannot be merged into weights"),
        (lambda base, folder: 1 / 0, r"it could not be read \(division by zero\)"),
    ],
)
def test_merged_where_peft_can(folders, made, message, monkeypatch):
    peft = ModuleType("peft")
    peft.PeftModel = SimpleNamespace(from_pretrained=made)
    monkeypatch.setitem(sys.modules, "peft", peft)
    pretend(monkeypatch, True)
    if message is not None:
        with pytest.raises(ModelError, match=message):
            load_model(folders[1], quiet=True)
        return
    dense = load_model(folders[0], quiet=True).state_dict()
    found = load_model(folders[1], quiet=True)
    changed = {name for name, tensor in found.state_dict().items() if not torch.equal(tensor, dense[name])}
    assert changed == {"model.layers.0.self_attn.q_proj.weight"}
    assert load_config(folders[1]).num_hidden_layers == 6


def test_the_real_peft(folders):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(load_model(folders[0], quiet=True), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    adapted.peft_config["default"].base_model_name_or_path = str(folders[0])
    adapted.save_pretrained(folders[1])
    with pytest.raises(ModelError, match="adapters of peft are attached"):
        load_model(adapted)
    with pytest.raises(ModelError, match="adapters of peft are attached"):
        load_model(adapted.base_model.model)
    found = load_model(folders[1], quiet=True)
    ids = random_tokens(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in found.named_parameters())
