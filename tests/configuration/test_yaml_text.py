import pytest
import yaml

from optimum_clp.configuration.yaml_text import YamlProblem, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("6.0", 6.0),
        ("7", 7),
        ("+7", 7),
        ("010", 10),
        ("0x1f", 31),
        ("0o17", 15),
        ("no", "no"),
        ("yes", "yes"),
        ("On", "On"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("20min", "20min"),
        ("24GiB", "24GiB"),
        ("2026-11-29", "2026-11-29"),
        ("auto", "auto"),
        ("'0.2'", "0.2"),
        ('"no"', "no"),
        ("0.2 # why", 0.2),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("=", "="),
        ("[int8, int4]", ["int8", "int4"]),
        ("{kd: 0.9, ce: 0.1}", {"kd": 0.9, "ce": 0.1}),
        ("~/corpus.txt", "~/corpus.txt"),
    ],
)
def test_scalars_are_what_they_look_like(text, value):
    found = parse_yaml(f"key: {text}\n".encode())["key"]
    assert found == value and type(found) is type(value)


def test_yaml_1_1_would_read_other_values():
    """The reason for a schema of our own: if PyYAML's reads these one day, it can go."""
    found = yaml.safe_load("{a: 1e-4, b: no, c: 010, d: 1:30}")
    assert found == {"a": "1e-4", "b": False, "c": 8, "d": 90}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a: 1\nb: 2\na: 3\n", r"has the key 'a' twice \(line 3, column 1\)"),
        ("t:\n  a: 1\n  a: 1\n", r"has the key 'a' twice \(line 3, column 3\)"),
        ("t:\n\ta: 1\n", r"is not valid YAML \(line 2, column 1: a tab, and YAML is indented with spaces\)"),
        ("a: &x 1\n", r"has an anchor or an alias \(line 1, column 4\), which are not read: write the value out"),
        ("a: 1\nb: *x\n", r"has an anchor or an alias \(line 2, column 4\)"),
        ("a: !!python/object/apply:os.system [ls]\n", r"has a tag \(line 1, column 4\), which are not read"),
        ("a: !!str 1\n", "put quotes around what is a string"),
        ("1: a\n", r"has the key '1', and keys are names \(line 1, column 1\)"),
        ("[a, b]: 1\n", r"has the key of several values, and keys are names \(line 1, column 1\)"),
        ('a: "\\UFFFFFFFF"\n', r"is not valid YAML \(.*too large"),
        (
            "a: [" + "1," * 2**14 + "]",
            r"has more than 16384 names and values \(line 1, column .*\); JSON may have more",
        ),
        ("a: 1\n---\nb: 2\n", "is not valid YAML .*expected a single document"),
        ("a: [1, 2\n", r"is not valid YAML \(line 2, column 1: .*expected ',' or ']'"),
        ("a: b: c\n", r"is not valid YAML \(line 1, column 5: mapping values are not allowed here\)"),
        ("a: \0\n", "is not valid YAML .*special characters are not allowed"),
        (b"a: \xff\n", "is not valid YAML .it is not UTF-8 text"),
        ("a: " + "9" * 5000, "is not valid YAML .*digits"),
        ("a: " + "[" * 5000, "is nested too deep"),
    ],
)
def test_what_a_recipe_has_no_use_for_is_refused(text, rule):
    with pytest.raises(YamlProblem, match=rule):
        parse_yaml(text if isinstance(text, bytes) else text.encode())


def test_a_merge_key_is_a_key_like_any_other():
    assert parse_yaml(b"<<: {a: 1}\nb: 2\n") == {"<<": {"a": 1}, "b": 2}


def test_a_byte_order_mark_is_passed_over():
    assert parse_yaml("a: ä\n".encode("utf-8-sig")) == {"a": "ä"}
