"""`finish`: do again what failed when a folder was written."""

import argparse

from . import arguments
from .running import Answer, exit_status, load_pruner, written

HELP = "do again what failed when a folder was written"
USAGE = "--model FOLDER"
EXAMPLE = "optimum-clp finish --model qwen3-0.6b-clp20"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `finish`."""
    arguments.add_printing(parser)
    arguments.add_model(parser, "folder that `prune` or `tune` wrote, whose report says that something has failed")


def run(args: argparse.Namespace) -> Answer:
    """Run `finish`; the answer is the report and its table."""
    pruner = load_pruner(args)
    pruner.finish()
    report = pruner.report
    return report.to_dict(), f"{report.to_table()}\n{written(report, args.model)}".lstrip(), exit_status(report)
