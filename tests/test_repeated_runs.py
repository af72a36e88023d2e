"""The recipe of an output folder repeats the run: the same weights, from text that is written anew."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_identity, tiny_model, tiny_tokenizer

from optimum_clp import CLPConfig
from optimum_clp.commands.clp import main
from optimum_clp.session import Session

SMALL = {
    "calibration": {
        "sequence_length": 24,
        "train_sequences": 16,
        "validation_sequences": 4,
        "test_sequences": 4,
        "generation_batch_size": 8,
    },
    "search": {"num_sequences": 8},
    "tuning": {"epochs": 1, "hidden_epochs": 2, "batch_size": 4, "learning_rate": 3e-3},
    "quantization": {"weights": ["int4"], "calibration_sequences": 4},
    "export": {"enabled": False},
    "evaluation": {"generation": False},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Two of its layers do nothing, so that a quality budget lets them go."""
    folder = tmp_path_factory.mktemp("dense")
    make_identity(tiny_model(tie_word_embeddings=True), (2, 3)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _few_repeats(monkeypatch):
    monkeypatch.setattr("optimum_clp.evaluation.outcome.NEW_TOKENS", 3)


def run(place, dense, config, name):
    """A run with a cache of its own."""
    line = [
        "prune",
        "--quiet",
        "-m",
        str(dense),
        "--config",
        str(config),
        "--text-cache-dir",
        str(place / f"cache-{name}"),
    ]
    assert main([*line, str(place / name)]) == 0
    return place / name


def repeated(place, dense, **settings):
    """The folders of a run and of one by the first one's recipe."""
    config = CLPConfig(**{key: SMALL.get(key, {}) | value if isinstance(value, dict) else value
                          for key, value in {**SMALL, **settings}.items()})  # fmt: skip
    config.save_pretrained(place / "asked")
    first = run(place, dense, place / "asked", "first")
    shutil.rmtree(place / "cache-first", ignore_errors=True)
    return first, run(place, dense, first / "clp_config.json", "second")


def check_equal(first, second):
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def report_of(folder):
    return json.loads((folder / "clp_report.json").read_text())


@pytest.mark.parametrize(
    "settings",
    [
        {"pruning_ratio": 0.5, "seed": 7},
        pytest.param({"pruning_ratio": "auto", "max_perplexity_increase": 3.0}, marks=pytest.mark.slow),
        pytest.param(
            {"pruning_ratio": 0.5, "num_segments": 2, "calibration": {"dataset": ["w5 w6 w7 w8 w9 " * 600]}},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "pruning_ratio": 0.5,
                "tuning": {"on_policy_rounds": 1, "on_policy_sequences": 8, "init": "least_squares"},
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["ratio", "auto", "given text", "on policy"],
)
def test_a_recipe_repeats_the_run(settings, dense, tmp_path):
    first, second = repeated(tmp_path, dense, **settings)
    check_equal(first, second)
    assert report_of(first)["tuning"]["improved"], "what was tuned is what is compared"
    assert report_of(first)["cut"]["removed_layers"] == report_of(second)["cut"]["removed_layers"]


@pytest.mark.slow
@pytest.mark.notices  # of so small a model the matrices are too coarse
def test_a_recipe_with_a_size_target_repeats_weights_and_files(dense, tmp_path):
    settings = {"target_size_mb": 0.08, "export": {"enabled": True}}
    first, second = repeated(tmp_path, dense, **settings)
    check_equal(first, second)
    assert (first / "onnx/model_q4.onnx").read_bytes() == (second / "onnx/model_q4.onnx").read_bytes()
    assert json.loads((second / "clp_config.json").read_text())["target_size_mb"] == 0.08
    size = report_of(first)["export"]["size_target"]
    assert size == report_of(second)["export"]["size_target"]
    assert size["bytes"] == (first / "onnx/model_q4.onnx").stat().st_size <= 80_000
    assert f"was to have 0.08 MB, and has {size['bytes'] / 1e3:.2f} kB" in (first / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("on_policy", [0, 1])
def test_a_recipe_with_a_time_budget_repeats_what_the_time_has_bought(on_policy, dense, tmp_path):
    more = {"on_policy_rounds": on_policy, "on_policy_sequences": 8}
    first, second = repeated(tmp_path, dense, pruning_ratio=0.5, budget=15, tuning=more)
    recipe = CLPConfig.from_file(first)
    assert (recipe.budget, recipe.tuning.on_policy_rounds) == (None, on_policy)
    assert recipe.calibration.train_sequences > 16, "more than the first pilot"
    check_equal(first, second)
    assert CLPConfig.from_file(second) == CLPConfig.from_dict(
        recipe.to_dict() | {"calibration": vars(recipe.calibration) | {"cache_dir": str(tmp_path / "cache-second")}}
    )


def test_a_folder_of_little_time_keeps_its_budget(tmp_path):
    session = Session(tiny_model(), config=CLPConfig(budget="20min"))
    assert session.repeatable().budget == "20min", "nothing was tuned yet"
    session.report.tuning = {"on_policy": []}
    for rows, budget in ((16, "20min"), (32, None)):
        session.train_rows = rows
        found = session.repeatable()
        assert found.budget == budget and session.config.budget == "20min"
    assert found.calibration.train_sequences == 32
