import json
import subprocess
import sys

import pytest

from optimum_clp import CLPConfig
from optimum_clp.commands.clp import main
from optimum_clp.configuration.recipe_files import read_recipe
from optimum_clp.errors import ConfigurationError

YAML = """\
# as many layers as this
pruning_ratio: 0.25
seed: 3
tuning:
  learning_rate: 1e-4  # a string in YAML 1.1
  mixed_precision: no
  loss: {kd: 0.9, ce: 0.1}
quantization:
  weights: [int4]
export:
  # nothing is set here
"""
SAME = {
    "pruning_ratio": 0.25,
    "seed": 3,
    "tuning": {"learning_rate": 1e-4, "mixed_precision": "no", "loss": {"kd": 0.9, "ce": 0.1}},
    "quantization": {"weights": ["int4"]},
}


def write(folder, name, content):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def refusal(file, name="clp_config.json"):
    with pytest.raises(ConfigurationError) as error:
        read_recipe(file, name)
    return str(error.value)


@pytest.mark.parametrize("name", ["r.yaml", "r.YML", "r", "r.txt"])
def test_yaml_is_the_recipe_that_json_is(tmp_path, name):
    file = write(tmp_path, name, YAML)
    assert CLPConfig.from_file(file) == CLPConfig(**SAME)
    assert CLPConfig.from_pretrained(str(file)) == CLPConfig(**SAME)
    assert CLPConfig.from_file(file, seed=9).seed == 9


@pytest.mark.parametrize("name", ["r.json", "r", "r.txt", "r.yaml"])
def test_json_may_be_called_anything(tmp_path, name):
    # of JSON that is called YAML it is as YAML that it is read
    assert CLPConfig.from_file(write(tmp_path, name, json.dumps(SAME))) == CLPConfig(**SAME)


def test_a_folder_stands_for_the_recipe_in_it(tmp_path):
    CLPConfig(0.3, seed=5).save_pretrained(tmp_path)
    assert CLPConfig.from_file(tmp_path) == CLPConfig(0.3, seed=5)


def test_all_of_a_recipe_can_be_said_in_yaml(tmp_path):
    config = CLPConfig(
        "auto", min_retention=0.8, budget="1h30min", max_memory="24GiB", calibration={"dataset": ["a", "#"]}
    )
    import yaml

    file = write(tmp_path, "r.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
    assert CLPConfig.from_file(file) == config


WRONG = [
    ({"serch": {}, "seed": -1}, ["serch is {}: this version of CLPConfig has no such key", "seed is -1: it must be"]),
    ({"tuning": {"epoch": 3}}, ["tuning.epoch is 3: TuningConfig has no such key. Did you mean 'epochs'?"]),
    ({"tuning": {"enabled": "no"}}, ["tuning.enabled is 'no': it must be True or False"]),
    ({"tuning": []}, ["tuning is []: it must be a TuningConfig or a dict"]),
    ({"budget": "1:30"}, ["budget is '1:30': it must be a length of time above 0"]),
    ({"calibration": {"train_sequences": "1_000"}}, ["train_sequences is '1_000': it must be a whole number"]),
]


@pytest.mark.parametrize(("values", "said"), WRONG)
def test_both_forms_have_the_same_errors(tmp_path, values, said):
    import yaml

    texts = set()
    for name, content in (("r.json", json.dumps(values)), ("r.yaml", yaml.safe_dump(values))):
        with pytest.raises(ConfigurationError) as error:
            CLPConfig.from_file(write(tmp_path, name, content))
        texts.add(str(error.value))
    (text,) = texts
    assert all(each in text for each in said)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("r.json", '{"seed": 1, "seed": 2}', "it has the key 'seed' twice"),
        ("r.json", '{"tuning": {"epochs": 1, "epochs": 1}}', "it has the key 'epochs' twice"),
        ("r.yaml", "seed: 1\nseed: 2\n", "it has the key 'seed' twice (line 2, column 1)"),
        ("r.json", "[]", "it holds no settings"),
        ("r.yaml", "- a\n", "it holds no settings"),
        ("r.yaml", "# nothing\n", "it holds no settings"),
        ("r.yaml", "some words\n", "it holds no settings"),
        ("r.json", "seed: 1", "it is not valid JSON (Expecting value: line 1 column 1"),
        ("r.yaml", "seed: [1\n", "it is not valid YAML (line 2, column 1"),
        ("r.yaml", "a: " + "[" * 70 + "]" * 70, "it is nested too deep"),
        ("r.yaml", b"#" * (2**20 + 1), "it has 1048577 bytes, and at most 1048576 are read as YAML; JSON may have more"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_told(tmp_path, name, content, said):
    text = refusal(write(tmp_path, name, content), "--config")
    assert text.startswith(f"--config is '{tmp_path / name}': {said}")
    assert text.endswith("Give a clp_config.json, a recipe in YAML, or the folder of a run.")


def test_a_file_that_is_not_there(tmp_path):
    assert "it cannot be read (No such file or directory)" in refusal(tmp_path / "gone.yaml")
    assert "it cannot be read (No such file or directory)" in refusal(tmp_path)


def test_the_command_line_takes_yaml(tmp_path, capsys):
    file = write(tmp_path, "r.yaml", YAML + "serch: 1\n")
    assert main(["prune", "-m", "m", "--config", str(file), str(tmp_path / "out")]) == 1
    assert "serch is 1: this version of CLPConfig has no such key" in capsys.readouterr().err


def test_a_recipe_is_read_without_torch():
    code = "import sys, optimum_clp.configuration.yaml_text, optimum_clp.configuration.recipe_files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
