"""Weights that are written to while a bounded run reads them: one error, nothing written, and the run goes on when it is whole again."""

import os

import pytest
from tiny_models import random_tokens, tiny_model, tiny_tokenizer

from optimum_clp import CLPConfig, CLPPruner
from optimum_clp.errors import ModelError
from optimum_clp.forward.layer_major import Residence

WRITTEN = r"model is '.*model\.safetensors': it was written to while its weights were read, .*start again"


@pytest.fixture
def dense(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    rows = random_tokens(200, 30).tolist()
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join(f"w{i}" for i in row) for row in rows))
    bound = Residence(1, state_memory=0, work_memory=1e6, folder=tmp_path / "states")
    monkeypatch.setattr("optimum_clp.session.residence_under", lambda limit, model, *_, **__: (None, bound))
    return tmp_path / "dense"


def recipe(place):
    text = {"sequence_length": 16, "train_sequences": 8, "validation_sequences": 2, "test_sequences": 2}
    text |= {"dataset": str(place / "text.txt"), "self_written_share": 0.0, "cache_dir": str(place / "cache")}
    tuning = {"hidden_epochs": 0, "batch_size": 4, "init": "none"}
    options = {"export": {"enabled": False}, "evaluation": {"generation": False}}
    return CLPConfig(0.33, calibration=text, search={"num_sequences": 4}, tuning=tuning, **options)


def touch(file):
    """The same bytes, written anew: no one can tell from its time that nothing has changed."""
    content = file.read_bytes()
    with file.open("r+b") as stream:
        stream.write(content)
    os.utime(file, ns=(1, 1))


def test_between_two_stages(dense, tmp_path):
    pruner = CLPPruner.from_pretrained(dense, quiet=True)
    pruner.search(recipe(tmp_path))
    pruner.cut()
    touch(dense / "model.safetensors")
    with pytest.raises(ModelError, match=WRITTEN):
        pruner.tune()
    again = CLPPruner.from_pretrained(dense, quiet=True)
    again.prune(recipe(tmp_path), tmp_path / "out")
    assert again.segments == pruner.segments


def test_between_two_steps_of_the_tuning(dense, tmp_path, monkeypatch):
    pruner, steps = CLPPruner.from_pretrained(dense, quiet=True), []
    train = "optimum_clp.tuning.loop.TrainingLoop._train_step"
    from optimum_clp.tuning.loop import TrainingLoop

    step = TrainingLoop._train_step

    def disturbed(loop):
        steps.append(1)
        if len(steps) == 2:
            touch(dense / "model.safetensors")
        return step(loop)

    monkeypatch.setattr(train, disturbed)
    with pytest.raises(ModelError, match=WRITTEN):
        pruner.prune(recipe(tmp_path), tmp_path / "out")
    assert len(steps) == 2 and not (tmp_path / "out").exists()


def test_on_the_way_down_of_the_gradients(dense, tmp_path, monkeypatch):
    from optimum_clp.search import weight_gradients

    gradient, calls = weight_gradients._gradient, []

    def disturbed(tensor):
        calls.append(1)
        if len(calls) == 6:
            touch(dense / "model.safetensors")
        return gradient(tensor)

    monkeypatch.setattr(weight_gradients, "_gradient", disturbed)
    config = recipe(tmp_path)
    config.search.strategy = "taylor"
    with pytest.raises(ModelError, match=WRITTEN):
        CLPPruner.from_pretrained(dense, quiet=True).search(config)
