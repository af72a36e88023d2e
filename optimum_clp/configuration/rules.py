"""What the value of a setting may be: whether a rule holds, what it says, what to do, and how it is written as a word."""

import argparse
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import Problem
from ..registry import Registry

_LONGEST_WORD = 4096  # of a path on Linux
_MOST_STRINGS, _LARGEST_WEIGHT = 10**7, 10**6
# of a task of lm-eval; what ends like a file is a file whose name was forgotten
_NAME = re.compile(r"(?!.*\.(jsonl?|csv|tsv|txt|parquet|ya?ml)$)[\w()][\w.()+-]*")


@dataclass(frozen=True)
class Rule:
    """A rule for one value.

    Args:
        holds (`Callable[[Any], bool]`): Whether a value, of any type, keeps the rule.
        text (`str`): The rule, a clause without final stop; `{names}` stands for the names of `choices`.
        remedy (`str`): What to do, a sentence without final stop; `{names}` as in `text`.
        parse (`Callable[[str], Any]`): A word of the command line as a value, which may break the rule. `bool` stands
            for a switch, which takes no word.
        choices (`Registry` or `Mapping[Any, str]`): What there is to choose from, and what each says; empty for a rule
            that lists nothing. A registry's names are read when they are needed: other packages add some.
        several (`bool`): Any number of the choices makes a value.
        kept (`Callable[[Any], Any]`): What is kept of a value, before the rule is asked: of a path its string.
    """

    holds: Callable[[Any], bool]
    text: str
    remedy: str
    parse: Callable[[str], Any] = str
    choices: Registry | Mapping[Any, str] = field(default_factory=dict)
    several: bool = False
    kept: Callable[[Any], Any] = lambda value: value

    def with_choices(self, help: str) -> str:
        """A setting's help, and what there is to choose from: `"...: 16, 32 or 64"`, `"... 0: all; 1: the last"`."""
        said = {str(choice): self._says(choice) for choice in self.choices}
        if not said:
            return help
        if any(said.values()):
            return f"{help}. {'; '.join(f'{name}: {says}' if says else name for name, says in said.items())}"
        *others, last = said
        return f"{help}: {', '.join(others)} or {last}" if others else f"{help}: {last}"

    def problems(self, name: str, value: Any) -> list[Problem]:
        """What is wrong with `value`, the setting called `name`: one problem, or none."""
        if self.holds(value):
            return []
        shown = ", ".join(map(repr, self.choices))
        return [Problem(name, value, self.text.replace("{names}", shown), self.remedy.replace("{names}", shown))]

    def _says(self, choice: Any) -> str:
        return self.choices.says(choice) if isinstance(self.choices, Registry) else self.choices[choice]


def is_number(value: Any) -> bool:
    """Whether `value` is a finite `int` or `float`; `True` and `False` are none, nor is what is beyond every `float`."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def is_word(value: Any) -> bool:
    """Whether `value` is a string that can be a name or a path: neither empty nor of more than 4,096 characters, and each of
    them can be written in UTF-8 and is not NUL."""
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_WORD or "\0" in value:
        return False
    try:
        return bool(value.encode())
    except UnicodeEncodeError:  # a lone surrogate
        return False


def as_string(value: Any) -> Any:
    """A path as its string; everything else as it is."""
    found = os.fspath(value) if isinstance(value, os.PathLike) else value
    return os.fsdecode(found) if isinstance(value, os.PathLike) else found


def between(low: float, high: float, open_ends: bool = False) -> Rule:
    """A number from `low` to `high`; with `open_ends` neither of the two."""
    shown = f"a number between {low} and {high}" + (", both excluded" if open_ends else "")

    def holds(value: Any) -> bool:
        return is_number(value) and (low < value < high if open_ends else low <= value <= high)

    return Rule(holds, f"it must be {shown}", f"Choose {shown}", float)


def quantity(read: Callable[[Any], float], largest: float, wanted: str, number: Callable[[str], float]) -> Rule:
    """A number above 0 that may be written with units.

    Args:
        read (`Callable`): Makes a number of what was given; raises `ValueError` if it is none.
        largest (`float`): That is allowed.
        wanted (`str`): The rule, as it stands behind "it must be" and "Give".
        number (`Callable`): Makes a number without units of a word on the command line; raises `ValueError` if it is none.
    """

    def holds(value: object) -> bool:
        try:
            return 0 < read(value) <= largest
        except (ValueError, OverflowError):
            return False

    def parse(word: str) -> str | float:
        try:
            return number(word)
        except ValueError:
            return word

    return Rule(holds, f"it must be {wanted}", f"Give {wanted}", parse)


def positive(most: float = math.inf) -> Rule:
    """A number above 0, and at most `most`."""
    shown = "a number above 0" + (f" and at most {most}" if most < math.inf else "")
    return Rule(lambda v: is_number(v) and 0 < v <= most, f"it must be {shown}", f"Choose {shown}", float)


def not_negative(most: float = math.inf) -> Rule:
    """A number of at least 0, and at most `most`."""
    if most < math.inf:
        return between(0, most)
    return Rule(lambda v: is_number(v) and v >= 0, "it must be a number of at least 0", "Choose 0 or more", float)


def integer(low: int, high: int | None = None) -> Rule:
    """A whole number of at least `low`, and at most `high`."""
    shown = f"a whole number at least {low}" if high is None else f"a whole number from {low} to {high}"

    def holds(value: Any) -> bool:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and value >= low and (high is None or value <= high)

    return Rule(holds, f"it must be {shown}", f"Choose {shown}", int)


def boolean() -> Rule:
    """`True` or `False`."""
    return Rule(lambda v: isinstance(v, bool), "it must be True or False", "Choose True or False", bool)


def text() -> Rule:
    """A string that is not empty: a name, or a path, which may be a `Path`."""
    rule = f"it must be a string that is not empty, of at most {_LONGEST_WORD} characters, none of them NUL"
    return Rule(is_word, rule, "Give a string", str, kept=as_string)


def one_of(choices: Registry | Mapping[Any, str] | Iterable[Any]) -> Rule:
    """One of the values, of the same type; what each stands for is said where a registry or a mapping says it."""
    listed = _listed(choices)
    # a registry's names are strings; its first one is not asked for, which would read the other packages' names
    parse = str if isinstance(listed, Registry) else type(next(iter(listed)))
    return Rule(
        lambda v: any(type(v) is type(x) and v == x for x in listed),
        "it must be one of {names}",
        "Choose one of {names}",
        parse,
        listed,
    )


def several_of(*choices: str) -> Rule:
    """A list of any of the strings, each at most once."""

    def holds(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and all(v in choices for v in value) and len(set(value)) == len(value)

    rule = "it must be a list of {names}, each at most once"
    return Rule(holds, rule, f"Choose for example {[choices[-1]]}", str, _listed(choices), several=True)


def some_names(kind: str, example: str) -> Rule:
    """A list of strings that are not empty: names of a `kind`, such as `example`."""

    def holds(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and all(map(is_word, value))

    return Rule(holds, f"it must be a list of {kind}", f"Give for example {[example]}", lambda word: word.split(","))


def names_or_files(kind: str, example: str, file: str) -> Rule:
    """A list of strings, each a name of a `kind`, such as `example`, or `NAME=FILE`, such as `file`; each name once."""

    def holds(value: Any) -> bool:
        if not isinstance(value, (list, tuple)) or not all(map(is_word, value)):
            return False
        names = [word.partition("=")[0] for word in value]
        return len(set(names)) == len(names) and all(name_or_file(word) == [word] for word in value)

    return Rule(
        holds,
        f"it must be a list of {kind} and of NAME=FILE, each name once",
        f"Give for example {[file, example]}",
        name_or_file,
        several=True,
    )


def name_or_file(word: str) -> list[str]:
    """What a word of the command line stands for: `NAME=FILE` as it is, names with commas between them one by one; else nothing."""
    if "=" in word:
        # a file's name may have a comma
        name, _, file = word.partition("=")
        return [word] if name and file else []
    names = word.split(",")
    return names if all(map(_NAME.fullmatch, names)) else []


def source_of_text() -> Rule:
    """A file, the name of a dataset, or strings."""

    def holds(value: Any) -> bool:
        return is_word(value) or (
            isinstance(value, list) and len(value) > 0 and all(isinstance(v, str) for v in value)
        )

    rule = "it must be a file, a dataset name or a list of strings"
    remedy = 'Give one of them; of a datasets.Dataset give the column, dataset["text"], or the file that dataset.to_json writes'
    return Rule(holds, rule, remedy, kept=text_source)


def text_source(value: Any) -> Any:
    """A source of text as a recipe keeps it: a path as its string; a tuple, a column of a `datasets.Dataset` and a generator
    of strings as the list. What is none of these comes back as it is, for a rule to refuse."""
    value = as_string(value)
    if isinstance(value, (str, bytes, list, Mapping)) or not isinstance(value, (Sequence, Iterator)):
        return value
    # a generator need not end
    return list(itertools.islice(value, _MOST_STRINGS))


def name_or_weights(choices: Registry, example: str) -> Rule:
    """A name of `choices`, or several names with weights, as on the command line in `example` (`"kd=0.9,ce=0.1"`)."""

    def holds(value: Any) -> bool:
        if isinstance(value, dict):
            weights = list(value.values())
            return (
                set(value) <= set(choices)
                and all(is_number(w) and 0 <= w <= _LARGEST_WEIGHT for w in weights)
                and sum(weights) > 0
            )
        return isinstance(value, str) and value in choices

    def parse(word: str) -> str | dict[str, float]:
        if "=" not in word:
            return word
        try:
            return {name: float(weight) for name, weight in (part.split("=") for part in word.split(","))}
        except ValueError:
            rule = f"{word!r} is neither a {choices.kind} nor weights such as {example}"
            raise argparse.ArgumentTypeError(rule) from None

    weighted = parse(example)
    return Rule(
        holds,
        f"it must be {{names}}, or weights from 0 to {_LARGEST_WEIGHT} for these, not all 0",
        f"Choose for example {next(iter(weighted))!r} or {weighted}",
        parse,
        choices,
    )


def or_none(rule: Rule) -> Rule:
    """What `rule` allows, or `None`."""
    return _or(rule, None, "None")


def or_auto(rule: Rule) -> Rule:
    """What `rule`, one for numbers, allows, or `"auto"`."""

    def parse(word: str) -> Any:
        try:
            return word if word == "auto" else rule.parse(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} is neither a number nor auto") from None

    return replace(_or(rule, "auto", '"auto"'), parse=parse)


def _or(rule: Rule, value: Any, shown: str) -> Rule:
    return replace(
        rule,
        holds=lambda v: (isinstance(v, type(value)) and v == value) or rule.holds(v),
        text=f"{rule.text}, or {shown}",
        remedy=f"{rule.remedy}, or {shown}",
    )


def _listed(choices: Registry | Mapping[Any, str] | Iterable[Any]) -> Registry | Mapping[Any, str]:
    return choices if isinstance(choices, (Registry, Mapping)) else dict.fromkeys(choices, "")
