"""Users' conversations: rows of the formats that there are, as messages.

`messages`; ShareGPT's `conversations` (`from`, `value`); Alpaca's `instruction`, `input`, `output`; TRL's `prompt` and
`completion`; a `prompt` alone, which has no answer yet.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import CalibrationError
from ..json_files import JsonProblem, parse

Message = dict[str, str]
COLUMNS = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output")
_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}
_FIRST = ("messages", "conversations", "prompt", "instruction")


def chat_columns(names: Iterable[str]) -> list[str]:
    """Those of a source's columns that make conversations; none if they do not."""
    there = set(names)
    return [name for name in COLUMNS if name in there] if there & set(_FIRST) else []


def messages_of(row: Mapping[str, Any], shown: str, name: str, number: int) -> list[Message]:
    """The messages of a row that has [`chat_columns`].

    Args:
        row (`Mapping`): Columns to values; of several formats the first of this module's text.
        shown (`str`): The source, for errors.
        name (`str`): What it is called in errors.
        number (`int`): Of the row, from 1.

    Returns:
        `list[dict]`: With `role` and `content`. If the last one is the user's, it is a prompt without an answer.

    Raises:
        CalibrationError: If a role is unknown, a turn is empty, or the row is of no such format.
    """
    told = _Row(shown, name, number)
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            return told.listed(row[column])
    if row.get("prompt") is not None:
        asked, answered = row["prompt"], row.get("completion")
    elif row.get("instruction") is not None:
        more = row.get("input") or ""
        asked = f"{row['instruction']}\n\n{more}" if str(more).strip() else row["instruction"]
        answered = row.get("output")
    else:
        raise told.error("holds no conversation")
    found = told.said(asked, "user")
    return found if answered is None else found + told.said(answered, "assistant")


class _Row:
    """A row that is read, and what is wrong with it."""

    def __init__(self, shown: str, name: str, number: int):
        self.shown, self.name, self.number = shown, name, number

    def listed(self, value: Any) -> list[Message]:
        """Messages from a list of them, or from its JSON, as a table of texts has it."""
        if isinstance(value, str):
            try:
                value = parse(value)
            except JsonProblem:
                raise self.error("holds a text where a list of messages should be") from None
        if not isinstance(value, (list, tuple)) or not value or not all(isinstance(m, Mapping) for m in value):
            raise self.error("holds no list of messages")
        return [self._message(message) for message in value]

    def said(self, value: Any, role: str) -> list[Message]:
        """What one side says, as a text or as messages."""
        return [self._message({"role": role, "content": value})] if isinstance(value, str) else self.listed(value)

    def error(self, what: str) -> CalibrationError:
        """The error about this row."""
        remedy = "Give messages with a role (system, user, assistant, tool) and a content that is not empty"
        return CalibrationError.of(self.name, self.shown, f"row {self.number} {what}", remedy)

    def _message(self, message: Mapping[str, Any]) -> Message:
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or role not in _ROLES:
            raise self.error(f"has a message of the unknown role {role!r}")
        if isinstance(content, (list, tuple)):
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
        if not isinstance(content, str) or not content.strip():
            raise self.error(f"has an empty turn of the {_ROLES[role]}")
        return {"role": _ROLES[role], "content": content}
