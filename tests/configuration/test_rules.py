import argparse
import math

import pytest

from optimum_clp.configuration import rules
from optimum_clp.registry import Registry


def registry():
    kinds = Registry("kind", "optimum_clp.no_such_group")
    kinds.register("flat", "nowhere:flat", says="as it is")
    kinds.register("steep", "nowhere:steep", says="rising")
    return kinds


@pytest.mark.parametrize(
    ("rule", "good", "bad", "said"),
    [
        (
            rules.between(0, 1),
            [0, 1, 0.5],
            [-0.1, 1.1, True, "0.5", math.nan],
            "it must be a number between 0 and 1. Choose a number between 0 and 1.",
        ),
        (
            rules.between(0, 1, open_ends=True),
            [1e-9, 0.5],
            [0, 1, None],
            "it must be a number between 0 and 1, both excluded. Choose a number between 0 and 1, both excluded.",
        ),
        (
            rules.positive(),
            [1, 1e-9],
            [0, -1, math.inf, True],
            "it must be a number above 0. Choose a number above 0.",
        ),
        (rules.not_negative(), [0, 0.5], [-1, False], "it must be a number of at least 0. Choose 0 or more."),
        (
            rules.integer(8),
            [8, 9000],
            [7, 8.0, True],
            "it must be a whole number at least 8. Choose a whole number at least 8.",
        ),
        (
            rules.integer(1, 5),
            [1, 5],
            [0, 6],
            "it must be a whole number from 1 to 5. Choose a whole number from 1 to 5.",
        ),
        (rules.boolean(), [True, False], [0, 1, "True"], "it must be True or False. Choose True or False."),
        (
            rules.text(),
            ["a"],
            ["", 1, None],
            "it must be a string that is not empty, of at most 4096 characters, none of them NUL. Give a string.",
        ),
        (rules.one_of((16, 32)), [16, 32], [48, 16.0, "16"], "it must be one of 16, 32. Choose one of 16, 32."),
        (
            rules.one_of({0: "all", 1: "the last"}),
            [0, 1],
            [2, False, True],
            "it must be one of 0, 1. Choose one of 0, 1.",
        ),
        (
            rules.one_of(registry()),
            ["flat", "steep"],
            ["round", None, []],
            "it must be one of 'flat', 'steep'. Choose one of 'flat', 'steep'.",
        ),
        (
            rules.several_of("int8", "int4"),
            [[], ["int4"], ("int4", "int8")],
            [["int4", "int4"], ["int2"], "int4"],
            "it must be a list of 'int8', 'int4', each at most once. Choose for example ['int4'].",
        ),
        (
            rules.names_or_files("tests", "arc", "a=a.jsonl"),
            [[], ["a=a.jsonl"], ("a=x,y", "b=x=y"), ["arc", "a=x"], ["mmlu_(law)", "task-v1.1"]],
            [["=x"], ["a="], ["a=x", "a=y"], ["a", "a=x"], ["a", "a"], ["a,b"], ["a.jsonl"], ["a/b"], "a=x", [1]],
            "it must be a list of tests and of NAME=FILE, each name once. Give for example ['a=a.jsonl', 'arc'].",
        ),
        (
            rules.some_names("loggers' names", "wandb"),
            [[], ["wandb", "other"]],
            [[""], "wandb", [1]],
            "it must be a list of loggers' names. Give for example ['wandb'].",
        ),
        (
            rules.source_of_text(),
            ["a.txt", ["one", "two"]],
            ["", [], [1], None, b"a.txt", {"a": 1}, 5],
            "it must be a file, a dataset name or a list of strings. Give one of them; of a datasets.Dataset give the column, "
            'dataset["text"], or the file that dataset.to_json writes.',
        ),
        (
            rules.name_or_weights(registry(), "flat=0.9,steep=0.1"),
            ["flat", {"flat": 1}, {"flat": 0.0, "steep": 2.5}],
            ["round", [], {}, {"round": 1}, {"flat": 0.0}, {"flat": -1, "steep": 2}, {"flat": "1"}],
            "it must be 'flat', 'steep', or weights from 0 to 1000000 for these, not all 0. "
            "Choose for example 'flat' or {'flat': 0.9, 'steep': 0.1}.",
        ),
        (
            rules.or_none(rules.positive()),
            [None, 1],
            [0, "None"],
            "it must be a number above 0, or None. Choose a number above 0, or None.",
        ),
        (
            rules.or_none(rules.one_of(("no", "bf16"))),
            [None, "no"],
            ["fp8"],
            "it must be one of 'no', 'bf16', or None. Choose one of 'no', 'bf16', or None.",
        ),
        (
            rules.or_auto(rules.positive()),
            ["auto", 1],
            [0, None, "all"],
            'it must be a number above 0, or "auto". Choose a number above 0, or "auto".',
        ),
    ],
)
def test_what_holds_and_what_is_said(rule, good, bad, said):
    assert [value for value in good if rule.problems("it", value)] == []
    for value in bad:
        (problem,) = rule.problems("stage.key", value)
        assert str(problem) == f"stage.key is {value!r}: {said}"


@pytest.mark.parametrize(
    ("rule", "word", "value"),
    [
        (rules.between(0, 1), "7", 7.0),  # out of range is for the check, not for the parser
        (rules.integer(1), "7", 7),
        (rules.or_none(rules.integer(1)), "7", 7),
        (rules.one_of((16, 32)), "16", 16),
        (rules.one_of(registry()), "round", "round"),
        (rules.some_names("names", "a"), "a,b", ["a", "b"]),
        (rules.name_or_weights(registry(), "flat=1"), "steep", "steep"),
        (rules.name_or_weights(registry(), "flat=1"), "flat=2,steep=0.5", {"flat": 2.0, "steep": 0.5}),
        (rules.or_auto(rules.positive()), "auto", "auto"),
        (rules.or_auto(rules.positive()), "0.25", 0.25),
    ],
)
def test_words_of_the_command_line(rule, word, value):
    assert rule.parse(word) == value and type(rule.parse(word)) is type(value)


def test_words_that_cannot_be_read():
    with pytest.raises(argparse.ArgumentTypeError, match="'most' is neither a number nor auto"):
        rules.or_auto(rules.positive()).parse("most")
    with pytest.raises(argparse.ArgumentTypeError, match="'flat=x' is neither a kind nor weights such as flat=1"):
        rules.name_or_weights(registry(), "flat=1").parse("flat=x")


def test_help_tells_what_there_is_to_choose_from():
    assert rules.positive().with_choices("a size") == "a size"
    assert rules.one_of((16, 32, 64)).with_choices("a size") == "a size: 16, 32 or 64"
    assert rules.one_of({0: "all", 1: "the last"}).with_choices("a size") == "a size. 0: all; 1: the last"
    assert rules.one_of(registry()).with_choices("a shape") == "a shape. flat: as it is; steep: rising"


def test_names_of_a_registry_are_read_when_they_are_needed():
    kinds = registry()
    rule = rules.or_none(rules.one_of(kinds))
    kinds.register("late", "nowhere:late")
    assert rule.problems("kind", "late") == []
    assert "'flat', 'steep', 'late', or None" in str(rule.problems("kind", "round")[0])
    assert rule.with_choices("a shape").endswith("steep: rising; late")


@pytest.mark.parametrize("value", [10**400, -(10**400), float("inf"), float("nan"), True, "1", None])
def test_what_is_no_number_is_refused_without_an_error(value):
    assert not rules.is_number(value)
    assert rules.between(0, 1).problems("it", value) and rules.positive().problems("it", value)


@pytest.mark.parametrize("value", ["a\0b", "\ud800", "x" * 5000])
def test_names_that_no_file_can_have_are_refused_and_not_repeated_whole(value):
    for rule, given in ((rules.text(), value), (rules.source_of_text(), value), (rules.some_names("n", "n"), [value])):
        (problem,) = rule.problems("it", given)
        assert len(str(problem)) < 500
    assert rules.names_or_files("tests", "a", "a=b").problems("it", [f"a={value}"])


def test_sources_of_text_are_kept_as_a_recipe_can_write_them(tmp_path):
    from datasets import Dataset

    column = Dataset.from_dict({"text": ["a", "b"]})["text"]
    for given in (("a", "b"), column, (letter for letter in "ab"), ["a", "b"]):
        assert rules.text_source(given) == ["a", "b"]
    assert rules.text_source(tmp_path) == str(tmp_path)
    for strange in (5, b"a", None, {"a": 1}):
        assert rules.text_source(strange) is strange
