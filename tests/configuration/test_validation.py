import pytest

from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.configuration.stages import STAGES, CalibrationConfig, TuningConfig
from optimum_clp.configuration.validation import PLAIN_KEYS, checked_values, value_problems
from optimum_clp.errors import ConfigurationError


def test_values_that_are_not_given_are_the_defaults():
    values = checked_values({"seed": 3, "tuning": {"epochs": 2}})
    assert list(values) == [*PLAIN_KEYS, *STAGES]
    assert values["seed"] == 3 and values["pruning_ratio"] == 0.2
    assert values["tuning"] == TuningConfig(epochs=2) and values["calibration"] == CalibrationConfig()


def test_a_stage_is_copied():
    tuning = TuningConfig()
    assert checked_values({"tuning": tuning})["tuning"] is not tuning


def test_what_a_file_says_of_itself_is_no_setting():
    assert "clp_version" not in checked_values(CLPConfig().to_dict())


@pytest.mark.parametrize(
    "given",
    [
        {"serch": 1, "pruning_ratio": 2},
        {"pruning_ratio": "auto", "tuning": {"epoch": 1, "epochs": 0}},
        {"quantization": {"method": "hqq", "bits_per_weight": 5.0}, "min_retention": 0.5},
        {"export": "onnx", "calibration_dataset": [], "clp_version": "99.0"},
    ],
)
def test_the_configuration_says_the_same(given):
    with pytest.raises(ConfigurationError) as light:
        checked_values(given)
    with pytest.raises(ConfigurationError) as full:
        CLPConfig(**given)
    assert str(light.value) == str(full.value)


def test_problems_come_in_the_order_of_the_settings():
    """Keys first, then plain settings, then what belongs together, then the stages."""
    with pytest.raises(ConfigurationError) as error:
        checked_values(
            {
                "export": {"opset": 1, "opsets": 2},
                "calibration": {"sequence_length": 1},
                "quantization": {"method": "quanto", "bits_per_weight": 4.5, "group_size": 1},
                "min_retention": 0.5,
                "seed": -1,
                "what": 0,
            }
        )
    assert [problem.name for problem in error.value.problems] == [
        "what",
        "export.opsets",
        "seed",
        "min_retention",
        "quantization.bits_per_weight",
        "calibration.sequence_length",
        "quantization.group_size",
        "export.opset",
    ]


@pytest.mark.parametrize(
    ("given", "rule", "remedy"),
    [
        (
            {"pruning_ratio": 0.2},
            "no size budget gives them",
            "Leave it out, or give quantization.bits_per_weight or target_size_mb",
        ),
        (
            {"target_size_mb": 90, "export": {"format": "qdq"}},
            'files of the format "qdq" have integers of 4 and 8 bits',
            'Leave it out, or choose "contrib"',
        ),
        (
            {"quantization": {"bits_per_weight": 6, "accuracy_level": 1}},
            "ONNX Runtime has fast products of this kind at accuracy_level 4 alone, and it is 1",
            "Leave it out, or leave accuracy_level as it is",
        ),
        (
            {"quantization": {"bits_per_weight": 6, "tune_for": "speed"}},
            'quantization.tune_for is "speed", and they are slower',
            "Leave one of the two out",
        ),
        (
            {"quantization": {"bits_per_weight": 6, "weights": ["int4", "int4_float16"]}},
            "graphics processors have no products of this kind, and quantization.weights has the file for them",
            'Leave it out, or take "int4_float16" out there',
        ),
    ],
)
def test_integers_of_6_bits_need_a_budget_and_fast_operators(given, rule, remedy):
    quantization = {**given.get("quantization", {}), "six_bits": True}
    with pytest.raises(ConfigurationError) as error:
        CLPConfig(**{**given, "quantization": quantization})
    (problem,) = error.value.problems
    assert (problem.name, problem.value, problem.rule, problem.remedy) == ("quantization.six_bits", True, rule, remedy)


def test_a_size_budget_needs_precisions_that_can_be_planned():
    for method, rule in (("quanto", "quanto's integers are taken as they are"), ("hqq", "which HQQ has")):
        with pytest.raises(ConfigurationError) as error:
            checked_values({"quantization": {"method": method, "bits_per_weight": 5.0}})
        (problem,) = error.value.problems
        assert problem.name == "quantization.bits_per_weight" and rule in problem.rule
        assert problem.remedy == 'Leave it out, or choose the method "rtn" or "gptq"'
    assert value_problems(checked_values({"quantization": {"method": "gptq", "bits_per_weight": 5.0}})) == []
