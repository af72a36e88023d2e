import pytest

from optimum_clp.evaluation.checks import is_right_number, parses_as_json


@pytest.mark.parametrize(
    ("text", "parses"),
    [
        ('{"a": 1}', True),
        (' ["red"]\n', True),
        ('Here it is:\n```json\n{"a": [1, 2]}\n```\nI hope it helps.', True),
        ("```\n[]\n```", True),
        ('{"a": 1', False),
        ('The JSON: {"a": 1}', False),
        ("12", False),
        ("", False),
        ("[" * 100_000, False),
    ],
)
def test_json(text, parses):
    assert parses_as_json(text) is parses


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("7 + 5 = 12.", "12", True),
        ("12", "12.0", True),
        ("It is 1,200 dollars.", "1200", True),
        ("It is -3", "-3", True),
        ("It is 3.50", "3.5", True),
        ("12 is what 7 and 5 make", "12", False),
        ("twelve", "12", False),
        ("", "12", False),
    ],
)
def test_the_last_number_counts(text, answer, right):
    assert is_right_number(text, answer) is right
