"""The same conversation in a terminal: each model's answer below the other's, as it is written."""

import re
from collections.abc import Callable
from typing import Any, TextIO

from ..errors import CLPError
from ..evaluation.prompts import load_prompts
from .answering import Answering, AnswerSettings
from .speakers import Speaker, Speakers

HELP = "/new begins a new conversation, /quit ends, /help says this; Ctrl-C stops an answer."
AS_TEXT = "A line that begins with a space goes to the models as it is."
# a word behind one slash; a path has more of them, and goes to the models
_COMMAND = re.compile(r"/\?|/[\w-]*(?![\w/.-])")


def converse(
    speakers: Speakers, settings: AnswerSettings, read: Callable[[], str], screen: TextIO
) -> list[dict[str, Any]]:
    """Answer what is typed until there is no more.

    Args:
        speakers ([`Speakers`]): Who answers.
        settings ([`AnswerSettings`]): How.
        read (`Callable`): Gives the next line; raises `EOFError` or `KeyboardInterrupt` at the end. A line that begins with a
            slash and a word is a command, and goes to no model.
        screen (`TextIO`): Where the answers are shown.

    Returns:
        `list[dict]`: What was said: `prompt`, and for each name in `answers` its `text` and figures.
    """
    told: list[dict[str, Any]] = []
    histories: dict[str, list[dict[str, str]]] = {}
    for line in (*speakers.left_out, HELP):
        _show(screen, f"{line}\n")
    while True:
        try:
            line = read()
        except (EOFError, KeyboardInterrupt):
            return told
        words, command = line.strip(), _COMMAND.match(line)
        if command and command.group() == "/quit":
            return told
        if command and command.group() == "/new":
            histories = {}
            _show(screen, "A new conversation.\n")
        elif command:
            unknown = "" if command.group() == "/help" else f"There is no command {command.group()}. "
            _show(screen, f"{unknown}{HELP} {AS_TEXT}\n")
        elif words:
            answers = {}
            for speaker in speakers.all:
                history = histories.setdefault(speaker.name, [])
                answers[speaker.name] = _answered(speakers, speaker, settings, history, words, screen)
            told.append({"prompt": words, "answers": answers})


def _answered(
    speakers: Speakers,
    speaker: Speaker,
    settings: AnswerSettings,
    history: list[dict[str, str]],
    words: str,
    screen: TextIO,
) -> dict[str, Any]:
    _show(screen, f"\n{speaker.name}: ")
    asked = {"role": "user", "content": words}
    turns = [asked] if speakers.continues else [*history, asked]
    try:
        (prompt,) = load_prompts([{"messages": turns}])
        answer = Answering(speakers, speaker, speakers.tokens_of(prompt, speaker), settings)
    except CLPError as error:
        _show(screen, f"[{error.problems[0].rule}]\n")
        return {"error": error.problems[0].rule}
    try:
        while not answer.done:
            _show(screen, answer.advance())
    except KeyboardInterrupt:  # this answer is enough
        answer.finish()
    _show(screen, f"\n  [{summary(answer)}]\n")
    if answer.text.strip():
        history += [asked, {"role": "assistant", "content": answer.text}]
    return {"text": answer.text, **answer.figures()}


def summary(answer: Answering) -> str:
    """How an answer went, in a few words."""
    if answer.error is not None:
        return f"{type(answer.error).__name__}: {answer.error}"
    speed, number = answer.tokens_per_second, len(answer.tokens)
    parts = [f"{number} token{'s' if number != 1 else ''}"]
    parts += [] if speed is None else [f"{speed:.1f} tokens/s"]
    parts += ["loops"] if answer.loop is not None else []
    parts += [] if answer.ended else ["cut short"]
    return ", ".join(parts)


def _show(screen: TextIO, text: str) -> None:
    screen.write(text)
    screen.flush()
