import json
from unittest import mock

import pytest

from optimum_clp import CalibrationConfig, CLPConfig, TuningConfig
from optimum_clp.doors import LOSSES
from optimum_clp.errors import ConfigurationError


def test_one_dial_is_enough():
    config = CLPConfig(pruning_ratio=0.25)
    assert config.pruning_ratio == 0.25
    assert config.search.strategy == "auto"
    assert config.tuning.loss == "kd"
    assert config.calibration.dataset is None


def test_the_recipe_has_these_keys_and_defaults():
    recipe = CLPConfig().to_dict()
    versions = ("clp_version", "transformers_version", "optimum_version")
    assert tuple(recipe)[-3:] == versions
    assert list({k: v for k, v in recipe.items() if k not in versions}.items()) == [
        ("model_type", "clp"),
        ("pruning_ratio", 0.2),
        ("target_size_mb", None),
        ("target_tokens_per_second", None),
        ("num_segments", 1),
        ("max_perplexity_increase", None),
        ("min_retention", None),
        ("budget", None),
        ("max_memory", None),
        ("seed", 0),
        (
            "calibration",
            {
                "dataset": None,
                "self_written_share": 0.5,
                "conversation_share": 0.5,
                "openings_share": 0.5,
                "mask": "all",
                "text_column": "text",
                "sequence_length": 256,
                "train_sequences": 1024,
                "validation_sequences": 24,
                "test_sequences": 24,
                "temperature": 1.0,
                "generation_batch_size": 64,
                "cache_dir": None,
            },
        ),
        (
            "search",
            {
                "strategy": "auto",
                "num_sequences": 32,
                "batch_size": 8,
                "initial_steepness": 16.0,
                "num_rescored": 5,
                "repair": "none",
                "budget": 4.0,
            },
        ),
        (
            "tuning",
            {
                "enabled": True,
                "init": "none",
                "loss": "kd",
                "endpoint_width": 1,
                "overparametrization": "none",
                "train_final_norm": False,
                "train_head": False,
                "learning_rate": None,
                "tokens": None,
                "epochs": 1,
                "hidden_epochs": 6,
                "hidden_learning_rate": None,
                "hidden_batch_size": None,
                "on_policy_rounds": 0,
                "on_policy_sequences": 256,
                "batch_size": 8,
                "logit_share": 1.0,
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
            },
        ),
        (
            "quantization",
            {
                "weights": ["int8", "int4"],
                "method": "auto",
                "bits_per_weight": None,
                "six_bits": False,
                "calibration_sequences": 128,
                "scale_epochs": 1,
                "group_size": 32,
                "accuracy_level": 4,
                "head_bits": None,
                "tune_for": "size",
                "quantize_embeddings": True,
                "quanto": False,
            },
        ),
        (
            "export",
            {
                "enabled": True,
                "format": "contrib",
                "float_file": True,
                "opset": 21,
                "tolerance": 1e-4,
                "logits_to_keep": 0,
            },
        ),
        (
            "evaluation",
            {
                "generation": True,
                "prompts": None,
                "num_prompts": 32,
                "max_new_tokens": 128,
                "texts": [],
                "tasks": [],
                "task_limit": None,
                "num_fewshot": None,
                "apply_chat_template": False,
                "tasks_dir": None,
                "memory_context": 512,
                "require_retention": None,
                "require_generation": None,
            },
        ),
    ]


def test_json_round_trip(tmp_path):
    config = CLPConfig(
        0.3,
        seed=7,
        calibration_dataset=["one", "two"],
        tuning={"loss": {"kd": 0.5, "ce": 0.5}, "learning_rate": 1e-4},
        quantization={"weights": ["int4"]},
    )
    config.save_pretrained(tmp_path)
    assert CLPConfig.from_pretrained(tmp_path) == config
    saved = json.loads((tmp_path / "clp_config.json").read_text())
    assert saved["calibration"]["dataset"] == ["one", "two"]
    assert saved["tuning"]["loss"] == {"kd": 0.5, "ce": 0.5}


def test_from_dict_takes_overrides():
    assert CLPConfig.from_dict(CLPConfig(0.2).to_dict(), pruning_ratio=0.4).pruning_ratio == 0.4


def test_stage_objects_are_copied():
    tuning = TuningConfig(epochs=2)
    config = CLPConfig(tuning=tuning)
    config.tuning.epochs = 9
    assert tuning.epochs == 2


def test_every_mistake_is_reported_at_once():
    with pytest.raises(ConfigurationError) as error:
        CLPConfig(1.5, serch={}, ratio=0.2, tuning={"epoch": 3, "loss": "mse"}, quantization={"group_size": 48})
    text = str(error.value)
    assert text.startswith("6 problems:")
    assert "serch is {}: this version of CLPConfig has no such key. Did you mean 'search'?" in text
    assert "ratio is 0.2: this version of CLPConfig has no such key. Did you mean 'pruning_ratio'?" in text
    assert "tuning.epoch is 3: TuningConfig has no such key. Did you mean 'epochs'?" in text
    assert "pruning_ratio is 1.5: it must be a number between 0 and 1, both excluded" in text
    assert f"tuning.loss is 'mse': it must be {', '.join(map(repr, LOSSES))}, or weights" in text
    assert "quantization.group_size is 48: it must be one of 16, 32, 64, 128, 256" in text


def test_a_file_from_a_newer_version_advises_to_upgrade(tmp_path):
    values = CLPConfig().to_dict() | {"clp_version": "99.0", "tuning": {"magic": 1}}
    with pytest.raises(ConfigurationError, match="written by optimum-clp 99.0, this is .*: upgrade optimum-clp"):
        CLPConfig.from_dict(values)


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 2, float("nan"), "0.2", "all", True])
def test_ratios_outside_the_open_interval_are_refused(ratio):
    with pytest.raises(ConfigurationError, match="pruning_ratio is .*between 0 and 1, both excluded"):
        CLPConfig(ratio)


@pytest.mark.parametrize(
    ("stage", "key", "value", "message"),
    [
        ("calibration", "dataset", [], "it must be a file, a dataset name or a list of strings, or None"),
        ("calibration", "sequence_length", 4, "it must be a whole number from 8 to 16777216"),
        ("calibration", "temperature", 0, "it must be a number between 0.001 and 1000.0"),
        ("calibration", "text_column", "", "it must be a string that is not empty"),
        (
            "search",
            "strategy",
            "magic",
            "it must be one of 'auto', 'gate', 'exhaustive', 'halving', 'block_influence'",
        ),
        ("search", "budget", 0, "it must be a number above 0 and at most 1000000.0"),
        ("search", "num_rescored", 6, "it must be a whole number from 1 to 5"),
        ("tuning", "loss", {"kd": 0.0}, "weights from 0 to 1000000 for these, not all 0"),
        ("tuning", "enabled", 1, "it must be True or False"),
        ("tuning", "warmup_ratio", 1.5, "it must be a number between 0 and 1"),
        ("tuning", "weight_decay", -1, "it must be a number between 0 and 1000.0"),
        ("tuning", "learning_rate", 0, "it must be a number above 0 and at most 1e+38, or None"),
        ("quantization", "weights", ["int4", "int4"], "each at most once"),
        ("quantization", "accuracy_level", 2, "it must be one of 0, 1, 4"),
        ("export", "opset", 18, "it must be one of 21, 22, 23"),
        ("export", "logits_to_keep", 2, "it must be one of 0, 1"),
    ],
)
def test_each_rule_names_key_value_and_rule(stage, key, value, message):
    with pytest.raises(ConfigurationError) as error:
        CLPConfig(**{stage: {key: value}})
    assert f"{stage}.{key} is {value!r}: " in str(error.value)
    assert message in str(error.value)


def test_a_stage_of_the_wrong_type_is_refused():
    with pytest.raises(
        ConfigurationError, match="calibration is 'wikitext2': it must be a CalibrationConfig or a dict"
    ):
        CLPConfig(calibration="wikitext2")


def test_a_quality_budget_belongs_to_the_automatic_ratio():
    assert CLPConfig("auto", max_perplexity_increase=0.25).perplexity_bound() == 0.25
    assert CLPConfig("auto", min_retention=0.8).perplexity_bound() == pytest.approx(0.25)
    assert CLPConfig(0.2).perplexity_bound() is None
    with pytest.raises(ConfigurationError, match="pruning_ratio is 'auto': it needs one quality budget, and none is"):
        CLPConfig("auto")
    with pytest.raises(ConfigurationError, match="max_perplexity_increase and min_retention are given"):
        CLPConfig("auto", max_perplexity_increase=0.1, min_retention=0.9)
    with pytest.raises(ConfigurationError, match="min_retention is 0.9: the ratio is fixed to 0.2"):
        CLPConfig(0.2, min_retention=0.9)
    for name, value, rule in (
        ("min_retention", 1.0, "a number between 0 and 1, both excluded, or None"),
        ("max_perplexity_increase", 0, "a number above 0, or None"),
    ):
        with pytest.raises(ConfigurationError, match=f"{name} is {value}: it must be {rule}"):
            CLPConfig("auto", **{name: value})


def test_a_speed_target_stands_in_place_of_a_ratio():
    config = CLPConfig(target_tokens_per_second=90)
    assert (config.pruning_ratio, config.target_tokens_per_second) == (None, 90)
    both = CLPConfig(target_tokens_per_second=90, target_size_mb=60)
    assert CLPConfig.from_dict(both.to_dict()) == both
    with pytest.raises(ConfigurationError, match="target_tokens_per_second decides how many layers go. Leave one"):
        CLPConfig(0.2, target_tokens_per_second=90)
    rule = "target_size_mb and target_tokens_per_second decide how many layers go"
    with pytest.raises(ConfigurationError, match=rule):
        CLPConfig("auto", target_tokens_per_second=90, target_size_mb=60, min_retention=0.9)
    with pytest.raises(ConfigurationError, match="target_tokens_per_second is 90: no ONNX file is written"):
        CLPConfig(target_tokens_per_second=90, export={"enabled": False})
    rule = r"it is the speed of the int4 file, and quantization.weights is \['int8'\]. Add \"int4\" there"
    with pytest.raises(ConfigurationError, match=rule):
        CLPConfig(target_tokens_per_second=90, quantization={"weights": ["int8"]})
    for value in (0, -1, "fast", True):
        with pytest.raises(ConfigurationError, match="target_tokens_per_second is .*: it must be a number above 0"):
            CLPConfig(target_tokens_per_second=value)


@pytest.mark.parametrize(
    ("quantization", "export", "message"),
    [
        ({"group_size": 64}, {}, 'quantization.group_size is 64: quantization.tune_for is "speed", which chooses it'),
        ({"accuracy_level": 1}, {}, "quantization.accuracy_level is 1: .* Leave one of the two out"),
        ({"head_bits": 8}, {}, "quantization.head_bits is 8: .* which chooses it"),
        ({"weights": ["int8"]}, {}, "tune_for is 'speed': no int4 file is written. Leave it out, or add "),
        ({}, {"enabled": False}, "tune_for is 'speed': no int4 file is written"),
        ({}, {"format": "unpacked"}, "tune_for is 'speed': unpacked files multiply floats"),
        ({"method": "quanto"}, {}, "tune_for is 'speed': the method 'quanto' has groups and products of its own"),
    ],
)
def test_what_is_measured_is_not_given(quantization, export, message):
    with pytest.raises(ConfigurationError, match=message):
        CLPConfig(quantization={"tune_for": "speed", **quantization}, export=export)
    assert CLPConfig(quantization={"tune_for": "speed"}).quantization.group_size == 32


def test_a_head_of_8_bits_needs_a_method_that_mixes_bits():
    assert CLPConfig(quantization={"head_bits": 8, "method": "rtn"}).quantization.head_bits == 8
    with pytest.raises(ConfigurationError, match='quantization.head_bits is 8: .* choose the method "rtn" or'):
        CLPConfig(quantization={"head_bits": 8, "method": "hqq"})


@pytest.mark.parametrize("target", ["web", "gpu", "arm"])
def test_the_form_for_another_place_comes_from_a_table(target):
    """What runs elsewhere cannot be measured here, and the recipe has the settings."""
    chosen = CLPConfig(target=target, quantization={"tune_for": "speed"}).quantization
    assert (chosen.tune_for, chosen.group_size, chosen.accuracy_level) == ("size", 32, 4)
    given = CLPConfig(target=target, quantization={"tune_for": "speed", "group_size": 64}).quantization
    assert given.group_size == 64
    assert CLPConfig(target="cpu", quantization={"tune_for": "speed"}).quantization.tune_for == "speed"


def test_a_size_target_stands_in_place_of_a_ratio(tmp_path):
    assert (CLPConfig(None).pruning_ratio, CLPConfig().target_size_mb) == (0.2, None)
    config = CLPConfig(target_size_mb=60)
    assert (config.pruning_ratio, config.target_size_mb, config.perplexity_bound()) == (None, 60, None)
    config.save_pretrained(tmp_path)
    assert CLPConfig.from_pretrained(tmp_path) == config
    rule = "target_size_mb decides how many layers go. Leave one of the two out"
    with pytest.raises(ConfigurationError) as error:
        CLPConfig(0.2, target_size_mb=60, min_retention=0.9)
    assert f"pruning_ratio is 0.2: {rule}" in str(error.value) and f"min_retention is 0.9: {rule}" in str(error.value)
    with pytest.raises(ConfigurationError, match=f"pruning_ratio is 'auto': {rule}"):
        CLPConfig("auto", target_size_mb=60)
    with pytest.raises(ConfigurationError, match="target_size_mb is 60: no ONNX file is written. Set export.enabled"):
        CLPConfig(target_size_mb=60, export={"enabled": False})
    with pytest.raises(
        ConfigurationError, match=r"int4 file, and quantization.weights is \['int8'\]. Add \"int4\" there"
    ):
        CLPConfig(target_size_mb=60, quantization={"weights": ["int8"]})
    for value in (0, -1, "60MB", True, float("inf")):
        with pytest.raises(ConfigurationError, match="target_size_mb is .*: it must be a number above 0 and at most"):
            CLPConfig(target_size_mb=value)
    config.pruning_ratio, config.target_size_mb = None, None
    with pytest.raises(ConfigurationError, match="pruning_ratio is None: nothing else says how many layers go"):
        config.validate()


def test_changes_after_construction_are_validated():
    config = CLPConfig()
    config.calibration = CalibrationConfig(sequence_length=0)
    with pytest.raises(ConfigurationError, match="calibration.sequence_length is 0"):
        config.validate()


def test_push_to_hub_uploads_the_file(tmp_path):
    with mock.patch.object(CLPConfig, "push_to_hub", return_value="url") as push:
        assert CLPConfig().save_pretrained(tmp_path / "name", push_to_hub=True, private=True) == "url"
    push.assert_called_once_with("name", private=True)
