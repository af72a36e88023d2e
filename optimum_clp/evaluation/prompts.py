"""Prompts that a model answers while its generation is measured: ours (`prompts.jsonl`), or a file of the user's.

Ours are of our own making and are only ever measured on; nothing is trained on them.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..argument_types import check_arguments
from ..errors import ConfigurationError
from ..json_files import JsonProblem, is_whole, json_lines

ROLES = ("system", "user", "assistant")
KINDS = {"json": "the answer must parse as JSON", "arithmetic": "the answer is a number"}
"""Kinds of prompts whose answers are checked."""
SHIPPED = Path(__file__).with_name("prompts.jsonl")
_FORMATS = '{"messages": [{"role": "user", "content": "..."}]} or {"prompt": "..."}'


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Args:
        messages (`tuple[tuple[str, str], ...]`): Role and words of each turn; the last one is the user's.
        kind (`str`): Such as `"facts"`; [`KINDS`] are checked. Empty if the file does not say.
        answer (`str` or `None`): The right number, for arithmetic.
    """

    messages: tuple[tuple[str, str], ...]
    kind: str = ""
    answer: str | None = None

    def for_template(self) -> list[dict[str, str]]:
        """The turns as a chat template takes them."""
        return [{"role": role, "content": words} for role, words in self.messages]

    @property
    def last_words(self) -> str:
        """The last turn."""
        return self.messages[-1][1]


@check_arguments
def load_prompts(source: str | os.PathLike | Sequence[dict[str, Any]] | None = None) -> list[Prompt]:
    """Read prompts.

    Args:
        source (`str`, `os.PathLike` or `Sequence[dict]`, *optional*): A JSON lines file, or its rows: each has `messages`
            (turns with `role` and `content`; the last is the user's) or `prompt` (a string, one turn of the user), and may
            have `kind` and, where that is `"arithmetic"`, `answer`. Ours if not given.

    Returns:
        `list[Prompt]`: At least one.

    Raises:
        ConfigurationError: If the file cannot be read, is empty, or a row is not of that shape: an unknown role, an empty
            turn, a last turn that is not the user's.
    """
    if source is None or isinstance(source, (str, os.PathLike)):
        path = SHIPPED if source is None else Path(source).expanduser()
        shown, rows = str(path), _read(path)
    else:
        shown, rows = f"list of {len(source)} rows", [(f"row {n}", row) for n, row in enumerate(source, 1)]
    prompts = []
    for place, row in rows:
        try:
            prompts.append(_prompt(row))
        except ValueError as error:
            raise ConfigurationError.of(
                "prompts", shown, f"{place} {error}", f"Give rows that are {_FORMATS}"
            ) from None
    if not prompts:
        raise ConfigurationError.of("prompts", shown, "there is no prompt in it", f"Give rows that are {_FORMATS}")
    return prompts


def spread_over_kinds(prompts: Sequence[Prompt], number: int) -> list[Prompt]:
    """`number` of the prompts, as many of each kind as can be, in the file's order; all of them if these are fewer."""
    by_kind: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_kind.setdefault(prompt.kind, []).append(index)
    turns = max(map(len, by_kind.values()), default=0)
    in_turn = [places[turn] for turn in range(turns) for places in by_kind.values() if turn < len(places)]
    return [prompts[index] for index in sorted(in_turn[:number])]


def _read(path: Path) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    remedy = "Give a JSON lines file in UTF-8, one prompt a line"
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, row in json_lines(lines):
                rows.append((f"line {number}", row))
    except JsonProblem as error:
        raise ConfigurationError.of("prompts", str(path), error.rule, remedy) from error
    except OSError as error:
        raise ConfigurationError.of("prompts", str(path), f"it cannot be read ({error.strerror})", remedy) from error
    except ValueError as error:  # not UTF-8
        raise ConfigurationError.of("prompts", str(path), f"it is not valid JSON ({error})", remedy) from error
    return rows


def _prompt(row: Any) -> Prompt:
    """A row's prompt; a ValueError says what the row does wrong."""
    if not isinstance(row, dict):
        raise ValueError("is not an object")
    kind, answer = row.get("kind", ""), row.get("answer")
    if not isinstance(kind, str):
        raise ValueError("has a kind that is not a string")
    if isinstance(row.get("messages"), list) and row["messages"]:
        messages = tuple(_turn(turn) for turn in row["messages"])
    elif isinstance(row.get("prompt"), str):
        messages = (_turn({"role": "user", "content": row["prompt"]}),)
    else:
        raise ValueError("has neither messages nor a prompt")
    if messages[-1][0] != "user":
        raise ValueError(f"ends with a turn of the role {messages[-1][0]!r}: there is nothing to answer")
    if kind == "arithmetic" and not _is_number(answer):
        raise ValueError("is of the kind arithmetic and has no number as its answer")
    return Prompt(messages, kind, None if answer is None else str(answer))


def _turn(turn: Any) -> tuple[str, str]:
    role, words = (turn.get(key) if isinstance(turn, dict) else None for key in ("role", "content"))
    if role not in ROLES:
        raise ValueError(f"has the role {role!r}, which is none of {', '.join(ROLES)}")
    if not isinstance(words, str) or not words.strip():
        raise ValueError(f"has an empty turn of the role {role!r}")
    if not is_whole(words):
        raise ValueError("has half of a character in it (a lone surrogate), which no tokenizer takes")
    return str(role), words


def _is_number(answer: Any) -> bool:
    try:
        float(answer)
    except (TypeError, ValueError):
        return False
    return True
