"""The same commands under `optimum-cli clp`, in the classes that Optimum asks for."""

import sys
from argparse import ArgumentParser
from types import ModuleType

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .clp import COMMANDS, DESCRIPTION, fill_parser
from .running import execute


class _Subcommand(BaseOptimumCLICommand):
    module: ModuleType

    @classmethod
    def parse_args(cls, parser: ArgumentParser):  # type: ignore[override]  # Optimum calls it on the instance
        fill_parser(parser, cls.module)

    def run(self):
        status = execute(self.module.run, self.args)
        if status:
            sys.exit(status)  # Optimum's main returns nothing


def _subcommand(name: str, module: ModuleType) -> CommandInfo:
    cls = type(f"{name.capitalize()}Command", (_Subcommand,), {"module": module})
    return CommandInfo(name=name, help=module.HELP, subcommand_class=cls)


class CLPCommand(BaseOptimumCLICommand):
    """`optimum-cli clp`."""

    COMMAND = CommandInfo(name="clp", help=DESCRIPTION)
    SUBCOMMANDS = tuple(_subcommand(name, module) for name, module in COMMANDS.items())

    @staticmethod
    def parse_args(parser: ArgumentParser):
        parser.description = DESCRIPTION
