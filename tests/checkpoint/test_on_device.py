"""Models that an accelerator does not hold, from `max_memory` on; the accelerator is pretended, or the CPU stands in for it."""

import json
import re
from contextlib import nullcontext

import pytest
import torch
from pretended_devices import ACCELERATOR, PretendedDevices
from tiny_models import random_tokens, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from optimum_clp import CLPConfig, CLPPruner
from optimum_clp.checkpoint import on_device
from optimum_clp.checkpoint.offloaded import bare_copy
from optimum_clp.checkpoint.on_device import placed
from optimum_clp.errors import ConfigurationError
from optimum_clp.exporters.float32_copy import float32_copy
from optimum_clp.forward.memory_bound import copies_within, residence_under
from optimum_clp.forward.streamed_layers import LayerCopies, copies_of, run_on
from optimum_clp.segments import LayerSegment
from optimum_clp.surgery.cut import cut_model

CPU = torch.device("cpu")
MIB = 2**20
LARGE = {"hidden_size": 128, "intermediate_size": 512, "num_layers": 12}


@pytest.fixture
def pretended(monkeypatch):
    monkeypatch.setattr(on_device, "accelerator", lambda number: torch.device("mtia", number))
    with PretendedDevices() as devices:
        yield devices


def recipe(folder, **overrides):
    text = [" ".join(f"w{i}" for i in row) for row in random_tokens(60, 30).tolist()]
    calibration = {"dataset": text, "self_written_share": 0.0, "cache_dir": str(folder / "cache")}
    calibration |= {"sequence_length": 16, "train_sequences": 12, "test_sequences": 4, "validation_sequences": 4}
    options = {"search": {"num_sequences": 8}, "tuning": {"epochs": 1, "batch_size": 4, "learning_rate": 3e-3}}
    options |= {"evaluation": {"max_new_tokens": 4}, "export": {"enabled": False}}
    return CLPConfig(0.33, calibration=calibration, **(options | overrides))


def sizes(model):
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers]
    return sum(p.nbytes for p in model.parameters()) - sum(layers), max(layers)


def test_an_accelerator_holds_what_is_around_the_layers_and_as_many_copies_as_there_is_room_for():
    model = tiny_model(**LARGE)
    around, layer = sizes(model)
    row = 16 * (2 * 512 + 64 * 2 + 32 * 2 + 128 * 2 + 4 * 128) * 4
    least = row + 16 * 97 * 4 * 5
    smallest = around + 2 * layer + least
    copies = copies_within(smallest, model, 16, CPU)
    assert copies.staying == 0 and copies.work_memory == least
    plain = 8 * (row + 16 * 97 * 8)
    for more in (0, 1, 3, 11):
        bound = smallest + plain - least + more * layer
        copies = copies_within(bound, model, 16, CPU)
        assert copies.staying == more and copies.work_memory == plain
    assert copies_within(10**9, model, 16, CPU).staying == 12
    assert copies_within(10**9, model, 16, CPU, reserved=10**9 - smallest).staying == 0


def test_a_bound_below_that_says_what_would_do():
    model = tiny_model(**LARGE)
    around, layer = sizes(model)
    with pytest.raises(ConfigurationError) as raised:
        copies_within(MIB, model, 16, CPU, reserved=2**30, name="1")
    message = "max_memory is '1=0.00 GiB': there are 0.00 GiB around the layers, two layers of 0.00 GiB, and 1.00 GiB of a tuning. Give at least 1="
    assert str(raised.value).startswith(message)
    proposed = int(re.search(r"1=(\d+)MiB", str(raised.value))[1]) * MIB
    copies_within(proposed, model, 16, CPU, reserved=2**30)
    with pytest.raises(ConfigurationError):
        copies_within(proposed - MIB, model, 16, CPU, reserved=2**30)


def test_an_accelerator_that_is_not_there_is_named(monkeypatch):
    if torch.accelerator.is_available():
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match=r"max_memory is '0=...': there is no accelerator here. Leave it out"):
        placed(tiny_model(), {0: 2**30}, 16)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert on_device.accelerator(1) == torch.device("cuda", 1)
    with pytest.raises(
        ConfigurationError, match="max_memory is '2=...': there are 2 accelerators here, numbered from 0"
    ):
        on_device.accelerator(2)


def test_one_process_runs_on_one_accelerator_and_each_of_a_group_on_its_own(pretended, monkeypatch):
    with pytest.raises(
        ConfigurationError, match="one process runs a bounded model on one accelerator. Name one; or start"
    ):
        placed(tiny_model(), {0: 2**30, 1: 2**30}, 16)
    monkeypatch.setattr(on_device, "world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert placed(tiny_model(), {0: 2**30, 1: 2**30}, 16).device == torch.device("mtia", 1)
    with pytest.raises(
        ConfigurationError, match="this process's accelerator is 1, and it has no bound. Name the accelerator"
    ):
        placed(tiny_model(), {0: 2**30}, 16)


def test_passes_over_such_a_model_always_go_layer_by_layer(pretended, tmp_path):
    model = placed(tiny_model(), {0: 2**30}, 16)
    needs, residence = residence_under(2**40, model, 16, tmp_path)
    assert residence.layers == 1 and residence.work_memory == copies_of(model).work_memory
    assert residence.state_memory == pytest.approx(2**40 - needs.resident) and residence.folder == tmp_path
    assert residence_under(2**40, tiny_model(), 16, tmp_path)[1] is None


def test_another_bound_is_another_number_of_copies(pretended):
    model = placed(tiny_model(), {0: 2**30}, 16)
    assert copies_of(model).staying == 6
    same = placed(model, {0: sum(sizes(model)) + sizes(model)[1] + 2**16}, 16)
    assert same is model and copies_of(model).staying < 6 and len(copies_of(model)) == 0
    assert placed(model, {}, 16) is model


def test_every_verb_runs_there_and_gives_what_it_gives_in_memory(tmp_path, monkeypatch):
    """Nothing is computed over tensors of two places; what comes out is the same, up to the order of additions in the tuning."""
    monkeypatch.setattr("optimum_clp.evaluation.outcome.NEW_TOKENS", 3)
    monkeypatch.setattr(on_device, "accelerator", lambda number: torch.device("mtia", number))
    monkeypatch.setattr("optimum_clp.output_folder.environment_info", lambda device: {})
    tiny_model().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    made = {}
    for name, bound in (("whole", None), ("bounded", {0: 600_000, "cpu": "64GiB"})):
        pruner = CLPPruner.from_pretrained(tmp_path / "dense", quiet=True)
        with nullcontext() if bound is None else PretendedDevices():
            model = pruner.prune(recipe(tmp_path, max_memory=bound), tmp_path / name)
            figures = pruner.evaluate(generation=False)
            device = pruner.model.device, model.device
        made[name] = pruner.segments, figures
        assert not json.loads((tmp_path / name / "clp_report.json").read_text()).get("failures")
    (segments, whole), (found, bounded) = made["whole"], made["bounded"]
    assert found == segments and bounded == pytest.approx(whole, rel=1e-4)
    assert device == (ACCELERATOR, ACCELERATOR) and copies_of(model) is copies_of(pruner.model)
    assert 0 < copies_of(model).copied and len(copies_of(model)) <= 2 + copies_of(model).staying < 6
    ids = random_tokens(1, 8)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "bounded", dtype="auto")
    with torch.no_grad(), PretendedDevices():
        assert {p.device for layer in pruner.model.model.layers for p in layer.parameters()} == {CPU}
        assert torch.equal(model(ids.to(ACCELERATOR)).logits.cpu(), stock(ids).logits)


def test_a_folder_is_tuned_there_beside_the_dense_model_that_it_names(tmp_path, monkeypatch):
    monkeypatch.setattr(on_device, "accelerator", lambda number: CPU)
    tiny_model().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    pruner = CLPPruner.from_pretrained(tmp_path / "dense", quiet=True)
    pruner.cut([LayerSegment(2, 4)])
    pruner.config = recipe(tmp_path, evaluation={"generation": False})
    pruner.save_pretrained(tmp_path / "out")
    losses = []
    for bound in (None, {"0": 600_000}):
        pruner = CLPPruner.from_pretrained(tmp_path / "out", quiet=True)
        losses.append(pruner.tune(recipe(tmp_path, max_memory=bound)).best_validation_loss)
        assert {copies_of(model) is None for model in (pruner.model, pruner.pruned_model)} == {bound is None}
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_float32_copy_that_is_exported_is_a_plain_model():
    twin = bare_copy(tiny_model(dtype=torch.bfloat16))
    run_on(twin, LayerCopies(CPU))
    copied = float32_copy(cut_model(twin, [LayerSegment(2, 4)]))
    assert copies_of(copied) is None and not any("forward" in vars(module) for module in copied.modules())
    expected = float32_copy(cut_model(tiny_model(dtype=torch.bfloat16), [LayerSegment(2, 4)])).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in copied.state_dict().items())
