"""What the commands print, letter by letter: `printed.txt` holds the text of each case below its name."""

import math
from pathlib import Path

import pytest
from report_example import example_report, older_report

from optimum_clp.commands.clp import main
from optimum_clp.commands.evaluate import task_table
from optimum_clp.commands.prune import planned
from optimum_clp.commands.search import scored_segments
from optimum_clp.report.model_card import write_model_card

PRINTED = dict(
    part.split("\n", 1)
    for part in (Path(__file__).parent / "printed.txt").read_text(encoding="utf-8").split("=== ")[1:]
)
SIZE = {"target_size_mb": 0.07, "num_removed": 2, "bits_per_weight": 4.6543, "bytes": 69_900}
COMMANDS = {
    "prune": "prune --model m out",
    "search": "search --model m out",
    "tune": "tune --model cut out",
    "export": "export --model cut out",
    "quantize": "quantize --model cut --weights int4 out",
    "evaluate": "evaluate --model cut --reference dense",
    "evaluate tasks": "evaluate --model m --dataset d.txt --tasks lambada=t.jsonl any=t.jsonl --reference dense",
}
SPEED = {
    "target_tokens_per_second": 90,
    "num_removed": 3,
    "tokens_per_second": 91.234,
    "dense_tokens_per_second": 60.5,
    "threads": 1,
}
FORM = {
    "group_size": 64,
    "accuracy_level": 4,
    "head_bits": 4,
    "speed": 1.067,
    "prompt_speed": 1.1,
    "decode_speed": 1.06,
    "threads": 2,
}
PLAN = {
    "size_target": None,
    "speed_target": None,
    "speed_choice": None,
    "base_model": {
        "class": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "num_layers": 6,
        "num_parameters": 75_744,
        "bytes": 151_488,
        "layer_parameters": [11_584, 11_584, 10_000, 11_584, 11_584, 11_584],
        "layer_bytes": [23_168, 23_168, 20_000, 23_168, 23_168, 23_168],
        "layer_period": None,
    },
    "num_removed": 2,
    "memory": {"max_memory": None},
    "cuts": [
        {
            "start": start,
            "stop": start + 2,
            "num_parameters": 52_576 + start,
            "bytes": 105_152,
            "follows_type_rule": True,
            "onnx": {"float32": 210_304, "int8": 70_000 + 900 * start},
            "tuning": {
                "weights": 151_488,
                "endpoints": 40_000,
                "masters": 80_000,
                "gradients": 80_000,
                "moments": 160_000,
                "closed_form": 5_000_000,
                "caches": 2_500_000 * (start + 1),
                "activations": 300,
                "logits": 12_000,
                "total": 8_000_000_000,
            },
        }
        for start in (0, 2, 3)
    ],
}


MEMORY = {
    "max_memory": 24 * 10**9,
    "smallest": 3 * 10**9,
    "layers_at_once": 2,
    "readings": {"search": 3, "tuning": 1200},
    "bytes_read": 540 * 10**9,
    "seconds_read": 180.0,
}
SHORT_PLAN = {**PLAN, "cuts": [{**PLAN["cuts"][0], "tuning": None, "onnx": {}}]}


def _search_of_everything() -> dict:
    search = example_report().search
    first = {
        **search["scored"][0],
        "kl": math.nan,
        "standard_error": None,
        "behind": None,
        "segments": [[0, 2], [4, 5]],
    }
    search["scored"] = [first, *search["scored"][1:], *(dict(entry, kl=3.0, behind=2.6) for entry in search["scored"])]
    search["lengths"] = [
        {"num_removed": n, "segments": [[7, 7 + n]], "perplexity_increase": increase, "fits": n < 4}
        for n, increase in ((3, 0.081), (4, 12.5), (8, math.inf))
    ]
    return search


def _scores() -> dict:
    some = {"name": "a", "accuracy": 0.5, "accuracy_stderr": None, "plain_accuracy": 0.25, "chance": 0.0}
    return {
        "a": {**some, "perplexity": 1234567.8, "num_examples": 1838},
        "longer": {**some, "name": "longer", "perplexity": 15.25, "num_examples": 2},
    }


def _scores_by_lm_eval() -> dict:
    file, written = _scores()["longer"], {"metrics": {"bleu,none": 31.25}, "perplexity": None, "accuracy": None}
    harness = {"metric": "acc_norm", "num_fewshot": 5}
    return {
        "mine": file,
        "arc": {**file, "name": "arc_easy", "perplexity": None, "metrics": {}, "lm_eval": harness},
        "wmt": {**file, "name": "wmt16", **written, "lm_eval": {"metric": "bleu", "num_fewshot": 0}},
    }


def _report_with_gaps():
    report = example_report()
    for row in report.evaluation["rows"]:
        row.update(perplexity=math.nan, kl=None)
    report.evaluation["rows"][0]["perplexity"] = 8.0
    return report


TEXTS = {
    "planned": lambda: planned(PLAN),
    "planned without tuning": lambda: planned(SHORT_PLAN),
    "planned for layers that alternate": lambda: planned(
        {
            **SHORT_PLAN,
            "base_model": {**PLAN["base_model"], "layer_period": 3},
            "cuts": [
                {**cut, "tuning": None, "onnx": {}, "follows_type_rule": cut["start"] > 1} for cut in PLAN["cuts"]
            ],
        }
    ),
    "planned for a size": lambda: planned({**SHORT_PLAN, "size_target": SIZE}),
    "planned for a size in given bits": lambda: planned(
        {**SHORT_PLAN, "size_target": SIZE | {"num_removed": 1, "bits_per_weight": None}}
    ),
    "planned for a speed": lambda: planned({**SHORT_PLAN, "speed_target": SPEED, "speed_choice": FORM}),
    "planned for both": lambda: planned({**SHORT_PLAN, "size_target": SIZE, "speed_target": SPEED}),
    "planned within a bound": lambda: planned({**SHORT_PLAN, "memory": MEMORY}),
    "planned within a wide bound": lambda: planned({**SHORT_PLAN, "memory": {**MEMORY, "layers_at_once": 6}}),
    "older search": lambda: scored_segments(older_report().search),
    "long search": lambda: scored_segments(_search_of_everything()),
    "tasks": lambda: task_table(_scores()),
    "tasks of lm-eval": lambda: task_table(_scores_by_lm_eval()),
    "table with gaps": lambda: _report_with_gaps().to_table(),
    "markdown with gaps": lambda: _report_with_gaps().to_table(markdown=True),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_prints_this_text(name, pruner, tmp_path, capsys):
    (tmp_path / "t.jsonl").write_text('{"context": "Once", "continuation": "upon"}\n')
    assert main(COMMANDS[name].split()) == 0
    assert capsys.readouterr().out == PRINTED[name]


@pytest.mark.parametrize("name", TEXTS)
def test_a_table_is_this_text(name):
    assert TEXTS[name]() + "\n" == PRINTED[name]


@pytest.mark.parametrize("name", ["files of a card", "files of a card without ONNX"])
def test_a_cards_list_of_files_is_this_text(name, tmp_path):
    from optimum_clp.configuration.clp_config import CLPConfig

    report = example_report()
    if name.endswith("without ONNX"):
        report.export = report.quantization = None
    else:
        report.export["files"][1]["max_relative_error"] = None
    report.base_model["name_or_path"] = None
    (tmp_path / "model.safetensors").write_bytes(b"x" * 2_500)
    card = write_model_card(report, CLPConfig(), tmp_path, model_name="name").read_text(encoding="utf-8")
    assert card.split("## Files\n\n")[1].split("\n\n")[0] + "\n" == PRINTED[name]


def test_every_text_is_compared():
    assert PRINTED.keys() == {*COMMANDS, *TEXTS, "files of a card", "files of a card without ONNX"}
