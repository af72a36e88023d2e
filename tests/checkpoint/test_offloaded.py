import re
import sys

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from pretended_devices import ACCELERATOR, PretendedDevices
from tiny_models import random_tokens, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from optimum_clp import CLPConfig, CLPPruner
from optimum_clp.checkpoint.loading import load_model
from optimum_clp.checkpoint.offloaded import read_in_place
from optimum_clp.errors import ModelError
from optimum_clp.forward.streamed_layers import copies_of
from optimum_clp.mapped_weights import MappedWeights
from optimum_clp.segments import LayerSegment

LAYERS = 6


def mixed_map(tied=False):
    """Some layers on disk, the others in memory."""
    around = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return around | {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(LAYERS)}


def by_transformers(model, folder):
    model.save_pretrained(folder / "dense")
    return AutoModelForCausalLM.from_pretrained(
        folder / "dense", dtype="auto", device_map=mixed_map(), offload_folder=str(folder / "offload")
    ).eval()


def pickled(model, folder):
    """Weights that are in no safetensors file are written to the folder, one file each."""
    torch.save(model.state_dict(), (folder / "pytorch_model.bin"))
    model.config.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map=mixed_map(), offload_folder=str(folder / "offload"), use_safetensors=False
    ).eval()


def dispatched(model, folder):
    return dispatch_model(model, mixed_map(), offload_dir=str(folder))


def on_disk(model, folder):
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def in_memory(model, folder):
    return cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.fixture(params=[by_transformers, pickled, dispatched, on_disk, in_memory])
def offloaded(request, tmp_path):
    return request.param(tiny_model(dtype=torch.bfloat16), tmp_path)


def metas(model):
    return [name for name, parameter in model.named_parameters() if parameter.is_meta]


def test_an_offloaded_model_is_read_in_place(offloaded):
    before, ids = metas(offloaded), random_tokens(2, 12)
    assert before
    twin = read_in_place(offloaded)
    assert not metas(twin) and metas(offloaded) == before
    expected = tiny_model(dtype=torch.bfloat16).state_dict()
    assert twin.state_dict().keys() == expected.keys()
    for name, tensor in twin.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert not any("_hf_hook" in vars(m) or "forward" in vars(m) or "to" in vars(m) for m in twin.modules())
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, offloaded(ids).logits)
    kept = {n: p for n, p in offloaded.named_parameters() if not p.is_meta}
    assert all(p.data_ptr() == kept[n].data_ptr() for n, p in twin.named_parameters() if n in kept)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the table of mappings is Linux's")
@pytest.mark.parametrize("offload", [by_transformers, pickled, on_disk])
def test_what_is_on_disk_stays_there(offload, tmp_path):
    twin, table = read_in_place(offload(tiny_model(dtype=torch.bfloat16), tmp_path)), MappedWeights()
    assert all(table.holds(p) for layer in list(twin.model.layers)[1::2] for p in layer.parameters())


def test_tied_weights_stay_tied(tmp_path):
    model = disk_offload(tiny_model(tie_word_embeddings=True), str(tmp_path), execution_device=torch.device("cpu"))
    twin = read_in_place(model)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert not metas(twin)


def test_a_model_that_is_not_offloaded_is_itself():
    model = tiny_model()
    assert read_in_place(model) is model


def runs_on(model, device):
    """As accelerate leaves a model whose modules run on an accelerator."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook] if hook else []):
            each.execution_device = device
    return model


@pytest.mark.parametrize("offload", [dispatched, on_disk, in_memory])
def test_a_model_that_ran_on_an_accelerator_runs_there_again(offload, tmp_path):
    """What is around the layers lies there, the layers lie where they were offloaded to, or still in memory."""
    model, ids = runs_on(offload(tiny_model(dtype=torch.bfloat16), tmp_path), ACCELERATOR), random_tokens(2, 12)
    before = metas(model)
    expected = tiny_model(dtype=torch.bfloat16)
    with PretendedDevices(), torch.no_grad():
        twin = read_in_place(model)
        assert metas(model) == before and not metas(twin)
        assert twin.device == twin.lm_head.weight.device == ACCELERATOR and copies_of(twin).device == ACCELERATOR
        assert {p.device for layer in twin.model.layers for p in layer.parameters()} == {torch.device("cpu")}
        assert torch.equal(twin(ids.to(ACCELERATOR)).logits.cpu(), expected(ids).logits)
        for name, tensor in twin.state_dict().items():
            assert torch.equal(tensor.cpu(), expected.state_dict()[name]), name


def test_offloading_from_several_accelerators_is_refused(tmp_path):
    model = runs_on(disk_offload(tiny_model(), str(tmp_path), execution_device=torch.device("cpu")), ACCELERATOR)
    model.model.layers[2].mlp.up_proj._hf_hook.execution_device = torch.device("mtia", 1)
    with pytest.raises(
        ModelError,
        match=r"the weights of model\.layers\.2\.mlp\.up_proj are offloaded and run on mtia:1, those of .* on mtia:0|"
        r"the weights of .* are offloaded and run on mtia:0, those of model\.layers\.2\.mlp\.up_proj on mtia:1\. Load it with",
    ):
        read_in_place(model)


@pytest.mark.parametrize("harm", ["gone", "short"])
def test_a_weight_that_is_not_where_it_was_put_is_named(tmp_path, harm):
    model = disk_offload(tiny_model(), str(tmp_path), execution_device=torch.device("cpu"))
    file = tmp_path / "model.layers.3.mlp.up_proj.weight.dat"
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:100])
    message = (
        "of its offloaded weight model.layers.3.mlp.up_proj.weight: it cannot be read from where it was offloaded to"
    )
    with pytest.raises(ModelError, match=re.escape(message)):
        read_in_place(model)


def test_a_folder_can_be_loaded_with_a_map_that_names_the_disk(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    ids = random_tokens(1, 8)
    loaded = load_model(str(tmp_path), device_map=mixed_map(), quiet=True)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, tiny_model()(ids).logits)


def test_prune_makes_of_an_offloaded_model_what_it_makes_of_one_in_memory(tmp_path):
    """Every verb but the ONNX export, whose copy is read from the same tensors."""
    text = [" ".join(f"w{i}" for i in row) for row in random_tokens(40, 30).tolist()]
    recipe = CLPConfig(
        calibration={"dataset": text, "sequence_length": 16, "train_sequences": 8, "test_sequences": 4}
        | {"validation_sequences": 4, "self_written_share": 0.0, "cache_dir": str(tmp_path / "cache")},
        search={"num_sequences": 8},
        tuning={"hidden_epochs": 1},
        export={"enabled": False},
        evaluation={"generation": False},
    )
    made = {}
    for name in ("plain", "offloaded"):
        model = tiny_model(dtype=torch.bfloat16)
        if name == "offloaded":
            model = by_transformers(model, tmp_path)
        pruner = CLPPruner(model, tiny_tokenizer(), quiet=True)
        pruner.prune(recipe, tmp_path / name)
        made[name] = (tmp_path / name / "model.safetensors").read_bytes(), pruner.segments
        pruner.cut([LayerSegment(2, 3)])
    assert made["plain"] == made["offloaded"]
