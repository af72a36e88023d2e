"""Whether the answer to a prompt that has a right one is right."""

import json
import re

_FENCE = re.compile(r"```(?:json|JSON)?\s*\n?(.*?)```", re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def parses_as_json(text: str) -> bool:
    """Whether an answer is a JSON object or array; a fence of Markdown around it is allowed, and then words around that."""
    fenced = _FENCE.search(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, (dict, list))


def is_right_number(text: str, answer: str) -> bool:
    """Whether the last number of an answer is the right one, as lm-eval's `flexible-extract` of GSM8K reads it."""
    found = _NUMBER.findall(text)
    return bool(found) and float(found[-1].replace(",", "")) == float(answer)
