"""`prune`: all stages, from a dense model to the output folder."""

import argparse

from . import arguments
from .session import Answer, load_pruner, read_config, required_output

HELP = "search, cut, tune, quantize and export: a dense model in, a smaller one out"
USAGE = "--model MODEL [options] OUTPUT"
EXAMPLE = "optimum-clp prune --model Qwen/Qwen3-0.6B --pruning-ratio 0.2 --dataset wikitext2 qwen3-0.6b-clp20"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `prune`."""
    arguments.add_output(parser, "folder to write")
    arguments.add_pruning_ratio(parser)
    parser.add_argument("--push-to-hub", metavar="REPO_ID", help="also upload the output folder to the Hub")
    arguments.add_model(parser, "dense model: Hub id or local folder")
    arguments.add_recipe(parser)
    arguments.add_stage_switches(parser)
    arguments.add_calibration(parser)
    arguments.add_search(parser)
    arguments.add_tuning(parser)
    arguments.add_quantization(parser)
    arguments.add_export(parser)


def run(args: argparse.Namespace) -> Answer:
    """Run `prune`; the answer is the report and its table."""
    output = required_output(args)
    config = read_config(args)
    pruner = load_pruner(args)
    pruner.prune(config, output, overwrite=args.overwrite)
    where = f"Written to {args.output}."
    if args.push_to_hub:
        pruner.push_to_hub(args.push_to_hub)
        where += f" Uploaded to {args.push_to_hub}."
    return pruner.report.to_dict(), f"{pruner.report.to_table()}\n{where}".lstrip()
