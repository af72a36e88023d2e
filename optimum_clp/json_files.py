"""JSON that strangers wrote, read in one place: not too large, not too deep, and checked against a schema before it is used.

Nothing here knows models, reports or text: whoever reads a file turns a [`JsonProblem`] into an error of his own. Python's
parser by itself takes a gigabyte of brackets, follows them until its stack ends, and believes every number.
"""

import json
import stat
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any

MAX_BYTES = 2**26
"""Of a whole file: 64 MiB; the largest index of weights that is known has 14."""
MAX_DEPTH = 64
"""Lists and objects inside one another; published configs have up to 6."""
_CHUNK = 2**16
# of what cannot be cut in two: an escape or a literal
_LONGEST_MARK = 12


class JsonProblem(ValueError):
    """What is wrong with a text or a file.

    Args:
        rule (`str`): A clause without final stop whose subject is the file: `"is not valid JSON (...)"`.
        name (`str`): The key that it is about, `"cut.segments"`; empty where it is about the whole.
        value (`Any`): What stands there.
    """

    def __init__(self, rule: str, name: str = "", value: Any = None):
        super().__init__(rule)
        self.rule, self.name, self.value = rule, name, value


def parse(text: str | bytes, *, unique_keys: bool = False) -> Any:
    """The value that a text stands for.

    Args:
        text (`str` or `bytes`): JSON; bytes in UTF-8, with or without a byte order mark.
        unique_keys (`bool`): Refuse an object in which a key stands twice, of which Python's parser takes the last: for files
            that people write.

    Raises:
        JsonProblem: If it is not JSON, or nested deeper than `MAX_DEPTH`.
    """
    deep = f"is nested more than {MAX_DEPTH} deep"
    pairs = _with_unique_keys if unique_keys else None
    try:
        value = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text, object_pairs_hook=pairs)
    except RecursionError:
        raise JsonProblem(deep) from None
    except JsonProblem:
        raise
    except json.JSONDecodeError as error:
        raise JsonProblem(f"is not valid JSON ({error})") from error
    except UnicodeDecodeError as error:
        raise JsonProblem(f"is not valid JSON (it is not UTF-8 text: {error.reason})") from error
    except ValueError as error:  # an integer of more digits than Python reads
        raise JsonProblem(f"is not valid JSON ({error})") from error
    if is_deep(value):
        raise JsonProblem(deep)
    return value


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise JsonProblem(f"has the key {key!r} twice", key, value)
        found[key] = value
    return found


def is_whole(text: str) -> bool:
    """Whether a text can be written in UTF-8: JSON can say half of a pair (`\\ud83d`), which no tokenizer takes."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def is_deep(value: Any) -> bool:
    """Whether lists and objects lie inside one another more than `MAX_DEPTH` deep; looked at level by level."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        children = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for row in children for child in row if isinstance(child, (dict, list))]
    return bool(level)


def read_object(path: Path, schema: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path (`Path`): The file.
        schema (`Mapping`, *optional*): JSON schema that it must keep.

    Raises:
        JsonProblem: If it cannot be read, is no ordinary file, has more than `MAX_BYTES`, is not JSON, not an object, or
            not what the schema says.
    """
    value = parse(read_bytes(path))
    if not isinstance(value, dict):
        raise JsonProblem("holds no JSON object", value=value)
    if schema is not None:
        check(value, schema)
    return value


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises:
        JsonProblem: If it cannot be read, is a folder or a device, or is larger.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise JsonProblem("is no ordinary file")
        if found.st_size > limit:
            raise JsonProblem(f"has {found.st_size} bytes, and at most {limit} are read")
        return path.read_bytes()
    except JsonProblem:
        raise
    except OSError as error:
        raise JsonProblem(f"cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # a name that no file can have
        raise JsonProblem(f"cannot be read ({error})") from error


def json_lines(lines: Iterator[str]) -> Iterator[tuple[int, Any]]:
    """The values of JSON lines, each with the number of its line, from 1; blank lines are passed over.

    Raises:
        JsonProblem: Its rule begins with the line's number.
    """
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line)
                deep = is_deep(value)
            except RecursionError:
                deep = True
            except json.JSONDecodeError as error:
                raise JsonProblem(f"line {number} is not valid JSON ({error.msg})") from error
            except ValueError as error:
                raise JsonProblem(f"line {number} is not valid JSON ({error})") from error
            if deep:
                raise JsonProblem(f"line {number} is nested more than {MAX_DEPTH} deep")
            yield number, value


def json_values(stream: IO[str], *, array: bool = False) -> Iterator[Any]:
    """The values of a text, one after the other, without holding it whole.

    Args:
        stream (`IO[str]`): The text.
        array (`bool`): `True`: one list, whose entries are the values; or values one after the other, as in JSON lines that
            are called `.json`. `False`: JSON lines.

    Raises:
        JsonProblem: Its rule begins with the number of the line that is wrong.
    """
    if not array:
        yield from (value for _, value in json_lines(_lines(stream)))
        return
    text = _Window(stream)
    in_list = text.skips("[")
    while text.left():
        if in_list and text.skips("]"):
            in_list = False
            continue
        yield text.value()
        if in_list and not text.skips(",") and not text.begins("]"):
            raise JsonProblem(f"line {text.line} is not valid JSON (Expecting ',' delimiter)")
    if in_list:
        raise JsonProblem(f"line {text.line} is not valid JSON (the list has no end)")


def _lines(stream: IO[str]) -> Iterator[str]:
    number = 0
    while line := stream.readline(MAX_BYTES):
        number += 1
        if len(line) == MAX_BYTES:
            raise JsonProblem(f"line {number} has {MAX_BYTES} characters and more, and such lines are not read")
        yield line


class _Window:
    """A stretch of a text that moves on as values are taken from its beginning."""

    def __init__(self, stream: IO[str]):
        self.stream, self.text, self.line, self.ended = stream, "", 1, False
        self.decoder = json.JSONDecoder()

    def left(self) -> bool:
        """Whether there is something but white space."""
        while not self.ended and not self.text.strip():
            self._move(len(self.text))
            self._grow()
        self._move(len(self.text) - len(self.text.lstrip()))
        return bool(self.text)

    def begins(self, mark: str) -> bool:
        return self.left() and self.text.startswith(mark)

    def skips(self, mark: str) -> bool:
        """Pass over `mark`, if it is next."""
        found = self.begins(mark)
        if found:
            self._move(len(mark))
        return found

    def value(self) -> Any:
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text)
                if end < len(self.text) or self.ended:  # else a number may go on
                    break
            except RecursionError:
                raise JsonProblem(f"line {self.line} is nested more than {MAX_DEPTH} deep") from None
            except json.JSONDecodeError as error:
                cut_off = error.pos > len(self.text) - _LONGEST_MARK or error.msg.startswith("Unterminated string")
                if self.ended or not cut_off:
                    line = self.line + error.lineno - 1
                    raise JsonProblem(f"line {line} is not valid JSON ({error.msg})") from error
            except ValueError as error:  # a number of more digits than Python reads
                raise JsonProblem(f"line {self.line} is not valid JSON ({error})") from error
            self._grow()
        if is_deep(value):
            raise JsonProblem(f"line {self.line} is nested more than {MAX_DEPTH} deep")
        self._move(end)
        return value

    def _grow(self) -> None:
        if len(self.text) > MAX_BYTES:
            raise JsonProblem(f"line {self.line} begins a value of more than {MAX_BYTES} characters")
        more = self.stream.read(max(_CHUNK, len(self.text)))
        self.text, self.ended = self.text + more, not more

    def _move(self, characters: int) -> None:
        self.line += self.text.count("\n", 0, characters)
        self.text = self.text[characters:]


def check(value: Any, schema: Mapping[str, Any]) -> None:
    """Check a value against a JSON schema (draft 2020-12), in which `6.0` is no integer.

    Raises:
        JsonProblem: With the key and the value of what is most clearly wrong.
    """
    from jsonschema.exceptions import best_match

    error = best_match(_validator()(schema).iter_errors(value))
    if error is not None:
        place = ".".join(map(str, error.absolute_path))
        raise JsonProblem(_rule(error.validator, error.validator_value), place, error.instance)


@cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator, validators

    def is_integer(_: Any, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    kinds = Draft202012Validator.TYPE_CHECKER.redefine("integer", is_integer)
    return validators.extend(Draft202012Validator, type_checker=kinds)


def _rule(keyword: str, wanted: Any) -> str:
    """What a keyword of a schema asks for, as a clause."""
    kinds = wanted if isinstance(wanted, list) else [wanted]
    said: dict[str, Callable[[], str]] = {
        "type": lambda: f"must be {' or '.join(map(_kind, kinds))}",
        "minimum": lambda: f"must be at least {wanted}",
        "exclusiveMinimum": lambda: f"must be above {wanted}",
        "maximum": lambda: f"must be at most {wanted}",
        "enum": lambda: f"must be one of {', '.join(map(repr, kinds))}",
        "const": lambda: f"must be {wanted!r}",
        "required": lambda: f"must have the keys {', '.join(kinds)}",
        "minItems": lambda: f"must have at least {wanted} entries",
        "maxItems": lambda: f"must have at most {wanted} entries",
        "minProperties": lambda: f"must have at least {wanted} entries",
        "minLength": lambda: f"must have at least {wanted} characters",
        "maxLength": lambda: f"must have at most {wanted} characters",
        "uniqueItems": lambda: "must have each entry once",
        "pattern": lambda: f"must match {wanted}",
    }
    return said[keyword]() if keyword in said else f"does not keep to its schema ({keyword})"


def _kind(name: str) -> str:
    shown = {"integer": "a whole number", "number": "a number", "string": "a string", "boolean": "true or false"}
    return shown.get(name, "null" if name == "null" else f"an {name}")
