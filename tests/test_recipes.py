"""The recipes of well-known models: each is read, dry-run on its model's shape, and says what comes of it."""

import json
import re

import pytest
from page_blocks import ROOT

from optimum_clp import CLPConfig
from optimum_clp.commands.clp import main
from optimum_clp.model_files import check_model_file

RECIPES = sorted(ROOT.glob("recipes/*.yaml"))
SHAPES = json.loads((ROOT / "docs" / "recipe_shapes.json").read_text(encoding="utf-8"))
FAMILIES = {
    "meta-llama/Llama-3.1-8B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct",
    *(f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B")),
    *(f"HuggingFaceTB/SmolLM2-{size}-Instruct" for size in ("135M", "360M", "1.7B")),
    *(f"google/gemma-3-{size}-it" for size in ("1b", "4b")),
    "microsoft/Phi-4-mini-instruct",
}


def model_of(text):
    return re.match(r"# Recipe for (\S+), written by", text)[1]


def said(text):
    """What a recipe's head says that it gives."""
    return re.findall(r"^# ((?:Dense:|It gives:|ONNX files:|The int4 file has|Tuning holds).*)$", text, re.MULTILINE)


def test_there_is_one_for_every_model():
    assert {model_of(path.read_text(encoding="utf-8")) for path in RECIPES} == FAMILIES == set(SHAPES)
    assert len(RECIPES) == len(FAMILIES)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_keep_to_the_schema(name):
    check_model_file("config.json", SHAPES[name]["config"], name)
    assert "litgpt" in SHAPES[name]["source"], "where it was checked"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_gives_what_it_says(path, tmp_path, monkeypatch, capsys):
    """Its dry run, on the shape that lies in this repository; written again it has the same head."""
    text = path.read_text(encoding="utf-8")
    name = model_of(text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "config.json").write_text(json.dumps(SHAPES[name]["config"]))
    assert main(["recipe", name, "--config", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    plan, config = found["plan"], CLPConfig.from_file(path)
    base, gone = plan["base_model"], plan["num_removed"]
    assert base["num_parameters"] == SHAPES[name]["num_parameters"]
    assert CLPConfig.from_dict(found["recipe"]) == config
    lines = said(text)
    assert f"Dense: {base['num_layers']} layers" in lines[0]
    assert f"It gives: {base['num_layers'] - gone} layers" in lines[1]
    largest = max(cut["onnx"]["int4"] for cut in plan["cuts"])
    shown = float(re.search(r"int4 ([\d.]+) [GM]B", lines[2])[1]) * (1e9 if "GB, and a graph" in lines[2] else 1e6)
    assert shown == pytest.approx(largest, rel=2e-3)
    if config.target_size_mb is not None:
        assert 0.97e6 * config.target_size_mb <= largest <= 1e6 * config.target_size_mb
        assert f"{plan['size_target']['bits_per_weight']:.2f} bits for each weight" in lines[3]
        assert gone / base["num_layers"] < 0.25
    peak = max(cut["tuning"]["total"] for cut in plan["cuts"])
    assert float(re.search(r"about ([\d.]+) GB", lines[-1])[1]) == pytest.approx(peak / 1e9, rel=1e-2)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_whether_it_was_run(path):
    text = path.read_text(encoding="utf-8")
    assert f"--config recipes/{path.name} OUTPUT" in text
    was_run = "Run once" in text
    assert was_run == (path.stem == "smollm2-135m-instruct") and was_run != ("# Dry run only" in text)
