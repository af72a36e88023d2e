"""A folder that was cut before: cut further, and held to be what its report says."""

import json
import shutil

import pytest
import torch
from notices import notice
from tiny_models import tiny_model, tiny_tokenizer

from optimum_clp import CLPConfig, CLPPruner, LayerSegment
from optimum_clp.errors import ModelError
from optimum_clp.segments import further_segments


def recipe(cache, ratio):
    text = {"sequence_length": 8, "train_sequences": 8, "validation_sequences": 2, "test_sequences": 1}
    tuning = {"epochs": 1, "hidden_epochs": 0, "batch_size": 4, "evaluations_per_epoch": 1}
    return CLPConfig(
        ratio,
        calibration={**text, "cache_dir": str(cache)},
        search={"strategy": "exhaustive", "num_sequences": 4},
        tuning=tuning,
        export={"enabled": False},
        evaluation={"generation": False},
    )


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A folder with a dense model, and one with what was cut from it: 6 layers and 4."""
    place = tmp_path_factory.mktemp("cut")
    tiny_model(num_layers=6).save_pretrained(place / "dense")
    tiny_tokenizer().save_pretrained(place / "dense")
    pruner = CLPPruner.from_pretrained(place / "dense", quiet=True)
    pruner.prune(recipe(place / "cache", 0.33), place / "cut")
    return place


@pytest.fixture
def place(cut, tmp_path):
    """A copy of it, with the same paths inside."""
    shutil.copytree(cut / "cut", tmp_path / "cut")
    return tmp_path


def edit(place, **changes):
    report = json.loads((place / "cut" / "clp_report.json").read_text())
    for section, values in changes.items():
        report[section] |= values
    (place / "cut" / "clp_report.json").write_text(json.dumps(report))


def opened(place):
    return CLPPruner.from_pretrained(place / "cut", quiet=True)


def test_segments_of_two_cuts():
    both = further_segments([LayerSegment(2, 4)], [LayerSegment(1, 3)], 8)  # of 0 1 4 5 6 7 the layers 1 and 4 go
    assert both == (LayerSegment(1, 5),)
    assert further_segments([LayerSegment(0, 1)], [LayerSegment(4, 5)], 8) == (LayerSegment(0, 1), LayerSegment(5, 6))


def test_a_cut_model_is_cut_further(place):
    before = opened(place)
    first = [LayerSegment(*s) for s in before.report.cut["segments"]]
    given = {name: tensor.clone() for name, tensor in before.pruned_model.state_dict().items()}
    with notice("cut was cut before, and is cut further; what comes out is compared with the first"):
        model = before.prune(recipe(place / "cache", 0.25), place / "again")
    assert model.config.num_hidden_layers == 3
    report = before.report
    assert report.search["num_layers"] == 4 and report.cut["num_layers_before"] == 6
    chain = report.cut["chain"]
    assert [step["num_layers_before"] for step in chain] == [6, 4] and report.cut["towards"] == "first dense model"
    second = [LayerSegment(*s) for s in chain[1]["segments"]]
    assert [LayerSegment(*s) for s in report.cut["segments"]] == list(further_segments(first, second, 6))
    assert [row["num_layers"] for row in report.evaluation["rows"]] == [6, 3, 3]
    # what was not trained is the given model's, tuned layers included
    kept = [i for i in range(4) if not any(s.start <= i < s.stop for s in second)]
    for new, old in enumerate(kept):
        if new not in report.tuning["layers"]:
            weights = model.model.layers[new].state_dict()
            assert all(torch.equal(t, given[f"model.layers.{old}.{n}"]) for n, t in weights.items())
    again = CLPPruner.from_pretrained(place / "again", quiet=True)
    again.tune(recipe(place / "cache", 0.25))
    assert "3 cuts" not in (place / "again" / "README.md").read_text()
    assert "came about in 2 cuts" in (place / "again" / "README.md").read_text()


def test_without_the_first_dense_model_the_given_one_stands_in(place):
    edit(place, base_model={"name_or_path": str(place / "gone")})
    pruner = opened(place)
    with notice("compared with itself, because of the first: .*there is no such folder"):
        pruner.prune(recipe(place / "cache", 0.25), place / "again")
    cut = pruner.report.cut
    assert cut["towards"] == "given model" and cut["num_layers_before"] == 4 and len(cut["chain"]) == 2
    assert pruner.report.base_model["name_or_path"] == str(place / "cut")
    CLPPruner.from_pretrained(place / "again", quiet=True).tune(recipe(place / "cache", 0.25))


def test_a_report_that_was_edited_is_refused(place):
    edit(place, cut={"segments": [[0, 2]]})
    with pytest.raises(
        ModelError, match="model is .*cut': its clp_report.json was changed: its segments and fingerprints"
    ):
        opened(place)


def test_another_dense_model_is_refused(cut, place):
    tiny_model(num_layers=6, seed=1).save_pretrained(place / "other")
    edit(place, base_model={"name_or_path": str(place / "other")})
    with pytest.raises(ModelError, match="it is not the model that was cut: its weights have another fingerprint"):
        opened(place).tune(recipe(place / "cache", 0.33))
    pruner = opened(place)
    pruner.model = tiny_model(num_layers=6, seed=1)
    with pytest.raises(ModelError, match="it is not the model that was cut"):
        pruner.tune(recipe(place / "cache", 0.33))
    # the same weights elsewhere are the same model
    shutil.copytree(cut / "dense", place / "moved")
    edit(place, base_model={"name_or_path": str(place / "moved")})
    opened(place).tune(recipe(place / "cache", 0.33))


def test_weights_that_were_changed_are_told_and_not_tuned(place):
    model = opened(place).pruned_model
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(place / "changed")
    shutil.copy(place / "changed" / "model.safetensors", place / "cut")
    with notice("The weights in .*cut were changed after clp_report.json was written"):
        pruner = opened(place)
    with pytest.raises(ModelError, match="its weights were changed after its report was written"):
        pruner.tune(recipe(place / "cache", 0.33))


def test_reports_of_earlier_versions_are_taken_as_they_are(place):
    report = json.loads((place / "cut" / "clp_report.json").read_text())
    del report["cut"]["seal"], report["cut"]["fingerprint"], report["base_model"]["fingerprint"], report["failures"]
    (place / "cut" / "clp_report.json").write_text(json.dumps(report))
    assert opened(place).segments
