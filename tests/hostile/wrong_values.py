"""What is handed in instead of a right value: made by a seeded generator, so that a failure can be run again by its name."""

import json
import math
import random

SEED = 20260
HUGE = 10**400
LONG = "x" * 5000


class Strange:
    """An object of nobody's kind, whose `repr` raises."""

    def __repr__(self):
        raise RuntimeError("no repr")


# of every kind that Python and JSON have
KINDS = {
    "none": None,
    "true": True,
    "int": 5,
    "negative": -7,
    "huge": HUGE,
    "float": 2.5,
    "nan": math.nan,
    "inf": math.inf,
    "empty": "",
    "word": "no such thing",
    "nul": "a\0b",
    "half": "\ud800",
    "long": LONG,
    "bytes": b"bytes",
    "list": [1, [2]],
    "dict": {"a": {"b": 1}},
    "set": {1},
    "object": Strange(),
}


def wrong_for(setting):
    """Names of the `KINDS` that break a setting's rule whatever it is in particular, told from its default and its kinds alone."""
    kind = setting.kind
    wrong = {
        "bytes",
        "set",
        "object",
        "half",
        "nul",
        "long",
        "empty",
        "nan",
        "inf",
        "huge",
        "negative",
        "dict",
        "list",
    }
    if "None" not in kind:
        wrong.add("none")
    if "bool" in kind:
        return wrong | {"int", "float", "word"}
    if "int" in kind or "float" in kind:
        wrong |= {"true", "word"}
    if kind == "`int`":
        wrong.add("float")
    if "str" in kind and "int" not in kind and "float" not in kind:
        wrong |= {"int", "true", "float"}
    if "list" in kind:
        wrong |= {"int", "true", "float"}
    return wrong


def damaged_texts(text, count, seed):
    """`(name, bytes)`: damages after which a text is no JSON object any more."""
    rng = random.Random(f"{SEED} {seed}")
    whole = text.rstrip().encode()
    yield from (
        ("empty", b""),
        ("list", b"[]"),
        ("number", b"5"),
        ("null", b"null"),
        ("text", b'"text"'),
        ("not-utf8", b"\xff\xfe" + whole),
        ("brackets", b"[" * 200_000),
        ("braces", b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
        ("deep", b'{"a":' * 300 + b"1" + b"}" * 300),
        ("digits", whole[:-1] + b', "zzz": ' + b"9" * 5000 + b"}"),
        ("two", whole + whole),
        ("nul", whole[:-1] + b"\0}"),
    )
    for number in range(count):
        yield f"cut-{number}", whole[: rng.randrange(1, len(whole) - 1)]


def changed(content, path, value):
    """A copy of JSON-ready content with another value at a path, such as `("cut", "segments", 0)`."""
    copy = json.loads(json.dumps(content))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copy


def odd_contents(content, count, seed):
    """`(name, content)`: copies with a random key changed to a random value; some of them are right."""
    rng = random.Random(f"{SEED} odd {seed}")
    values = [
        None,
        True,
        -1,
        0,
        5,
        10**9,
        10**30,
        1.5,
        -0.0,
        math.nan,
        "",
        "x",
        "../..",
        "\0",
        "\ud800",
        LONG,
        [],
        [1],
        {},
        {"a": []},
    ]
    paths = [path for path in _paths(content) if path]
    for number in range(count):
        path = rng.choice(paths)
        yield f"{number}-{'.'.join(map(str, path))}", changed(content, path, rng.choice(values))


def _paths(value, at=()):
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths(item, (*at, key))
