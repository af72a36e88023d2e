import pytest

from optimum_clp.errors import CLPError, ConfigurationError, Problem


def test_one_problem_says_name_value_rule_and_remedy():
    error = CLPError(Problem("seed", -1, "it must be at least 0", "Choose 0 or more"))
    assert str(error) == "seed is -1: it must be at least 0. Choose 0 or more."


def test_several_problems_are_numbered():
    first = Problem("a", 1, "rule", "Remedy")
    text = str(ConfigurationError(first, first))
    assert text.startswith("2 problems:\n  1. a is 1") and "\n  2. a is 1" in text


def test_long_values_are_cut_and_questions_keep_their_mark():
    text = str(Problem("x", "y" * 500, "rule", "Did you mean 'z'?"))
    assert len(text) < 260 and text.endswith("Did you mean 'z'?")


def test_a_configuration_error_is_a_value_error():
    with pytest.raises(ValueError):
        raise ConfigurationError(Problem("a", 1, "rule", "Remedy"))
