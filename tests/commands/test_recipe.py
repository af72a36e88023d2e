"""`recipe`: from a config alone, to a file or to standard output; and `prune` takes what it has written."""

import json
import shlex

import pytest
from tiny_models import tiny_config

from optimum_clp import CLPConfig
from optimum_clp.commands.clp import main
from optimum_clp.configuration.yaml_text import parse_yaml


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder with a config and no weights, in the current one."""
    monkeypatch.chdir(tmp_path)
    tiny_config(num_layers=6, hidden_size=256, intermediate_size=704).save_pretrained("some/model")
    return "some/model"


def printed(line, capsys, status=0):
    assert main(["recipe", *line.split()]) == status
    found = capsys.readouterr()
    return found.out if status == 0 else found.err


@pytest.mark.parametrize("given", ["{}", "-m {}", "--model {}", "{} --model-cache-dir hub"])
def test_a_recipe_is_printed(given, model, capsys):
    text = printed(given.format(model) + " --pruning-ratio 0.5 --weights int4", capsys)
    assert parse_yaml(text.encode())["pruning_ratio"] == 0.5
    assert text.startswith("# Recipe for some/model, written by `optimum-clp recipe`")
    assert "#     optimum-clp prune --model some/model --config recipe.yaml OUTPUT\n" in text
    assert "# Dense: 6 layers," in text and "# It gives: 3 layers," in text
    assert "  # group_size: 64  # weights that share one scale" in text


def test_it_says_what_the_dry_run_says(model, capsys):
    text = printed(f"{model} --target-size-mb 3", capsys)
    assert main(["prune", "-m", model, "--dry-run", "--json", "--target-size-mb", "3"]) == 0
    plan = json.loads(capsys.readouterr().out)
    (cut, *_) = plan["cuts"]
    assert f"# It gives: {6 - plan['num_removed']} layers" in text
    assert f"int4 {cut['onnx']['int4'] / 1e6:.2f} MB" in text
    assert f"# The int4 file has {plan['size_target']['bits_per_weight']:.2f} bits for each weight" in text
    assert printed(f"{model} --target-size-mb 0.1", capsys, 1).startswith("optimum-clp: error: target_size_mb is 0.1:")


def test_the_command_that_it_names_can_be_pasted(model, capsys, tmp_path):
    (tmp_path / "some model's").symlink_to(tmp_path / model)
    assert main(["recipe", "some model's", "-o", "a $(b).yaml"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(line)[3:6] == ["some model's", "--config", "a $(b).yaml"]
    assert line in (tmp_path / "a $(b).yaml").read_text()


def test_a_link_in_the_place_of_the_file_that_is_written_first_is_not_followed(model, capsys, tmp_path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / ".r.yaml.part").symlink_to(tmp_path / "precious")
    printed(f"{model} -o r.yaml", capsys)
    assert (tmp_path / "precious").read_text() == "x" and not (tmp_path / "r.yaml").is_symlink()


@pytest.mark.parametrize("name", ["a\0b.yaml", "\ud800.yaml", f"{'x' * 300}.yaml", "", "\udce9.yaml"])
def test_a_name_that_no_file_can_have(model, capsys, name):
    assert main(["recipe", model, "-o", name]) == 1
    assert capsys.readouterr().err.startswith("optimum-clp: error: FILE is ")


def test_a_file_is_written_once(model, capsys, tmp_path):
    said = printed(f"{model} --pruning-ratio 0.5 --budget 20min -o r.yaml", capsys)
    assert said == ("Written to r.yaml. It is run by\noptimum-clp prune --model some/model --config r.yaml OUTPUT\n")
    assert CLPConfig.from_file("r.yaml") == CLPConfig(0.5, budget="20min")
    before = (tmp_path / "r.yaml").read_text()
    assert "FILE is 'r.yaml': it is there already. Give another name, or --overwrite" in printed(
        f"{model} -o r.yaml", capsys, 1
    )
    assert (tmp_path / "r.yaml").read_text() == before
    printed(f"{model} --config r.yaml --seed 3 -o r.yaml --overwrite", capsys)
    assert CLPConfig.from_file("r.yaml") == CLPConfig(0.5, budget="20min", seed=3)
    assert {path.name for path in tmp_path.iterdir()} == {"some", "r.yaml"}


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("some", "it is a folder. Give the name of a file, such as recipe.yaml"),
        ("r.json", "a recipe is written as YAML, and its name says so. Let it end in .yaml"),
        ("gone/r.yaml", "its folder is not there. Make it first"),
    ],
)
def test_a_file_that_cannot_be_is_refused_before_any_work(file, said, model, capsys):
    assert f"FILE is '{file}': {said}" in printed(f"no/such/model -o {file}", capsys, 1)


def test_json_has_recipe_and_plan(model, capsys):
    found = json.loads(printed(f"{model} --json", capsys))
    assert CLPConfig.from_dict(found["recipe"]) == CLPConfig()
    assert found["plan"]["num_removed"] == 1 and found["file"] is None


def test_a_quality_budget_is_not_planned(model, capsys):
    text = printed(f"{model} --pruning-ratio auto --min-retention 0.8", capsys)
    assert "# How many layers go is found by the search." in text
    assert CLPConfig.from_dict(parse_yaml(text.encode())) == CLPConfig("auto", min_retention=0.8)


def test_a_recipe_of_json_becomes_one_of_yaml(model, capsys, tmp_path):
    config = CLPConfig(0.5, tuning={"learning_rate": 1e-4})
    config.save_pretrained(tmp_path)
    assert CLPConfig.from_dict(parse_yaml(printed(f"{model} --config .", capsys).encode())) == config


def test_prune_runs_what_was_written(model, capsys):
    printed(f"{model} --target-size-mb 3 --group-size 64 -o r.yaml", capsys)
    assert main(["prune", "-m", model, "--config", "r.yaml", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size_target"]["target_size_mb"] == 3


@pytest.mark.parametrize("line", ["", "a -m b"])
def test_one_model_is_named(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["recipe", *line.split()])
    assert stopped.value.code == 2 and "give one MODEL, alone or behind --model" in capsys.readouterr().err


def test_a_model_that_cannot_be_cut_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "num_hidden_layers": 4}')
    line = f"{tmp_path} --pruning-ratio auto --min-retention 0.8"
    assert "model_type is 'bert'" in printed(line, capsys, 1)
