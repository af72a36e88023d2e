"""Every file that an interrupted run leaves, damaged in every way: the run that goes on ends in the same bits, and says so if
it had to do something again. The same command does not stumble twice."""

import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from notices import notices
from tiny_models import tiny_model

from optimum_clp import CLPConfig, CLPPruner
from optimum_clp.tuning.loop import TrainingLoop

FILES = {
    "text": "self_written-*.safetensors",
    "journal": "search-*.jsonl",
    "best weights": "tuning-*/best-*.pt",
    "weights": "tuning-*/checkpoint-*/model.safetensors",
    "optimizer": "tuning-*/checkpoint-*/optimizer.bin",
    "random states": "tuning-*/checkpoint-*/random_states_0.pkl",
    "progress": "tuning-*/checkpoint-*/progress.json",
    "checkpoint": "tuning-*/checkpoint-*",
    "tuning": "tuning-*",
}


class Interrupted(BaseException):
    """As Ctrl-C."""


def prune(cache, seed=0, stop_at=None):
    """A whole run on a tiny model; its weights, and what it warned of."""
    text = {"sequence_length": 8, "train_sequences": 12, "validation_sequences": 2, "test_sequences": 1}
    tuning = {"epochs": 2, "hidden_epochs": 0, "batch_size": 4, "checkpoint_seconds": 0.0, "evaluations_per_epoch": 1}
    config = CLPConfig(
        0.25,
        seed=seed,
        calibration={**text, "generation_batch_size": 5, "cache_dir": str(cache)},
        search={"strategy": "exhaustive", "num_sequences": 4, "batch_size": 2},
        tuning={**tuning, "init": "none", "learning_rate": 3e-3},
    )
    step = TrainingLoop._train_step

    def interrupted(loop):
        if loop.state.step == stop_at:
            raise Interrupted
        return step(loop)

    with pytest.MonkeyPatch.context() as patch, notices() as told:
        patch.setattr(TrainingLoop, "_train_step", interrupted)
        model = CLPPruner(tiny_model(num_layers=4), quiet=True).prune(config)
    return model.state_dict(), [text for text in told if "damaged" in text]


def interrupted_run(cache, **options):
    with pytest.raises(Interrupted):
        prune(cache, stop_at=4, **options)
    return cache / "optimum_clp"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An interrupted run's cache, another's (of another seed), and the weights of an undisturbed run."""
    folder = tmp_path_factory.mktemp("runs")
    whole, told = prune(folder / "whole")
    assert told == []
    return interrupted_run(folder / "mine"), interrupted_run(folder / "other", seed=1), whole


def empty(path, other):
    path.write_bytes(b"")


def half(path, other):
    os.truncate(path, path.stat().st_size // 2)


def one_bit(part):
    def flip(path, other):
        contents, place = bytearray(path.read_bytes()), random.Random(str(part))
        at = min(len(contents) - 1, int(len(contents) * part) + place.randrange(8))
        contents[at] ^= 1 << place.randrange(8)
        path.write_bytes(contents)

    return flip


def of_another_run(path, other):
    (shutil.copytree if path.is_dir() else shutil.copy)(other, replaced(path))


def link_to_good_contents(path, other):
    elsewhere = Path(f"{path}.elsewhere".replace("optimum_clp", "elsewhere"))
    elsewhere.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


def link_to_nowhere(path, other):
    replaced(path).symlink_to(path.parent / "nowhere")


def folder(path, other):
    replaced(path).mkdir()
    (path / "file").write_text("x")


def file(path, other):
    replaced(path).write_text("x")


def missing(path, other):
    replaced(path)


def replaced(path):
    """The name is free."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return path


DAMAGES = [
    empty,
    half,
    *(one_bit(part) for part in (0.0, 0.5, 0.999)),
    of_another_run,
    link_to_good_contents,
    link_to_nowhere,
    folder,
    missing,
]
OF_FOLDERS = [of_another_run, link_to_good_contents, link_to_nowhere, file, missing]
CASES = [
    pytest.param(kind, damage, id=f"{kind}-{damage.__name__}{number}")
    for kind in FILES
    for number, damage in enumerate(OF_FOLDERS if kind in ("checkpoint", "tuning") else DAMAGES)
]


@pytest.mark.parametrize(("kind", "damage"), CASES)
def test_a_damaged_cache_gives_the_same_bits(runs, tmp_path, kind, damage):
    mine, other, whole = runs
    cache = tmp_path / "optimum_clp"
    shutil.copytree(mine, cache)
    others = min(other.glob(FILES[kind]))
    # some files are the same in every run
    same = (
        damage is of_another_run
        and others.is_file()
        and others.read_bytes() == min(cache.glob(FILES[kind])).read_bytes()
    )
    for path in sorted(cache.glob(FILES[kind])):
        damage(path, others)
    outside = {p: p.read_bytes() for p in (tmp_path / "elsewhere").rglob("*") if p.is_file()}
    weights, told = prune(tmp_path)
    assert weights.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights.items())
    # what is not there is no damage, and no more is the end of a journal, where an interruption may have cut it off
    silent = (damage is missing and kind in ("text", "journal", "checkpoint", "tuning")) or (
        kind == "journal" and (damage in (empty, half) or damage is DAMAGES[4])
    )
    assert told or silent or same
    assert len(told) == len(set(told))
    assert all(p.read_bytes() == contents for p, contents in outside.items())
    # nothing damaged is left to stumble over
    left = list(cache.iterdir())
    assert {p.name.split("-")[0] for p in left} == {"self_written"}
    assert all(p.is_file() and not p.is_symlink() and p.stat().st_mode & 0o777 == 0o600 for p in left)
    if kind == "text":
        again, told = prune(tmp_path)
        assert told == [] and all(torch.equal(tensor, whole[name]) for name, tensor in again.items())


def test_an_interrupted_run_leaves_every_kind_of_file_to_its_owner_alone(runs):
    for kind, pattern in FILES.items():
        found = list(runs[0].glob(pattern))
        assert found, kind
        assert all(p.stat().st_mode & 0o077 == 0 for p in found)
    everything = {p for p in runs[0].rglob("*") if p.is_file()}
    listed = {p for pattern in FILES.values() for p in runs[0].glob(pattern) if p.is_file()}
    assert everything == listed, "a file of a kind that is not damaged here"
