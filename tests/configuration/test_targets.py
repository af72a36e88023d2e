import pytest

from optimum_clp import CLPConfig
from optimum_clp.configuration.stages import ExportConfig
from optimum_clp.configuration.targets import TARGETS, TARGETS_SAY, with_target
from optimum_clp.errors import ConfigurationError


def test_a_target_is_a_choice_of_settings():
    config = CLPConfig(target="web")
    assert config.quantization.weights == ["int4", "int4_float16"]
    assert (config.export.format, config.export.float_file, config.export.logits_to_keep) == ("unpacked", False, 1)
    # the recipe says them one by one
    assert "target" not in config.to_dict() and CLPConfig.from_dict(config.to_dict()) == config


def test_the_cpu_is_the_default():
    assert CLPConfig(target="cpu") == CLPConfig() != CLPConfig(target="gpu")


def test_all_targets_say_the_same_settings_so_that_the_last_one_holds():
    said = [{(stage, key) for stage, values in target.items() for key in values} for target in TARGETS.values()]
    assert said == [said[0]] * len(TARGETS) and TARGETS.keys() == TARGETS_SAY.keys()
    first = with_target({}, "web", over=True)
    assert CLPConfig(**with_target(first, "cpu", over=True)) == CLPConfig()


def test_what_is_given_stands_before_the_target():
    config = CLPConfig(target="gpu", quantization={"weights": ["float16"], "group_size": 64}, export={"opset": 22})
    assert config.quantization.weights == ["float16"] and config.quantization.group_size == 64
    assert config.export.float_file is False and config.export.opset == 22
    given = {"export": {"float_file": True}}
    assert with_target(given, "web", over=True)["export"]["float_file"] is False
    assert given == {"export": {"float_file": True}}


@pytest.mark.parametrize("target", ["tpu", 3, ""])
def test_an_unknown_target_is_refused(target):
    with pytest.raises(ConfigurationError, match="target is .*it must be one of 'cpu', 'web', 'gpu'"):
        CLPConfig(target=target)


def test_a_stage_as_an_object_leaves_nothing_to_a_target():
    with pytest.raises(ConfigurationError, match="export is given as an object.*Give export as a dictionary"):
        CLPConfig(target="web", export=ExportConfig())


def test_some_file_must_be_left():
    rule = "export.float_file is False: quantization.weights is empty, so that no file is left"
    with pytest.raises(ConfigurationError, match=rule):
        CLPConfig(export={"float_file": False}, quantization={"weights": []})
    assert CLPConfig(quantization={"weights": []}).export.float_file
