"""`--help` of a command with many options: those to begin with, and what the others are about; `--help-all` has all."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

GROUPS_SAY = {
    "options": "what is printed, what is overwritten, further ways to say how much goes",
    "model": "tokenizer, revision, access, dtype, device, attention, where it is kept, code of strangers",
    "recipe": "a recipe from a file, time, memory, seed",
    "stages": "which of them run",
    "text": "what is searched, tuned and measured on, and how much of it",
    "search": "how the layers that go are chosen",
    "endpoint tuning": "losses, rates, steps, precision, loggers",
    "quantization": "which files, bits, how weights are rounded",
    "ONNX export": "where the files will run, their format",
    "evaluation": "answers, texts, tasks, memory, and what must be reached",
}
"""One line for each group of options, by its title."""


class HelpAllAction(argparse._HelpAction):
    """`--help-all`: every option with its help, and the end."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        argparse.ArgumentParser.print_help(parser)
        parser.exit()


def shorten_help(parser: argparse.ArgumentParser, shown: Sequence[str]) -> None:
    """Let `--help` show some options in full, and of the others what they are about; add `--help-all`.

    Args:
        parser (`argparse.ArgumentParser`): With all of its options, whose order is that of the help.
        shown (`Sequence[str]`): `dest` of those that are shown, in their order.
    """
    parser.add_argument("--help-all", action=HelpAllAction, help="show every option and exit")

    def print_short(file: Any = None) -> None:
        print(short_help(parser, shown), end="", file=file or sys.stdout)

    setattr(parser, "print_help", print_short)  # noqa: B010  # mypy takes a plain assignment for a mistake


def short_help(parser: argparse.ArgumentParser, shown: Sequence[str]) -> str:
    """The text of `--help`, see [`shorten_help`]."""
    formatter = parser.formatter_class(prog=parser.prog)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
    formatter.add_text(parser.description)
    actions = list(_visible(parser._actions))
    formatter.start_section("to begin with")
    for name in shown:
        formatter.add_arguments([action for action in actions if action.dest == name][:1])
    formatter.end_section()
    formatter.start_section("all others, by --help-all")
    for group in parser._action_groups:
        left = [action for action in _visible(group._group_actions) if action.dest not in shown]
        if left and group.title is not None:
            title = f"{group.title}, {len(left)}"
            formatter.add_argument(
                argparse.Action([], dest=title, metavar=title, help=GROUPS_SAY.get(group.title, ""))
            )
    formatter.end_section()
    formatter.add_text(parser.epilog)
    return formatter.format_help()


def _visible(actions: Sequence[argparse.Action]) -> Iterator[argparse.Action]:
    for action in actions:
        if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
            yield action
