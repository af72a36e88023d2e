import re

import pytest

from optimum_clp import CLPConfig
from optimum_clp.configuration.recipe_text import DIALS, flow, recipe_yaml
from optimum_clp.configuration.stages import all_settings
from optimum_clp.configuration.yaml_text import parse_yaml

CONFIGS = {
    "defaults": CLPConfig(),
    "a ratio": CLPConfig(0.3, seed=7),
    "a size": CLPConfig(target_size_mb=60.5, quantization={"weights": ["int4"]}),
    "a budget of quality": CLPConfig("auto", min_retention=0.8, num_segments=2),
    "every stage": CLPConfig(
        0.25,
        budget="1h30min",
        max_memory="24GiB",
        calibration={
            "dataset": ["no", "1e-4", "a: b # c", "tab\there", "\u00e4\U0001f600\u2028 \x7f", " "],
            "mask": "assistant",
        },
        search={"strategy": "halving", "repair": "closed_form"},
        tuning={
            "learning_rate": 1e-5,
            "mixed_precision": "no",
            "loss": {"kd": 0.9, "ce": 0.1},
            "report_to": ["wandb"],
        },
        quantization={"method": "rtn", "quantize_embeddings": False},
        export={"format": "qdq", "tolerance": 3e-4},
        evaluation={"tasks": ["piqa=my files/p.jsonl"], "texts": ["c4", "org/set:config:split"], "task_limit": 5},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_again(name, tmp_path):
    config = CONFIGS[name]
    (tmp_path / "r.yaml").write_text(recipe_yaml(config, ["Two lines", "", "  of comment"]), encoding="utf-8")
    assert CLPConfig.from_file(tmp_path / "r.yaml") == config


@pytest.mark.parametrize("name", CONFIGS)
def test_only_what_differs_is_set_and_every_line_has_its_help(name):
    config, text = CONFIGS[name], recipe_yaml(CONFIGS[name])
    values, settings = parse_yaml(text.encode()), all_settings()
    found = {k for k, v in values.items() if not isinstance(v, dict) and k in settings}
    found |= {f"{stage}.{key}" for stage, inner in values.items() if isinstance(inner, dict) for key in inner}
    whole, default = config.to_dict(), CLPConfig().to_dict()
    differ = {k for k in whole if k in settings and whole[k] != default[k] and whole[k] is not None}
    differ |= {
        f"{s}.{k}" for s in whole if isinstance(whole[s], dict) for k in whole[s] if whole[s][k] != default[s][k]
    }
    assert found == differ | ({"pruning_ratio"} if config.target_size_mb is None else set())
    for line in text.splitlines():
        assert not line.strip() or re.fullmatch(r"\w+:|( *)(# )?\w+: .+  # [^\n]+", line), line


def test_every_dial_can_be_turned_by_taking_its_sign_away():
    text = recipe_yaml(CLPConfig())
    for name, value in DIALS.items():
        stage, _, key = name.rpartition(".")
        line = re.compile(rf"^({'  ' if stage else ''})# ({key}: )", re.MULTILINE)
        assert len(line.findall(text)) == 1, name
        config = CLPConfig.from_dict(parse_yaml(line.sub(r"\1\2", text, count=1).encode()))
        assert getattr(getattr(config, stage) if stage else config, key) == value
        assert config != CLPConfig()


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\x85", "\u2028"])
def test_a_name_with_a_line_end_in_it_sets_nothing(end):
    text = recipe_yaml(CLPConfig(0.3), [f"of a{end}seed: 7"])
    assert parse_yaml(text.encode()) == parse_yaml(recipe_yaml(CLPConfig(0.3)).encode())
    assert text.startswith("# of a\n# seed: 7\n")


def test_dials_that_something_else_turns_are_left_out():
    assert "bits_per_weight" not in recipe_yaml(CLPConfig(target_size_mb=60))
    assert "pruning_ratio" not in recipe_yaml(CLPConfig(target_size_mb=60))
    assert "train_sequences:" not in recipe_yaml(CLPConfig(budget="20min"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (60.0, "60"),
        (1e-4, "0.0001"),
        (2.0**60, "1.152921504606847e+18"),
        (True, "true"),
        (None, "null"),
        ("no", "no"),
        ("true", '"true"'),
        ("1e-4", '"1e-4"'),
        ("012", '"012"'),
        ("24GiB", "24GiB"),
        ("c4", "c4"),
        ("a b", '"a b"'),
        ("a: b", '"a: b"'),
        ("", '""'),
        (["int4", 1], "[int4, 1]"),
        ({"kd": 0.9}, "{kd: 0.9}"),
        ("a,b", '"a,b"'),
        ("org/set:config:split", "org/set:config:split"),
    ],
)
def test_values_are_written_as_short_as_they_can_be_read(value, text):
    assert flow(value) == text
    assert parse_yaml(text.encode()) == value
