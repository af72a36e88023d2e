"""The commands as a program of their own, `optimum-clp`, which starts without torch and transformers."""

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from ..version import __version__
from . import chat, evaluate, export, finish, prune, quantize, recipe, search, tune
from .arguments import accept_underscores, strict
from .running import execute
from .short_help import shorten_help

DESCRIPTION = "Continuous layer pruning of causal language models: search, cut, tune, quantize, export to ONNX."
COMMANDS: dict[str, ModuleType] = {
    "prune": prune,
    "recipe": recipe,
    "search": search,
    "tune": tune,
    "quantize": quantize,
    "export": export,
    "evaluate": evaluate,
    "finish": finish,
    "chat": chat,
}
"""Each module has `HELP`, `USAGE`, `EXAMPLE`, `add_arguments(parser)` and `run(args)`; one with many options `MOST_USED`."""


def fill_parser(parser: argparse.ArgumentParser, command: ModuleType) -> None:
    """Give `parser` the description and the options of `command`."""
    strict(parser)
    parser.description = command.HELP[0].upper() + command.HELP[1:] + "."
    parser.usage = f"%(prog)s {command.USAGE}"
    parser.epilog = f"example: {command.EXAMPLE}"
    command.add_arguments(parser)
    accept_underscores(parser)
    shown = getattr(command, "MOST_USED", ())
    if shown:
        shorten_help(parser, shown)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `optimum-clp`."""
    parser = argparse.ArgumentParser("optimum-clp", description=DESCRIPTION)
    strict(parser)
    parser.add_argument("--version", action="version", version=f"optimum-clp {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        fill_parser(subparsers.add_parser(name, help=command.HELP), command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `optimum-clp`.

    Args:
        argv (`Sequence[str]` or `None`): Arguments; `None` takes those of the process.

    Returns:
        `int`: Exit status, see [`~commands.running.execute`].

    Raises:
        SystemExit: With status 2, for options that cannot be understood.
    """
    args = build_parser().parse_args(argv)
    return execute(COMMANDS[args.command].run, args)


if __name__ == "__main__":
    sys.exit(main())
