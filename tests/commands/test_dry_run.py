"""`prune --dry-run`: a table or one JSON object from `config.json` alone, and nothing written."""

import json
import re

import pytest
from hub_cache import put_into_cache
from tiny_models import tiny_config
from transformers import AutoConfig, BertConfig, T5Config

from optimum_clp import CLPConfig, plan_pruning
from optimum_clp.commands.clp import main
from optimum_clp.commands.prune import planned


@pytest.fixture
def folder(pruner, tmp_path):
    """A folder with nothing but `config.json`; the pruner's class is a fake that must not be called."""
    tiny_config("llama", 6, dtype="bfloat16").save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").unlink(missing_ok=True)
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["config.json"]
    yield tmp_path / "m"
    assert pruner.calls == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"], "nothing is written"


def error_of(capsys):
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    (line,) = [line for line in captured.err.splitlines() if line.startswith("optimum-clp: error: ")]
    return line


def test_json_is_the_plan(folder, capsys):
    assert main(["prune", "--model", str(folder), "--pruning-ratio", "0.34", "--dry-run", "--json"]) == 0
    plan = plan_pruning(AutoConfig.from_pretrained(folder), CLPConfig(0.34))
    assert json.loads(capsys.readouterr().out) == plan.to_dict()
    assert plan.to_dict()["base_model"]["name_or_path"] == str(folder)
    assert [cut["start"] for cut in plan.to_dict()["cuts"]] == [0, 1, 2, 3, 4]


def test_a_model_of_the_hub_is_planned_from_the_cache_that_is_named(folder, tmp_path_factory, capsys):
    cache = tmp_path_factory.mktemp("hub")
    put_into_cache(folder, cache, "acme/tiny")
    assert main("prune -m acme/tiny --dry-run".split()) == 1
    assert "the Hugging Face Hub could not be reached" in error_of(capsys)
    assert main(f"prune -m acme/tiny --model-cache-dir {cache} --dry-run --json".split()) == 0
    assert json.loads(capsys.readouterr().out)["base_model"]["num_layers"] == 6


def test_table_is_for_people(folder, capsys):
    assert main(["prune", "--model", str(folder), "--pruning-ratio", "0.34", "--dry-run", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "LlamaForCausalLM in bfloat16: 2 of 6 layers would go. 5 segments can: 0:2 to 4:6."
    # 2 * 97 * 32 + 32 outside the layers, 2 * 32 * (64 + 32) + 3 * 32 * 56 + 2 * 32 in each
    assert re.fullmatch(r"dense +6 +75\.74 k +151\.49 kB", lines[2])
    assert re.fullmatch(r"a layer +1 +11\.58 k +23\.17 kB", lines[3])
    assert re.fullmatch(r"cut +4 +52\.58 k +105\.15 kB", lines[4])
    assert [line.split()[:2] for line in lines[5:8]] == [["ONNX", "float32"], ["ONNX", "int8"], ["ONNX", "int4"]]
    assert lines[9] == "Endpoint tuning holds at its peak"
    assert re.fullmatch(r"together +about .* to .* MB", lines[14])
    assert lines[-1] == "No weight was read, and nothing was written."
    line = f"prune --model {folder} --pruning-ratio 0.34 --init least_squares --dry-run out"
    assert main(line.split()) == 0
    assert re.match(r"the closed-form start, before +about ", capsys.readouterr().out.splitlines()[12])


def test_options_change_the_plan(folder, capsys):
    line = f"prune --model {folder} --dtype float32 --no-tune --weights int4 --group-size 16 --dry-run --json --quiet"
    assert main(line.split()) == 0
    captured = capsys.readouterr()
    plan = json.loads(captured.out)
    assert captured.err == ""
    assert plan["base_model"]["dtype"] == "float32"
    assert plan["cuts"][0]["tuning"] is None
    assert list(plan["cuts"][0]["onnx"]) == ["float32", "int4"]
    assert main(f"prune --model {folder} --no-export --no-tune --dry-run".split()) == 0
    shown = capsys.readouterr().out
    assert "ONNX" not in shown and "tuning" not in shown


def test_segments_that_cannot_go_leave_gaps():
    plan = plan_pruning(tiny_config("llama", 6), CLPConfig(0.34)).to_dict()
    plan["cuts"] = [plan["cuts"][i] for i in (0, 2, 3, 4)]
    plan["cuts"][0]["num_parameters"] = 50_000
    shown = planned(plan)
    assert "4 segments can: 0:2, 2:4 to 4:6." in shown
    assert "50.00 k to 52.58 k" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--pruning-ratio 0.01", r"pruning_ratio is 0.01: it removes none of the model's 6 layers\."),
        ("--epochs 0", r"tuning.epochs is 0: "),
        ("--dtype int8", r"dtype is 'int8': it must be a floating-point type of torch, or auto\."),
        ("m", r"output folder is 'm': it is not empty"),
    ],
)
def test_bad_option_is_one_message(options, message, folder, capsys):
    assert main(["prune", "--model", "m", "--dry-run", *options.split()]) == 1
    assert re.search(message, error_of(capsys))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "model is 'm': the folder has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "model is 'm': its config.json is malformed"),
        (lambda folder: BertConfig().save_pretrained(folder), "model_type is 'bert': "),
        (lambda folder: T5Config().save_pretrained(folder), "T5|t5"),
    ],
)
def test_bad_folder_is_one_message(write, message, folder, capsys):
    write(folder)
    assert main("prune --model m --dry-run".split()) == 1
    assert re.search(message, error_of(capsys))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("m/config.json", "model is 'm/config.json': it is a file, not a folder. Give the folder that holds"),
        ("./nowhere", "model is './nowhere': there is no such folder"),
        ("no where", "model is 'no where': there is no such folder, and it is not a valid Hub id"),
    ],
)
def test_no_such_model_is_one_message(model, message, folder, capsys):
    assert main(["prune", "--model", model, "--dry-run"]) == 1
    assert message in error_of(capsys)


def test_output_is_still_needed_without_dry_run(pruner, capsys):
    with pytest.raises(SystemExit) as stopped:
        main("prune --model m".split())
    assert stopped.value.code == 2
    assert "the following arguments are required: OUTPUT" in capsys.readouterr().err
