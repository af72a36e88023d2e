import json
import os

import pytest

from optimum_clp import json_files
from optimum_clp.json_files import MAX_DEPTH, JsonProblem, check, json_lines, parse, read_object


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{", r"is not valid JSON \(Expecting"),
        (b"\xff", "is not UTF-8 text"),
        ("[" * 100_000, f"is nested more than {MAX_DEPTH} deep"),
        ("[" * 65 + "]" * 65, f"is nested more than {MAX_DEPTH} deep"),
        ('{"a":' * 900 + "1" + "}" * 900, f"is nested more than {MAX_DEPTH} deep"),
        ("9" * 5000, "is not valid JSON"),
        ("", "is not valid JSON"),
    ],
)
def test_what_is_no_json_says_why(text, rule):
    with pytest.raises(JsonProblem, match=rule):
        parse(text)


@pytest.mark.parametrize("text", ["[" * 64 + "]" * 64, b"\xef\xbb\xbf{}", '{"a": [1, {"b": NaN}]}'])
def test_what_is_json_is_read_as_python_reads_it(text):
    expected = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    assert json.dumps(parse(text)) == json.dumps(expected)


def test_files_that_are_no_ordinary_ones_are_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path, rule in (
        (tmp_path / "none", "cannot be read"),
        (tmp_path, "is no ordinary file"),
        (tmp_path / "pipe", "is no ordinary file"),
    ):
        with pytest.raises(JsonProblem, match=rule):
            read_object(path)
    (tmp_path / "large.json").write_text('{"a": 1}')
    monkeypatch.setattr(json_files.read_bytes, "__defaults__", (7,))
    with pytest.raises(JsonProblem, match="has 8 bytes, and at most 7 are read"):
        read_object(tmp_path / "large.json")


def test_lines_are_counted_and_blank_ones_passed_over():
    assert list(json_lines(iter(["1\n", "\n", '{"a": 2}']))) == [(1, 1), (3, {"a": 2})]
    for line, rule in (
        ("{", "line 2 is not valid JSON"),
        ("[" * 5000, "line 2 is nested"),
        ("9" * 5000, "line 2 is not"),
    ):
        with pytest.raises(JsonProblem, match=rule):
            list(json_lines(iter(["1", line])))


def test_a_schema_names_the_key_its_value_and_its_rule():
    schema = {"properties": {"a": {"properties": {"b": {"type": ["integer", "null"], "minimum": 1, "maximum": 5}}}}}
    for value in (1, 5, None):
        check({"a": {"b": value}, "other": "x"}, schema)
    for value, rule in (
        (0, "must be at least 1"),
        (6, "must be at most 5"),
        ("x", "must be a whole number or null"),
        (3.0, "must be a whole number or null"),
        (True, "must be a whole number or null"),
    ):
        with pytest.raises(JsonProblem) as caught:
            check({"a": {"b": value}}, schema)
        assert (caught.value.name, caught.value.value, caught.value.rule) == ("a.b", value, rule)
