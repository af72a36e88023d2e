"""Model types that others add: by a call, or by the entry point of an installed package."""

import warnings

import pytest
import torch
from tiny_models import random_tokens, tiny_config
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from optimum_clp.architecture.conditions import Stays
from optimum_clp.architecture.fields import FirstLayers
from optimum_clp.architecture.lookup import cut_obstacle, describe_layers, find_architecture
from optimum_clp.architecture.table import BUILT_IN, REFUSED, Architecture, register_architecture
from optimum_clp.checkpoint.loading import load_model
from optimum_clp.checkpoint.saving import save_checkpoint, verify_checkpoint
from optimum_clp.errors import ConfigurationError, ModelError
from optimum_clp.registry import Registry
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model


class OwnConfig(LlamaConfig):
    model_type = "own_llama"
    own_layers = 0


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


ROW = Architecture("own_llama", (FirstLayers("own_layers"),))


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """A registry of this test alone, in place of the package's."""
    empty = Registry("architecture", "optimum_clp.architectures")
    for module in ("table", "lookup"):
        monkeypatch.setattr(f"optimum_clp.architecture.{module}.ARCHITECTURES", empty)
    return empty


def own_config():
    settings = tiny_config("llama").to_dict() | {"own_layers": 4}
    del settings["model_type"]
    return OwnConfig(**settings)


def install(folder, monkeypatch, name, target, module="", package="their-package"):
    """What pip leaves of a package with one entry point, on the path of this test."""
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[optimum_clp.architectures]\n{name} = {target}\n")
    (folder / f"{target.partition(':')[0]}.py").write_text(module)
    monkeypatch.syspath_prepend(folder)


def test_a_registered_type_is_cut_by_its_own_rules():
    config = own_config()
    with pytest.raises(ModelError, match="model_type is 'own_llama': it is not one of the architectures"):
        find_architecture(config)
    register_architecture(ROW)
    torch.manual_seed(0)
    model = OwnForCausalLM(config).eval()
    assert describe_layers(config) == {"own_layers": [True] * 4 + [False] * 2}
    smaller = cut_model(model, [LayerSegment(1, 3)])
    assert (smaller.config.num_hidden_layers, smaller.config.own_layers) == (4, 2)
    ids = random_tokens(2, 12)
    with torch.no_grad():
        found = smaller(ids).logits
        model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in (0, 3, 4, 5))
        model.config.num_hidden_layers = 4
        assert torch.equal(found, model(ids, use_cache=False).logits)


@pytest.fixture
def own_classes():
    """The type as transformers knows it when their package has been imported; forgotten afterwards."""
    AutoConfig.register("own_llama", OwnConfig)
    AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)
    yield
    CONFIG_MAPPING._extra_content.pop("own_llama")
    MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(OwnConfig)


def test_a_model_of_a_class_of_their_own_is_opened_cut_and_read_back(tmp_path, own_classes):
    register_architecture(ROW)
    torch.manual_seed(0)
    model = OwnForCausalLM(own_config()).eval()
    assert load_model(model, accept=find_architecture) is model
    model.save_pretrained(tmp_path / "dense")
    dense = load_model(tmp_path / "dense", accept=find_architecture, quiet=True)
    smaller = cut_model(dense, [LayerSegment(0, 2)])
    save_checkpoint(smaller, None, tmp_path / "cut")
    verify_checkpoint(tmp_path / "cut", smaller)
    assert load_model(tmp_path / "cut", quiet=True).config.own_layers == 2


def test_another_class_of_their_type_is_no_language_model(own_classes):
    model = LlamaModel(own_config())
    with pytest.raises(ModelError, match="model is 'LlamaModel': LlamaModel is not a causal language model"):
        load_model(model)


def test_a_class_that_nobody_has_registered_is_no_language_model():
    with pytest.raises(ModelError, match="OwnForCausalLM is not a causal language model"):
        load_model(OwnForCausalLM(own_config()))


def test_conditions_of_a_registered_type_hold():
    register_architecture(Architecture("own_llama", conditions=(Stays(-1, "it is the last"),)))
    assert cut_obstacle(own_config(), [0, 1, 2]) == "layer 5 must stay, because it is the last"
    assert cut_obstacle(own_config(), [0, 1, 5]) is None


def test_an_installed_package_adds_a_type_and_is_imported_when_it_is_asked_for(tmp_path, monkeypatch):
    module = "from optimum_clp.architecture.table import Architecture\nROW = Architecture('own_llama', count='num_layers')\n"
    install(tmp_path, monkeypatch, "own_llama", "their_rows_one:ROW", module)
    assert find_architecture(own_config()) == Architecture("own_llama", count="num_layers")


def test_an_unknown_type_is_told_what_packages_add(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "zz_own", "their_rows_two:ROW")
    with pytest.raises(ModelError, match="Use one of: afmoe, .*, zamba, zz_own; or add it"):
        find_architecture(own_config())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("ROW = 'llama'", "what their-package adds for it is a str, and it must be an Architecture of optimum_clp"),
        ("raise OSError('a lib is missing')", r"the package their-package adds it as their_rows_.*a lib is missing"),
        ("", r"cannot be imported \(module 'their_rows_.*' has no attribute 'ROW'\)"),
    ],
    ids=["another object", "does not import", "no such object"],
)
def test_a_package_that_adds_no_row_is_named(tmp_path, monkeypatch, module, message, request):
    name = f"their_rows_{request.node.callspec.indices['module']}"
    install(tmp_path, monkeypatch, "own_llama", f"{name}:ROW", module)
    with pytest.raises(ConfigurationError, match=f"architecture is 'own_llama': .*{message}"):
        find_architecture(own_config())


@pytest.mark.parametrize("model_type", ["llama", "qwen3_5"])
def test_a_type_of_ours_cannot_be_overridden(model_type, registry):
    with pytest.raises(
        ConfigurationError,
        match=rf"architecture is '{model_type}': this package has a row for that type, which its tests hold, and that "
        "cannot be overridden. Leave yours out, or change the row in optimum_clp/architecture/table.py",
    ):
        register_architecture(Architecture(model_type))
    assert list(registry) == []


@pytest.mark.parametrize("model_type", ["bert", "zaya"])
def test_a_refused_type_cannot_be_overridden(model_type, registry):
    reason, remedy = REFUSED[model_type]
    with pytest.raises(ConfigurationError) as refused:
        register_architecture(Architecture(model_type))
    assert str(refused.value) == (
        f"architecture is {model_type!r}: no cut of that type is exact ({reason}), and that cannot be overridden. {remedy}."
    )
    assert list(registry) == []


def test_a_type_is_registered_once():
    register_architecture(ROW)
    with pytest.raises(ConfigurationError, match="architecture is 'own_llama': there is one of that name already"):
        register_architecture(ROW)


@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_a_package_with_a_name_of_ours_changes_nothing(model_type, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, model_type, "their_rows_never:ROW", "raise AssertionError('never asked')")
    config = tiny_config("llama")
    config.model_type = model_type
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if model_type in REFUSED:
            with pytest.raises(ModelError, match="model_type is 'bert': it is an encoder"):
                find_architecture(config)
        else:
            assert find_architecture(config) is BUILT_IN["llama"]
