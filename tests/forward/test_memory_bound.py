import re

import pytest
import torch
from tiny_models import random_tokens, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from optimum_clp import CLPConfig, CLPPruner
from optimum_clp.errors import ConfigurationError
from optimum_clp.forward import memory_bound
from optimum_clp.forward.layer_major import Residence
from optimum_clp.forward.memory_bound import PassMemory, disk_speed, pass_memory, residence_under

MIB = 2**20
LARGE = {"hidden_size": 128, "intermediate_size": 512, "num_layers": 12}


@pytest.fixture
def mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_bound, "private_memory", lambda: 300 * MIB)
    tiny_model(**LARGE).save_pretrained(tmp_path / "dense")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto").eval()


def test_the_parts_are_the_weights_of_the_file(mapped, tmp_path):
    needs = pass_memory(mapped, 32)
    layer = sum(p.nbytes for p in mapped.model.layers[0].parameters())
    assert needs.layers == (layer,) * 12 and needs.private == 300 * MIB
    assert needs.weights == sum(p.nbytes for p in mapped.parameters())
    assert needs.resident - needs.smallest == 11 * layer + needs.plain - needs.least
    with torch.device("meta"):
        planned = AutoModelForCausalLM.from_config(mapped.config)
    assert pass_memory(planned, 32).weights == needs.weights


def test_a_bound_is_shared_between_layers_and_what_is_computed():
    needs = PassMemory(private=300, layers=(10,) * 8, around=20, least=5, plain=50)
    assert needs.smallest == 335 and needs.resident == 450
    assert needs.residence(450, None) is None
    assert needs.residence(335, None) == Residence(1, 0, 5)
    assert needs.residence(400, None) == Residence(4, 17.5, 22.5)
    assert needs.residence(449, None) == Residence(6, 32, 37)
    assert PassMemory(300, (0,) * 8, 0, 5, 50).residence(1, None) is None  # nothing to let go


def test_a_bound_that_is_too_small_says_what_would_do(mapped):
    smallest = -(-pass_memory(mapped, 32).smallest // MIB)
    rule = "this process itself holds 0.29 GiB, a layer is 0.00 GiB, and what is around the layers 0.00 GiB"
    with pytest.raises(ConfigurationError, match=re.escape(f"{rule}. Give at least {smallest}MiB.")):
        residence_under(100 * MIB, mapped, 32)
    assert residence_under(smallest * MIB, mapped, 32)[1].layers == 1
    own = tiny_model()
    with pytest.raises(
        ConfigurationError, match="with weights that lie in no file and cannot be let go. Give at least 30"
    ):
        residence_under(100 * MIB, own, 32)
    assert residence_under(400 * MIB, own, 32)[1] is None


def test_without_a_bound_it_is_what_is_free(mapped, monkeypatch):
    assert residence_under(None, mapped, 32)[1] is None
    monkeypatch.setattr(memory_bound, "free_memory", lambda: 0)
    assert residence_under(None, mapped, 32)[1] == Residence(1, 0, pass_memory(mapped, 32).least)


def test_free_memory_is_the_containers_if_that_is_less(monkeypatch):
    monkeypatch.setattr(memory_bound, "private_memory", lambda: 300)
    monkeypatch.setattr(memory_bound, "free_in_control_groups", lambda private: 1000 - private)
    assert memory_bound.free_memory() == 700
    monkeypatch.setattr(memory_bound, "free_in_control_groups", lambda private: float("inf"))
    assert 700 < memory_bound.free_memory() <= memory_bound.psutil.virtual_memory().total


def test_a_disk_has_a_speed(tmp_path):
    (tmp_path / "file").write_bytes(bytes(MIB))
    assert disk_speed(tmp_path / "file") > 0
    assert disk_speed(tmp_path / "none") is None


def test_a_whole_search_under_a_bound_finds_what_one_without_finds(mapped, tmp_path, capsys):
    bound = pass_memory(mapped, 16).smallest + MIB
    options = {"search": {"num_sequences": 8, "batch_size": 2}, "tuning": {"enabled": False}}
    text = {"dataset": [" ".join(f"w{i}" for i in row) for row in random_tokens(40, 30).tolist()]}
    text |= {
        "sequence_length": 16,
        "train_sequences": 8,
        "self_written_share": 0.0,
        "cache_dir": str(tmp_path / "cache"),
    }
    results = []
    for max_memory in (None, bound):
        recipe = CLPConfig(
            max_memory=max_memory, calibration={**text, "test_sequences": 4, "validation_sequences": 4}, **options
        )
        pruner = CLPPruner(mapped, tiny_tokenizer(), recipe)
        results.append(pruner.search())
        figures = pruner.evaluate(generation=False)
        results[-1] = results[-1], figures
    (plain, plain_figures), (bounded, bounded_figures) = results
    assert bounded == plain
    assert bounded_figures == pytest.approx(plain_figures, rel=1e-6)
    said = capsys.readouterr().err
    assert re.search(
        r"search: layer by layer, \d+ of 12 in memory at a time, at most 0.\d\d GiB; each reading of the weights is",
        said,
    )


def test_prune_says_before_any_work_that_a_bound_is_too_small(mapped, tmp_path):
    """Tuning takes more than a pass: what is enough for the search is not enough for the run."""
    pruner = CLPPruner(mapped, tiny_tokenizer(), quiet=True)
    recipe = CLPConfig(max_memory=pass_memory(mapped, 128).smallest + MIB)
    with pytest.raises(
        ConfigurationError, match=r"this process and its largest stage take 0\.\d\d GiB\. Give at least \d+MiB\."
    ):
        pruner.prune(recipe, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"] and pruner.report.search is None
