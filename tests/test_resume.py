"""Names of what is kept: the same for the same contents, from one version of the code to the next."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from notices import notice
from tiny_models import tiny_model

from optimum_clp import CLPConfig, resume
from optimum_clp.calibration import sample_cache
from optimum_clp.calibration.self_written import sample_text
from optimum_clp.version import __version__

# as `vars(TuningConfig(epochs=2))` was when the names below were first given
TUNING = {
    "enabled": True,
    "init": "least_squares",
    "loss": "kd",
    "endpoint_width": 1,
    "train_final_norm": False,
    "train_head": False,
    "learning_rate": None,
    "epochs": 2,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "mixed_precision": None,
    "warmup_ratio": 0.05,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "evaluations_per_epoch": 2,
    "patience": 4,
    "checkpoint_seconds": 60.0,
    "cache_memory_gib": 4.0,
    "report_to": [],
    "logging_dir": None,
}


class Tiny(torch.nn.Module):
    """Fixed weights and a fixed config, whatever the versions of torch and transformers."""

    def __init__(self, *weights):
        super().__init__()
        for index, weight in enumerate(weights):
            given = isinstance(weight, torch.nn.Parameter)
            self.register_parameter(f"weight_{index}", weight if given else torch.nn.Parameter(weight))
        self.register_buffer("table", torch.tensor([1.0, 0.5]))
        values = {"model_type": "tiny", "num_hidden_layers": 4, "dtype": "float32", "transformers_version": "5"}
        self.config = SimpleNamespace(to_dict=lambda: values)


@pytest.fixture
def dense():
    return Tiny(torch.arange(6.0).reshape(2, 3), torch.arange(4.0).bfloat16())


ROWS = torch.arange(12).reshape(3, 4)


def tuning_folder(dense, threads=3, **changes):
    cut = Tiny(dense.weight_0, torch.arange(4.0).bfloat16() + 1)
    recipe = {"tuning": TUNING, "seed": 5, "layers": [0, 1], "segments": ["[1, 3)"], **changes}
    fingerprint = resume.weights_fingerprint(dense, quiet=True)
    return resume.tuning_folder(dense, cut, fingerprint, recipe, (ROWS, ROWS + 1), "cache", quiet=True)


def test_names_are_what_they_always_were(dense, monkeypatch):
    # a change here throws away what users have on disk
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(sample_cache, "__version__", "0.1.0")
    fingerprint = resume.weights_fingerprint(dense, quiet=True)
    assert fingerprint == "500695d05703fc91af58ebef8564405e6bc0db931946e06dfbb39e9d128c2151"
    file = sample_cache.sample_file(dense, fingerprint, {"num_sequences": 4, "seed": 0}, "cache")
    assert file.as_posix() == "cache/optimum_clp/self_written-d87395139452dd518fbf18918dac7494.safetensors"
    assert tuning_folder(dense).as_posix() == "cache/optimum_clp/tuning-2399b3f7049d29e70a01f164b7862808"


def test_the_name_of_self_written_text_says_how_it_was_written(tmp_path):
    model, digest = tiny_model(), hashlib.sha256()
    asked = {"num_sequences": 2, "sequence_length": 6, "seed": 3, "temperature": 0.5, "batch_size": 2}
    sample_text(model, **asked, cache_dir=tmp_path, quiet=True)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} torch.float32 {tuple(tensor.shape)}".encode() + tensor.detach().numpy().tobytes())
    volatile = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
    config = {key: value for key, value in model.config.to_dict().items() if key not in volatile}
    rules = {"start": 1, "ends": [2], "vocabulary": 97, "special": [0, 1, 2]}
    contents = [
        3,
        __version__,
        config,
        {**{key: value for key, value in asked.items() if key != "num_sequences"}, "rules": rules},
        digest.hexdigest(),
    ]
    name = hashlib.sha256(json.dumps(contents, sort_keys=True, default=str).encode()).hexdigest()[:32]
    assert [file.name for file in (tmp_path / "optimum_clp").iterdir()] == [f"self_written-{name}.safetensors"]


def test_a_tuning_has_another_name_if_anything_is_another(dense, monkeypatch):
    names = {tuning_folder(dense), tuning_folder(dense, seed=6), tuning_folder(dense, segments=["[2, 4)"])}
    names.add(tuning_folder(dense, tuning={**TUNING, "epochs": 3}))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 17)
    names.add(tuning_folder(dense))
    with torch.no_grad():
        dense.weight_1[3] = 7
    names.add(tuning_folder(dense))
    assert len(names) == 6


def test_a_search_has_another_name_if_anything_that_it_depends_on_is_another(dense):
    def name(rows=(ROWS, ROWS + 1), fingerprint="f", **recipe):
        config = CLPConfig(**{"pruning_ratio": 0.25, **recipe}).to_dict()
        return resume.search_journal(dense, fingerprint, config, rows, "cache")

    same = {
        name(),
        name(quantization={"method": "rtn"}),
        name(tuning={"epochs": 9}),
        name(export={"enabled": False}),
        name(evaluation={"generation": False}),
        # the rows stand for the text
        name(calibration={"dataset": "elsewhere.txt"}),
    }
    assert len(same) == 1
    others = {
        name(seed=1),
        name(pruning_ratio=0.5),
        name(num_segments=2),
        name(search={"batch_size": 3}),
        name(rows=(ROWS, ROWS + 2)),
        name(fingerprint="g"),
    }
    assert len(others | same) == 7


def test_weights_that_are_not_in_memory_have_no_name(dense):
    assert resume.weights_fingerprint(dense.to("meta"), quiet=True) is None
    assert resume.search_journal(dense, None, {}, (ROWS,), None) is None
    assert tuning_folder(dense) is None


def test_caches_stay_until_the_run_has_ended_and_after_a_failure(tmp_path):
    caches, journal, folder = resume.Caches(), tmp_path / "kept" / "search.jsonl", tmp_path / "kept" / "tuning"
    with pytest.raises(RuntimeError), caches.run():
        resume.Journal(caches.take(journal)).recall("key", lambda: 1)
        raise RuntimeError
    assert [path.name for path in journal.parent.iterdir()] == ["search.jsonl"]
    with caches.run():
        with caches.run():
            assert resume.Journal(caches.take(journal)).known
        with caches.run():
            assert caches.take(folder, folder=True) == folder and folder.is_dir()
        names = {"search.jsonl", "search.jsonl.lock", "tuning", "tuning.lock"}
        assert {path.name for path in journal.parent.iterdir()} == names
    assert list(journal.parent.iterdir()) == []
    assert caches.take(None) is None


def test_a_cache_that_cannot_be_made_costs_only_the_resumption(tmp_path):
    (tmp_path / "file").write_text("")
    caches = resume.Caches()
    with caches.run(), notice("cannot be written .*: this run cannot be resumed"):
        assert caches.take(tmp_path / "file" / "tuning", folder=True) is None


def test_a_journal_takes_nothing_from_another_place_and_nothing_that_was_changed(tmp_path):
    file, other = tmp_path / "search-a.jsonl", tmp_path / "search-b.jsonl"
    for key in range(3):
        resume.Journal(file).recall(key, lambda: 0.1)
    assert file.stat().st_mode & 0o777 == 0o600
    whole = file.read_bytes()
    other.write_bytes(whole)
    with notice("is damaged .3 of its 3 records are not what was written.: what is missing is"):
        assert resume.Journal(other).known == {}
    for place in range(whole.index(b"\n") + 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with notice("is damaged"):
            assert len(resume.Journal(file).known) in (1, 2)
        assert resume.Journal(file).recall(0, lambda: 0.1) == 0.1


def test_a_line_that_was_cut_off_is_no_damage_and_the_next_one_is_whole(tmp_path):
    file = tmp_path / "search.jsonl"
    for key in range(2):
        resume.Journal(file).recall(key, lambda: 0.1)
    for end in (b"abc", b"abc {"):
        file.write_bytes(file.read_bytes() + end)
        assert len(resume.Journal(file).known) == 2
    file.write_bytes(file.read_bytes()[:-1])
    resume.Journal(file).recall(2, lambda: 0.2)
    assert len(resume.Journal(file).known) == 3


def test_without_a_home_folder_nothing_is_kept(dense, monkeypatch):
    def missing(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(resume.Path, "expanduser", missing)
    with notice("There is no home folder: nothing is kept, .* Set calibration.cache_dir"):
        assert resume.search_journal(dense, "f", {}, (ROWS,), None) is None
